"""Laws 2, 4 and 5 in every family: packing equals the per-sample forward, whatever the batch holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from rethinker.config import ConfigError, LoraConfig, PolicyConfig
from rethinker.policy import attention
from rethinker.policy.loading import load_model
from rethinker.policy.lora import add_adapters
from rethinker.policy.model import Policy
from rethinker.policy.packing import pack
from tests.policy.helpers import late_image, observing, queries_of_every_kind, samples_for
from tests.policy.test_packing import assert_queued, compare, packed


def gradients(policy, batch):
    policy(batch)[0].sum().backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}


def without_deep(first, *deep):
    return [first, *(0.0 * part for part in deep)]


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
def test_packed_forward_equals_per_sample_forward(kernel, make_policy, model, encoder, tmp_path, cell):
    """Law 2: log-probs within 1e-5 and gradients within 1e-5 relative, with one image, two images and none, in the
    prompts and between the turns of responses."""
    if kernel == "flash" and make_policy().layers.masked:
        with pytest.raises(ConfigError, match="set policy.attention to sdpa"):
            make_policy(attention=kernel)
        return
    policy, queries = make_policy(attention=kernel), queries_of_every_kind(tmp_path)
    if policy.layers.window:
        queries.append(late_image(tmp_path))
    samples = samples_for(queries, encoder, [5, 1, 9, 3])
    samples[2], samples[7] = observing(samples[2], encoder, 3, 6), observing(samples[7], encoder, 2)
    logp_error, gradient_error = compare(samples, encoder, policy, model)
    assert logp_error <= 1e-5
    assert gradient_error <= 1e-5
    cell("shared prompts: nats", logp_error)
    cell("gradients", gradient_error)
    routers = policy.routers.values()
    cell("experts", ", ".join({f"{router.top_k} of {router.num_experts}" for router in routers}) or "dense")


@pytest.mark.parametrize(
    "fault",
    [
        *("no deepstack", "positions of a text", "images swapped", "causal images", "no windows"),
        *("inputs of other tokens", "no cap"),
    ],
)
def test_planted_faults_are_seen(fault, folder, make_policy, model, encoder, tmp_path, monkeypatch):
    """The comparison above is able to fail: by what an adapter may get wrong."""
    policy = make_policy()
    family, features, blocks = policy.family, policy.family.features, policy.layers.blocks
    capped = policy.hf.lm_head.softcap is not None
    if fault == "no deepstack":
        monkeypatch.setattr(family, "features", lambda *given: without_deep(*features(*given)))
    elif fault == "positions of a text":
        axes = 3 if family.MROPE else 1
        monkeypatch.setattr(family, "positions", lambda hf, ids, images: torch.arange(ids.shape[1]).expand(axes, -1))
    elif fault == "no cap":
        policy.hf.lm_head.softcap = None
    elif fault == "causal images":
        policy.layers = replace(policy.layers, blocks=())
    elif fault == "inputs of other tokens":
        given = family.token_inputs
        monkeypatch.setattr(family, "token_inputs", lambda *a: {k: v.roll(1, 0) for k, v in given(*a).items()})
    elif fault == "no windows":
        policy.layers = replace(policy.layers, window=policy.layers.window and 10**6)
    else:
        monkeypatch.setattr(family, "features", lambda *given: [part.flip(0) for part in features(*given)])
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [5, 9])
    (batch,), _ = packed(samples, encoder, policy)
    deep = len(features(policy.hf, batch.image_inputs)) > 1
    concerned = {"no deepstack": deep, "positions of a text": family.MROPE, "images swapped": True}
    concerned["inputs of other tokens"] = bool(family.token_inputs(policy.hf, *batch.input_ids, batch.response_id > 0))
    concerned |= {"no cap": capped, "causal images": bool(blocks), "no windows": policy.layers.window is not None}
    logp_error = compare(samples, encoder, policy, model)[0]
    assert logp_error > 1e-3 if concerned[fault] else logp_error <= 1e-5


def test_sampled_placeholders_are_ordinary_tokens(make_policy, encoder, tmp_path):
    """Law 4: placeholder ids inside a response stand for no image: the other responses' log-probs stay, to the bit."""
    policy = make_policy()
    placeholder = policy.image_token_id
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [6, 6])
    (batch,), _ = packed(samples, encoder, policy)
    expected, _ = policy(batch)
    for sample in samples[::2]:
        sample.completion.token_ids[1:4] = [placeholder] * 3
    (batch,), _ = packed(samples, encoder, policy)
    logps, entropy = policy(batch)
    (logps + entropy).sum().backward()
    assert logps.isfinite().all() and all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)
    assert torch.equal(logps.view(3, 2, 6)[:, 1], expected.view(3, 2, 6)[:, 1])  # [query, response, token]


@pytest.mark.parametrize("work", ["a text", "nothing"])
def test_a_batch_without_images_runs_every_module(work, make_policy, encoder, tmp_path):
    """Law 5: without images every module with weights runs as it does with them, and each weight has a gradient, or
    ZeRO-3's ranks would wait for each other; the log-probs are as if nothing had been seen."""
    policy = make_policy()
    ran: set[str] = set()
    for name, module in policy.hf.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    every = samples_for(queries_of_every_kind(tmp_path), encoder, [5])
    (batch,), _ = packed(every, encoder, policy)
    with_images = set(gradients(policy, batch)), frozenset(ran)
    ran.clear()
    policy.zero_grad()
    if work == "a text":
        (batch,), _ = packed([sample for sample in every if not sample.query.images], encoder, policy)
    else:
        batch = pack([], encoder.encode, encoder.pixels, policy.positions)
    assert not batch.image_inputs and len(batch.position_ids) == (3 if policy.family.MROPE else 1)
    found = gradients(policy, batch)
    assert (set(found), ran) == with_images
    for module in policy.family.vision_modules(policy.hf):
        assert not any(parameter.grad.any() for parameter in module.parameters())
    with torch.no_grad():
        expected, _ = policy(batch)
        for module in policy.family.vision_modules(policy.hf):
            for parameter in module.parameters():
                parameter.mul_(2.0)
        assert torch.equal(policy(batch)[0], expected)


