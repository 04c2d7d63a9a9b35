"""vLLM and the policy agree (law 1) in every family, through weight syncs."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder as GDNBuilder
from vllm.v1.attention.backends.short_conv_attn import ShortConvAttentionMetadataBuilder as ShortConvBuilder

from rethinker.config import Config, ConfigError, PolicyConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.episode import MismatchError, check_mismatch
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.lora import base_weights
from rethinker.policy.model import Policy
from rethinker.policy.packing import pack
from rethinker.rollout import vllm_engine, vllm_weights
from rethinker.rollout.engine import make_engine
from rethinker.rollout.vllm_settings import engine_arguments
from rethinker.samples import Bundle, Completion, Observed, Prompt, Query, Sample
from rethinker.trajectory import Trajectory
from tests.data.image_kinds import noise, oriented, saved, tagged
from tests.families.tiny_models import create
from tests.policy.helpers import late_image, queries_of_every_kind
from tests.rollout.helpers import rollout_config
from tests.rollout.served import Served

TOLERANCE = 1e-5  # nats, law 1
PLAIN = {"n": 2, "max_new_tokens": 12, "temperature": 1.0}


class Weights:
    """The policy's weights as a WeightStream."""

    def __init__(self, policy):
        self.named = base_weights(policy.hf)

    def metadata(self):
        return [(name, p.dtype, tuple(p.shape)) for name, p in self.named]

    def __iter__(self):
        return ((name, p.detach()) for name, p in self.named)


class Setting:
    """A family's policy, its prompts, and the engine that samples from it."""

    def __init__(self, folder, images, backend: str, **rollout):
        self.config = rollout_config(backend=backend, check_sync=True, **rollout)
        self.config.data.min_pixels, self.config.data.max_pixels = 1024, 8192
        self.config.data.max_images, self.config.rollout.max_new_tokens = 4, 512
        self.policy = Policy(load_model(folder, torch.float32), PolicyConfig(dtype="float32"))
        self.encoder = PromptEncoder(load_processor(folder), self.config.data)
        self.queries = [*queries_of_every_kind(images), late_image(images)]
        self.prompts = [self.encoder.encode(query) for query in self.queries]
        self.engine = make_engine(self.config, str(folder), rank=0, world_size=1, local_rank=0)

    def perturb(self, seed: int, part: str = "all") -> None:
        """Move every weight of a part, corrections of a router's scores included."""
        family, hf = self.policy.family, self.policy.hf
        parts = {"all": [hf], "language model": [family.language_model(hf)], "vision": family.vision_modules(hf)}
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _, weight in (named for module in parts[part] for named in base_weights(module)):
                weight.add_(0.02 * torch.randn(weight.shape, generator=generator))

    def error(self, seed: int) -> float:
        """Largest difference between behaviour log-probs and the policy's packed forward, in nats."""
        return self.gaps(self.queries, self.prompts, seed).abs().max().item()

    def gaps(self, queries: list[Query], prompts: list[Prompt], seed: int) -> torch.Tensor:
        """Behaviour log-probs of what the engine samples for the prompts, less the policy's own for the queries."""
        return self.compare(queries, prompts, self.engine.generate(prompts, seed=seed, **PLAIN))

    def turns(self, prompts: list[Prompt], seed: int) -> list[list[Completion]]:
        """Two responses to every prompt of three turns each, and between these an image and some text."""
        responses = [Trajectory(prompt, 500) for prompt in prompts for _ in range(2)]
        observed = [[] for _ in responses]
        for turn in range(3):
            prompts = [one.prompt for one in responses]
            said = self.engine.generate(prompts, n=1, max_new_tokens=5, temperature=1.0, seed=seed + turn)
            for number, (one, (completion,), parts) in enumerate(zip(responses, said, observed, strict=True)):
                # Its last token may be an image's placeholder, which ends a response.
                one.say(completion, kept=None if turn == 2 else completion.tokens - 1)
                if turn < 2:
                    sides = 48 + 16 * (number % 3), 32 + 16 * (number % 2)
                    image = {"bytes": saved(Image.fromarray(noise(*sides, seed=10 * number + turn)))}
                    heard = self.encoder.observation("part <image>, then?", (image,), "q")
                    one.hear(heard.token_ids, heard.compact_ids, heard.images)
                    parts.append(Observed(one.tokens - len(heard.token_ids), one.tokens, 0, images=(image,)))
        made = [one.completion("", observed=tuple(parts)) for one, parts in zip(responses, observed, strict=True)]
        return [made[i : i + 2] for i in range(0, len(made), 2)]

    @torch.no_grad()
    def compare(self, queries: list[Query], prompts: list[Prompt], sampled: list[list[Completion]]) -> torch.Tensor:
        """Behaviour log-probs of responses, less the policy's own, at the tokens that count."""
        bundles = []
        for query, prompt, group in zip(queries, prompts, sampled, strict=True):
            shared = {"advantage": 1.0, "policy_version": 0, "prompt_tokens": len(prompt.token_ids)}
            bundles.append(Bundle(query, tuple(Sample(query, completion, **shared) for completion in group)))
        batch = pack(bundles, self.encoder.encode, self.encoder.pixels, self.policy.positions)
        gaps = batch.old_logps.double() - self.policy(batch)[0].double()
        assert batch.loss_mask.equal(batch.old_logps.isfinite())  # what was sampled counts, and nothing else
        return gaps[batch.loss_mask]


