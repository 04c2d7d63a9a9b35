"""Every model family can be planned: its parameters, its image tokens, and what a forward keeps."""

from __future__ import annotations

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from vllm.model_executor.models import ModelRegistry

from rethinker import families
from rethinker.config import ConfigError, DataConfig, PolicyConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.families import STRIP, SUPPORTED, Family, family_of
from rethinker.plan.build import Machine, make_plan
from rethinker.plan.memory import GIB, rollout_of
from rethinker.plan.model import shape_of
from rethinker.plan.step import Count, MicroBatch, count_step
from rethinker.policy.loading import load_model, load_processor
from rethinker.samples import Query
from rethinker.settings import resolve_config
from tests.families.tiny_models import FAMILIES, create
from tests.policy.helpers import picture
from tests.policy.switches import make

RECURRENT = [name for name in families.FAMILIES if type(family_of(name)).tail is not Family.tail]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return create(request.param, tmp_path_factory.mktemp(request.param))


def test_parameters_are_those_of_the_model(folder):
    """All of them, and those that policy.freeze_vision freezes."""
    policy = make(folder, freeze_vision=True)
    shape = shape_of(PolicyConfig(model=str(folder), freeze_vision=True))
    assert shape.parameters == sum(p.numel() for p in load_model(folder, torch.float32).parameters())
    assert shape.trained == sum(p.numel() for p in policy.parameters() if p.requires_grad) < shape.parameters


def test_keys_are_those_of_a_cache(folder):
    """The heads of each layer's keys, and their size, as transformers caches them; some layers keep none."""
    model = load_model(folder, torch.float32)
    with torch.no_grad():
        cache = model(input_ids=torch.full((1, 3), 5), use_cache=True).past_key_values
    keys = [layer.keys for layer in cache.layers if getattr(layer, "keys", None) is not None]
    shape = shape_of(PolicyConfig(model=str(folder)))
    assert shape.policy.family.cached(shape.text) == [(key.shape[1], key.shape[3]) for key in keys]