def test_frozen_vision_has_no_gradient_and_changes_no_other(make_policy, encoder, tmp_path):
    """policy.freeze_vision: exactly the modules between pixels and image tokens have none; the rest is as before."""
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [5, 9])
    free, frozen = make_policy(), make_policy(freeze_vision=True)
    (batch,), _ = packed(samples, encoder, free)
    whole, rest = gradients(free, batch), gradients(frozen, batch)
    left_out = {
        name
        for name, parameter in frozen.named_parameters()
        if any(parameter is p for m in frozen.family.vision_modules(frozen.hf) for p in m.parameters())
    }
    assert left_out and whole.keys() - rest.keys() == left_out
    language = {
        id(p) for part in (frozen.family.language_model(frozen.hf), frozen.hf.lm_head) for p in part.parameters()
    }
    assert all(id(parameter) in language for name, parameter in frozen.named_parameters() if name in rest)
    torch.testing.assert_close({name: whole[name] for name in rest}, rest, rtol=1e-5, atol=1e-7)


def test_adapters_alone_have_gradients(folder, encoder, tmp_path, cell):
    """policy.lora: the log-probs are the plain policy's to the bit, and every adapter of the decoder layers, but
    nothing else, has a gradient: B at once, and A as soon as B is not zero."""
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [5, 9])
    plain = Policy(load_model(folder, torch.float32), PolicyConfig(dtype="float32")).eval()
    model, settings = load_model(folder, torch.float32), LoraConfig(rank=4)
    adapters = add_adapters(model, settings, seed=0)
    policy = Policy(model, PolicyConfig(dtype="float32", lora=settings)).eval()
    (batch,), _ = packed(samples, encoder, policy)
    assert torch.equal(policy(batch)[0], plain(batch)[0])
    for adapter in adapters.values():
        adapter.b.data.fill_(1e-3)
    layers = plain.family.language_model(plain.hf).layers
    assert len(adapters) == sum(isinstance(module, torch.nn.Linear) for module in layers.modules())
    trained = {id(p) for adapter in adapters.values() for p in (adapter.a, adapter.b)}
    gradients(policy, batch)
    assert {id(p) for p in policy.parameters() if p.grad is not None and p.grad.any()} == trained
    for layer in layers:
        cell("adapters a layer", sum(isinstance(module, torch.nn.Linear) for module in layer.modules()))


def test_gradient_checkpointing_recomputes(make_policy, encoder, tmp_path):
    """Every decoder and vision layer runs twice a step, in eval mode, and the gradients are the same."""
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [5, 9])
    found = {}
    for checkpointing in (False, True):
        policy = make_policy(gradient_checkpointing=checkpointing)
        layers = [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
        runs = [0]
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_, runs=runs: runs.__setitem__(0, runs[0] + 1))
        (batch,), _ = packed(samples, encoder, policy)
        found[checkpointing] = gradients(policy, batch)
        assert runs[0] == (1 + checkpointing) * len(layers) and len(layers) >= 5
    torch.testing.assert_close(found[True], found[False], rtol=1e-5, atol=1e-6)


def test_attention_is_one_call_a_layer(make_policy, encoder, tmp_path, monkeypatch):
    """policy.attention=flash: each decoder layer and each layer of a vision tower that has images or windows in one row
    attends to all of them at once; tiles of one size are a batch, and so are padded views: one call of SDPA."""
    policy, calls = make_policy(), []
    attend = attention.attend
    monkeypatch.setattr(attention, "attend", lambda q, *given: calls.append(q) or attend(q, *given))
    (batch,), _ = packed(samples_for(queries_of_every_kind(tmp_path), encoder, [5]), encoder, policy)
    policy(batch)
    types = getattr(policy.hf.config.get_text_config(), "layer_types", None) or ["full_attention"] * 3
    layers = types.count("full_attention")
    tower = [part for module in policy.family.vision_modules(policy.hf) for part in module.modules()]
    in_a_row = batch.image_inputs["pixel_values"].ndim == 2 and "spatial_shapes" not in batch.image_inputs
    seeing = sum(isinstance(part, GradientCheckpointingLayer) for part in tower) if in_a_row else 0
    patches = 4 * int((batch.input_ids == policy.image_token_id).sum())
    if policy.kernel == "sdpa":  # what masks tell (Gemma's) is SDPA's
        layers = 0
    assert [len(q) for q in calls[seeing:]] == [batch.tokens] * layers
    assert [len(q) for q in calls[:seeing]] == [patches] * seeing and (seeing > 0) == in_a_row


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu(folder, encoder, tmp_path):
    """From a batch on the host to its gradients everything is queued, images and DeepStack included."""
    policy = Policy(load_model(folder, torch.bfloat16), PolicyConfig()).eval().cuda()
    (batch,), _ = packed(samples_for(queries_of_every_kind(tmp_path), encoder, [5, 9]), encoder, policy)
    assert_queued(policy, batch)
    (text,), _ = packed(samples_for(queries_of_every_kind(tmp_path)[2:], encoder, [5, 9]), encoder, policy)
    assert_queued(policy, text)