@pytest.fixture(scope="module")
def vllm(folder, tmp_path_factory):
    setting = Setting(folder, tmp_path_factory.mktemp("images"), "vllm")
    yield setting
    setting.engine.close()


def test_logprobs_equal_the_policys_before_and_after_every_sync(vllm, cell):
    """Law 1: with images and without, in vLLM as loaded and after two syncs, for images seen before each sync.

    Every tensor that vLLM computes with is compared with the policy's (rollout.check_sync).
    """
    errors = [vllm.error(seed=0)]
    for version in (1, 2):
        vllm.perturb(seed=version)
        vllm.engine.sync(Weights(vllm.policy), version)
        errors.append(vllm.error(seed=version))
    assert max(errors) < TOLERANCE
    cell("vLLM: nats", max(errors))


def test_logprobs_equal_the_policys_over_turns_with_images(vllm, cell):
    """Laws 1 and 6: three turns, of which the second and the third follow images that the first prompt did not have,
    behind a prompt with one image, with two, and without. Images that change places, or positions that pass them over,
    are seen."""
    vllm.engine.sync(Weights(vllm.policy), 2)
    responses = vllm.turns(vllm.prompts, seed=0)
    gap = vllm.compare(vllm.queries, vllm.prompts, responses).abs().max().item()
    assert gap < TOLERANCE
    cell("turns: nats", gap)
    plain = vllm.policy.positions
    with patch.object(
        vllm.policy,
        "positions",
        lambda prompt, images: torch.arange(len(plain(prompt, images)[0])).expand(len(plain(prompt, images)), -1),
    ):
        moved = vllm.compare(vllm.queries, vllm.prompts, responses).abs().max().item()
    assert moved > 1e-3 or not vllm.policy.family.MROPE
    for one in chain.from_iterable(responses):
        first, second = one.observed
        one.observed = replace(first, images=second.images), replace(second, images=first.images)
    assert vllm.compare(vllm.queries, vllm.prompts, responses).abs().max() > 1e-3


@pytest.mark.parametrize("part", ["language model", "vision"])
def test_a_missed_sync_is_seen(vllm, part):
    """The comparison above is able to fail: by the vision part or the language model of an older version."""
    vllm.engine.sync(Weights(vllm.policy), 3)
    vllm.perturb(seed=3, part=part)
    assert vllm.error(seed=3) > 1e-3
    vllm.engine.sync(Weights(vllm.policy), 4)
    assert vllm.error(seed=3) < TOLERANCE


def test_turned_photos_agree_and_a_tag_that_stays_trips_the_ceiling(vllm):
    """Law 1 for photos that EXIF turns. Had the engine got them with their tag, mismatch_kl would be above the default
    ceilings of both types."""
    photos = [oriented(6, "JPEG", Image.fromarray(noise(64, 64, seed=seed))) for seed in range(4)]
    queries = [Query(f"{n}", f"what is shape {n}?", "", ({"bytes": photo},)) for n, photo in enumerate(photos)]
    prompts = [vllm.encoder.encode(query) for query in queries]
    vllm.engine.sync(Weights(vllm.policy), 5)
    assert vllm.gaps(queries, prompts, seed=0).abs().max() < TOLERANCE
    gaps = vllm.gaps(queries, list(map(tagged, prompts)), seed=0)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(MismatchError, match="sees other images"):
            check_mismatch(float((gaps.expm1() - gaps).mean()), Config(policy=PolicyConfig(dtype=dtype)))


def test_transformers_rollouts_agree_too(folder, tmp_path):
    """Law 1 for rollout.backend=hf, before and after a sync."""
    hf = Setting(folder, tmp_path, "hf")
    errors = [hf.error(seed=0)]
    hf.perturb(seed=1)
    hf.engine.sync(Weights(hf.policy), 1)
    errors.append(hf.error(seed=1))
    assert max(errors) < TOLERANCE