@pytest.mark.parametrize("pixels", [1024, 4096])
def test_image_tokens_are_those_of_a_prompt(pixels, folder, tmp_path):
    """Of an image as large as data.max_pixels, a square or (Gemma 4 has more for it) 10 by 7; InternVL's tiles and its
    view of the whole too."""
    encoder = PromptEncoder(load_processor(folder), DataConfig(min_pixels=pixels, max_pixels=pixels))
    side = int(pixels**0.5)
    shape = shape_of(PolicyConfig(model=str(folder)))
    images = picture(tmp_path, 0, (side, side)), picture(tmp_path, 1, (side * 5 // 4, side * 7 // 8))
    prompts = [encoder.encode(Query(image, "?", "!", (image,))).token_ids for image in images]
    assert max(ids.count(shape.config.image_token_id) for ids in prompts) == shape.image_tokens(pixels)


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_forward_keeps_what_is_planned(checkpointing, kernel, folder, cell):
    """Bytes of real tensors between the forward of a micro-batch and its loss are the planned ones to 5%: of the
    language model and of the vision tower."""
    settings = PolicyConfig(model=str(folder), dtype="float32", attention=kernel, gradient_checkpointing=checkpointing)
    if kernel == "flash" and make(folder).layers.masked:
        with pytest.raises(ConfigError, match="set policy.attention to sdpa"):
            shape_of(settings)
        return
    batch = MicroBatch(tokens=512, rows=384, prompt=128, response=96, row=512, image_tokens=64)
    shape = shape_of(settings)
    policy = make(folder, attention=kernel, gradient_checkpointing=checkpointing)
    seen = []
    policy.hf.lm_head.forward = lambda rows, *_: (seen.append(count.bytes), rows)
    policy.family.language_model(policy.hf).register_forward_pre_hook(lambda *_: seen.append(count.bytes))
    place = torch.arange(batch.tokens)
    with torch.no_grad():  # whole images may have a few tokens more than are asked for
        images = shape.images(batch.image_tokens)
        images = {name: torch.zeros(part.shape) if part.is_meta else part for name, part in images.items()}
        shown, one = (len(policy.family.features(policy.hf, x)[0]) for x in (images, policy.family.blank(policy.hf)))
    assert batch.image_tokens <= shown < batch.image_tokens + max(one, STRIP)
    with Count("cpu") as count:
        images = shape.images(batch.image_tokens)
        packed = SimpleNamespace(
            tokens=batch.tokens,
            input_ids=torch.where(place < shown, policy.image_token_id, 0)[None],
            position_ids=place.expand(3 if policy.family.MROPE else 1, 1, -1).clone(),
            prompt_id=batch.places()[0],
            response_id=batch.places()[1],
            given=batch.places()[1] == 0,
            source_index=torch.arange(128, 512),
            target_ids=torch.zeros(384, dtype=torch.int64),
            experts=None,
            image_inputs={name: torch.randn(part.shape) if part.is_meta else part for name, part in images.items()},
        )
        _, kept = policy(packed)
    planned = count_step(shape, batch, chunk=0, bucket=0)
    vision, text = planned["activations, vision tower"], planned["activations, language model"]
    assert seen[0] == pytest.approx(vision, rel=0.05) and seen[1] - seen[0] == pytest.approx(text, rel=0.05)
    cell("memory, planned", abs((seen[1] / (vision + text)) - 1))
    del kept


def test_a_run_is_planned(folder):
    """On GPUs and on a CPU, every phase."""
    config = resolve_config("easy_vqa_cpu", {"policy.model": str(folder), "data.max_pixels": 4096})
    for machine in (Machine(8), Machine(0, host_memory=64 * GIB)):
        plan = make_plan(config, machine)
        assert not plan.problems and plan.batches.largest.image_tokens > 0
        assert all(size >= 0 for phase in plan.phases for size in phase.budget.values())


@pytest.mark.parametrize("family", RECURRENT)
def test_a_sequences_state_is_vllms(family, tmp_path):
    """What the plan counts for the recurrent layers of a sequence is as large as the tensors that vLLM keeps of it."""
    config = AutoConfig.from_pretrained(create(family, tmp_path))
    text = config.get_text_config()
    (name,) = config.architectures
    asked = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        model_config=SimpleNamespace(hf_config=config, hf_text_config=text),
        speculative_config=None,
    )
    shapes = ModelRegistry.models[name].load_model_cls().get_mamba_state_shape_from_config(asked)
    layers = sum(kind not in ("full_attention", "sliding_attention") for kind in text.layer_types)
    assert family_of(family).state(text, size=4) == 4 * layers * sum(map(math.prod, shapes)) > 0


def test_a_state_takes_room_beside_keys_and_values(tmp_path, monkeypatch):
    """Fewer sequences fit a cache if recurrent layers keep a state of each; keys are those of full attention alone."""
    config = resolve_config("easy_vqa_cpu", {"policy.model": str(create("qwen3_5", tmp_path))})
    shape = shape_of(config.policy)
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    found = rollout_of(config, shape, 1, None)
    token = 2 * 1 * shape.text.head_dim * 4  # one of three layers, one key head
    assert found.cache_tokens == config.rollout.kv_cache_gb * GIB / token
    monkeypatch.setattr(type(shape.policy.family), "state", lambda *_: found.cache_tokens * token / 2)
    assert rollout_of(config, shape, 1, None).waves > found.waves
    monkeypatch.setattr(type(shape.policy.family), "state", lambda *_: found.cache_tokens * token + longest)
    assert rollout_of(config, shape, 1, None).waves == 0


REFUSED = {
    ("mistral3", "sliding_window"): (24, "text_config.sliding_window is 24"),
    ("qwen3_5", "linear_num_value_heads"): (3, "linear_num_value_heads=3 is no multiple of linear_num_key_heads=2"),
    ("qwen3_5", "layer_types"): (["foo", "full_attention", "foo"], "no config.json could be read"),
    ("qwen3_vl_moe", "num_experts_per_tok"): (99, "choose 99 of 8 experts"),
    ("glm4v_moe", "n_group"): (3, "2 of 8 experts, in 1 of 3 groups; correct n_group and topk_group in its config"),
    ("glm4v_moe", "topk_group"): (3, "2 of 8 experts, in 3 of 2 groups"),
    ("glm4v_moe", "num_experts_per_tok"): (5, "5 of 8 experts, in 1 of 2 groups"),
    ("glm4v_moe", "n_group "): (0, "2 of 8 experts, in 1 of 0 groups"),
    ("gemma4-moe", "top_k_experts"): (0, "choose 0 of 8 experts"),
    ("gemma4-per_layer", "num_kv_shared_layers"): (5, "its num_kv_shared_layers=5 leaves none to share"),
    ("gemma4", "vision_config"): (None, "its config.json has no vision_config"),
    ("llava_onevision", "vision_feature_layer"): (-2, "its vision_feature_layer is -2; only -1 is supported"),
    ("llava_onevision", "image_grid_pinpoints"): (
        [[24, 24, 24]],
        "its image_grid_pinpoints must be a list of [height,",
    ),
    ("llava_onevision", "image_grid_pinpoints "): ([[30, 24]], "whole multiples of the side of a tile (24)"),
    ("llava_onevision", "image_grid_pinpoints  "): ([], "its image_grid_pinpoints must be a list"),
    ("gemma4", "final_logit_softcapping"): (0.0, "its final_logit_softcapping is 0.0; set a number above 0, or null"),
    ("gemma4", "use_bidirectional_attention"): (
        "all",
        "its use_bidirectional_attention is 'all'; only 'vision' and null are supported",
    ),
    ("gemma4-per_layer", "pad_token_id"): (3, "its pad_token_id is 3; vLLM has 0: set it so"),
    ("qwen3_vl", "hidden_size"): (96, "a step of the model that its config.json describes cannot be computed"),
}


@pytest.mark.parametrize(("family", "entry"), REFUSED)
def test_a_config_that_cannot_be_computed(family, entry, tmp_path):
    """It is one line that names what to correct."""
    (value, message), entry = REFUSED[family, entry], entry.strip()
    file = create(family, tmp_path) / "config.json"
    content = json.loads(file.read_text())
    part = content if entry in content else content["text_config"]
    part |= {entry: value} | ({"linear_num_key_heads": 2} if entry.startswith("linear") else {})
    file.write_text(json.dumps(content))
    config = resolve_config("easy_vqa_cpu", {"policy.model": str(tmp_path)})
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        make_plan(config, Machine(0, host_memory=64 * GIB))
    assert "\n" not in str(refused.value)


def test_a_model_of_no_family(tmp_path):
    """It is an error that names its kind."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match=f"is a 'qwen2' model; supported: {SUPPORTED}"):
        shape_of(PolicyConfig(model=str(tmp_path)))
