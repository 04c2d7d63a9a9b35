"""Adapters on a plain model: where they stand, what they amount to, and what is refused."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch

from rethinker.checks import lora_targets
from rethinker.config import ConfigError, LoraConfig, PolicyConfig
from rethinker.policy import lora
from rethinker.policy.loading import load_model
from rethinker.policy.lora import FullWeights
from rethinker.policy.model import Policy
from rethinker.policy.packing import pack, plan_micro_batches
from rethinker.settings import load_config, resolve_config
from tests.policy.helpers import queries_of_every_kind, samples_for

LINEARS = {
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
}


@pytest.fixture
def adapted(model):
    """The model and its adapters."""
    return model, lora.add_adapters(model, LoraConfig(rank=4), seed=0)


def train(adapters: dict[str, lora.Adapter]) -> None:
    """Give every B some value."""
    generator = torch.Generator().manual_seed(7)
    for adapter in adapters.values():
        adapter.b.data.copy_(0.05 * torch.randn(adapter.b.shape, generator=generator))


def logps(model, settings: PolicyConfig, encoder, folder, off: dict[str, lora.Adapter] | None = None) -> torch.Tensor:
    """Log-probs [R] of responses to all kinds of queries."""
    policy = Policy(model, settings).eval()
    samples = samples_for(queries_of_every_kind(folder), encoder, [5, 9])
    (bundles,) = plan_micro_batches(samples, budget=10_000, world_size=1)[0]
    batch = pack(bundles, encoder.encode, encoder.pixels, policy.positions)
    with torch.no_grad(), lora.reference_on(off or {}):
        return policy(batch)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_pefts_own(adapted, dtype):
    """The stream has the model's names, and W + (alpha / rank) B A to half a unit in the last place; peft's own merge,
    which rounds twice, is within one. The base weights stay as they were."""
    model, adapters = adapted[0].to(getattr(torch, dtype)), adapted[1]
    train(adapters)
    before = {name: p.detach().clone() for name, p in lora.base_parameters(model)}
    stream = FullWeights(lora.base_parameters(model), adapters)
    merged = {name: tensor.clone() for name, tensor in stream}
    assert {name: (d, tuple(s)) for name, d, s in stream.metadata()} == {
        name: (t.dtype, tuple(t.shape)) for name, t in merged.items()
    }
    assert all(torch.equal(p, before[name]) for name, p in lora.base_parameters(model))
    theirs = copy.deepcopy(model)
    for module in theirs.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    unit = torch.finfo(getattr(torch, dtype)).eps
    for name, parameter in lora.base_parameters(theirs):
        if name not in adapters:
            assert torch.equal(merged[name], before[name])
            continue
        a, b = adapters[name].a.double(), adapters[name].b.double()
        exact, update = before[name].double() + 8 * (b @ a), 8 * (b @ a)
        room = 2**-22 * (b.abs() @ a.abs() * 8 + before[name].abs())  # of fp32 sums before the rounding
        assert ((merged[name] - exact).abs() <= unit / 2 * exact.abs() + room).all(), name
        assert ((merged[name].double() - parameter.double()).abs() <= unit * (exact.abs() + update.abs()) + room).all()
        assert not torch.equal(merged[name], before[name])


def test_weights_are_gathered_many_at_a_time(adapted, monkeypatch):
    """A group has as many weights as GATHERED elements allow, or one that is larger, and its adapters' matrices."""
    import deepspeed

    model, adapters = adapted
    named = lora.base_parameters(model)
    gathered: list[list[int]] = []
    monkeypatch.setattr(lora, "GATHERED", limit := 40_000)
    monkeypatch.setattr(
        deepspeed.zero, "GatheredParameters", lambda group: gathered.append([*map(id, group)]) or nullcontext()
    )
    names = [name for name, _ in FullWeights(named, adapters)]
    assert names == [name for name, _ in named]
    sizes = {id(parameter): parameter.numel() for _, parameter in named}
    parts = {id(part) for adapter in adapters.values() for part in (adapter.a, adapter.b)}
    groups = [[sizes[i] for i in group if i not in parts] for group in gathered]
    assert [size for group in groups for size in group] == [sizes[id(parameter)] for _, parameter in named]
    assert all(sum(group) <= limit or len(group) == 1 for group in groups)
    assert all(sum(group) + after[0] > limit for group, after in pairwise(groups))
    assert max(map(sum, groups)) > limit and max(map(len, groups)) > 1
    for group in gathered:
        own = [adapters[name] for name, weight in named if id(weight) in group and name in adapters]
        assert {id(part) for adapter in own for part in (adapter.a, adapter.b)} == parts & {*group}