@pytest.mark.parametrize(("family", "builder"), [("qwen3_5", GDNBuilder), ("lfm2_vl", ShortConvBuilder)])
def test_a_prompt_that_is_read_in_parts_goes_on_from_its_state(family, builder, tmp_path, monkeypatch):
    """Law 1 of recurrent layers where vLLM computes a prompt in several steps, beside others."""
    monkeypatch.setattr(vllm_engine, "engine_arguments", in_parts)
    setting = Setting(create(family, tmp_path / "model"), tmp_path, "vllm")
    begun, build = [], builder.build

    def record(self, *given, **named):
        made = build(self, *given, **named)
        states = getattr(made, "has_initial_state", getattr(made, "has_initial_states_p", None))
        begun.extend([] if states is None else states.tolist())
        return made

    monkeypatch.setattr(builder, "build", record)
    setting.queries = [Query(f"{n}", "what is two and two, and what is three? " * n, "4") for n in (1, 5, 9)]
    setting.prompts = [setting.encoder.encode(query) for query in setting.queries]
    assert setting.error(seed=0) < TOLERANCE
    assert any(begun)
    setting.engine.close()


def test_a_server_has_recurrent_layers(tmp_path):
    """Law 1 of linear attention on a vLLM server, which reads prompts whole on a CPU, before and after a sync."""
    folder = create("qwen3_5", tmp_path / "model")
    config = rollout_config()
    config.data.min_pixels, config.data.max_pixels = 1024, 8192
    config.data.max_images, config.rollout.max_new_tokens = 4, 512
    served = Served(folder, tmp_path / "log", config)
    try:
        setting = Setting(folder, tmp_path, "server", servers=[served.address()])
        setting.engine.sync(Weights(setting.policy), 0)
        errors = [setting.error(seed=0)]
        setting.perturb(seed=1)
        setting.engine.sync(Weights(setting.policy), 1)
        errors.append(setting.error(seed=1))
        setting.engine.close()
    finally:
        served.close()
    assert max(errors) < TOLERANCE


def in_parts(*given, **named):
    """An engine's arguments, and no more than 64 tokens in a step."""
    return engine_arguments(*given, **named) | {"max_num_batched_tokens": 64, "max_num_seqs": 8}


def test_values_that_are_a_layers_keys_are_compared_too(tmp_path, monkeypatch):
    """rollout.check_sync: a checkpoint has such keys once, and vLLM twice."""
    setting = Setting(create("gemma4", tmp_path / "model"), tmp_path, "vllm")
    layers, unpacked = setting.engine._in_model(lambda model, _: dict(model.named_modules())), vllm_weights._unpacked
    (fused,) = (layer for name, layer in layers.items() if name.endswith("model.layers.1.self_attn.qkv_proj"))
    setting.engine.sync(Weights(setting.policy), 1)

    def damaged(layer, leaf, *how, **named):
        found = unpacked(layer, leaf, *how, **named).clone()
        if layer is fused:
            found[-1, -1] += 1e-6  # of the last value head
        return found

    monkeypatch.setattr(vllm_weights, "_unpacked", damaged)
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.k_proj\.weight differs"):
        setting.engine.sync(Weights(setting.policy), 2)
    setting.engine.close()


def test_images_longer_than_a_window_are_refused_on_a_cpu(tmp_path):
    """Before vLLM starts, in one line: its CPU kernel takes none."""
    folder, config = create("gemma4", tmp_path / "model"), rollout_config(backend="vllm")
    config.data.max_pixels = 36000
    with pytest.raises(ConfigError, match=r"^data.max_pixels=36000 allows images of 140 tokens, .* windows of 80; set"):
        make_engine(config, str(folder), rank=0, world_size=1, local_rank=0)


def test_an_image_as_long_as_a_window(tmp_path):
    """Law 1 at the bound: vLLM's CPU kernel takes it, and every token sees all of its image."""
    folder = create("gemma4", tmp_path / "model")
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["sliding_window"] = 70
    (folder / "config.json").write_text(json.dumps(content))
    setting = Setting(folder, tmp_path, "vllm")
    wide = {"bytes": saved(Image.fromarray(noise(160, 112)))}
    setting.queries.append(Query("wide", "what is it?", "", (wide,)))
    setting.prompts.append(setting.encoder.encode(setting.queries[-1]))
    assert setting.prompts[-1].token_ids.count(setting.policy.image_token_id) == 70
    assert setting.error(seed=0) < TOLERANCE
    setting.engine.close()