def test_nothing_changes_before_the_first_step(tiny_folder, adapted, encoder, tmp_path):
    """Log-probs with fresh adapters are the base model's, bit for bit; with trained ones they differ, switched off they
    are the base's again."""
    model, adapters = adapted
    settings = PolicyConfig(dtype="float32", lora=LoraConfig(rank=4))
    expected = logps(load_model(tiny_folder, torch.float32), PolicyConfig(dtype="float32"), encoder, tmp_path)
    assert torch.equal(logps(model, settings, encoder, tmp_path), expected)
    train(adapters)
    assert (logps(model, settings, encoder, tmp_path) - expected).abs().max() > 1e-3
    assert torch.equal(logps(model, settings, encoder, tmp_path, off=adapters), expected)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ([], LINEARS),
        (["q_proj", "mlp.up_proj"], {"self_attn.q_proj", "mlp.up_proj"}),
        (["gate_proj"], {"mlp.gate_proj"}),
    ],
)
def test_adapters_stand_in_the_language_model_alone(model, targets, expected):
    """Chosen layers of every decoder layer, never the vision tower's of the same name; all else is frozen."""
    adapters = lora.add_adapters(model, LoraConfig(rank=3, target_modules=targets), seed=0)
    layers = range(model.config.text_config.num_hidden_layers)
    assert set(adapters) == {f"model.language_model.layers.{i}.{name}.weight" for i in layers for name in expected}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(re.fullmatch(r"model\.language_model\.layers\..*\.lora_[AB]\.default\.weight", name) for name in trained)


def test_every_rank_draws_the_same(tiny_folder):
    """A is a matter of the seed alone, and drawing it leaves the process's random stream where it was."""
    drawn = []
    for process_seed, seed in ((1, 0), (2, 0), (1, 5)):
        torch.manual_seed(process_seed)
        state = torch.get_rng_state()
        adapters = lora.add_adapters(load_model(tiny_folder, torch.float32), LoraConfig(rank=4), seed)
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(torch.cat([adapter.a.flatten() for adapter in adapters.values()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_saved_adapters_come_back(adapted, tiny_folder, tmp_path):
    """A and B read back bit for bit."""
    adapters = adapted[1]
    train(adapters)
    state = {name: p.detach() for name, p in lora.adapter_parameters(adapters)}
    lora.save_weights(tmp_path / "adapter", state)
    again = lora.add_adapters(load_model(tiny_folder, torch.float32), LoraConfig(rank=4), seed=1)
    lora.load(again, tmp_path / "adapter")
    assert all(torch.equal(p, state[name]) for name, p in lora.adapter_parameters(again))


def test_a_layer_that_is_not_there_is_refused_before_anything_starts(tiny_folder, tmp_path):
    """Those that there are, are named: for a slip, for the vision tower's layers, for half a name."""
    for target in ("q_prj", "attn.qkv", "proj", "lm_head"):
        with pytest.raises(ConfigError, match=rf"policy\.lora\.target_modules: '{target}' is no .* have .*q_proj"):
            lora_targets(LINEARS, [target])
    options = {"policy.model": str(tiny_folder), "run.dir": str(tmp_path / "runs"), "policy.lora.rank": 4}
    assert load_config("easy_vqa_cpu", options | {"policy.lora.target_modules": ["v_proj", "mlp.up_proj"]})
    with pytest.raises(ConfigError, match="have .*up_proj"):
        load_config("easy_vqa_cpu", options | {"policy.lora.target_modules": ["up_porj"]})
    assert not (tmp_path / "runs").exists()


def test_settings_that_cannot_work():
    """A negative rank, no alpha, and layers without a rank are refused; 0 and null are off."""
    for options, words in (
        ({"policy.lora.rank": -1}, r"policy\.lora\.rank=-1 must be greater than or equal to 0"),
        ({"policy.lora.rank": 8, "policy.lora.alpha": 0.0}, r"policy\.lora\.alpha=0\.0 must be greater than 0"),
        ({"policy.lora.target_modules": ["q_proj"]}, r"target_modules=\['q_proj'\] needs policy\.lora\.rank"),
    ):
        with pytest.raises(ConfigError, match=words):
            resolve_config("easy_vqa_cpu", options)
    for off in (None, 0):
        assert not resolve_config("easy_vqa_cpu", {"policy.lora.rank": off}).policy.lora.rank
