"""Shared-prompt packing equals the per-sample forward (law 2), whatever the batch holds (laws 4 and 5)."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rethinker.config import AlgorithmConfig, ConfigError, PolicyConfig
from rethinker.policy import attention
from rethinker.policy.loading import load_model
from rethinker.policy.model import Policy
from rethinker.policy.packing import pack, plan_micro_batches
from rethinker.samples import Bundle, Completion, Prompt, Query, Rethought, Sample
from rethinker.settings import load_config

from .helpers import per_sample_logps, queries_of_every_kind, samples_for


def packed(samples, encoder, policy, budget=100_000):
    plan = plan_micro_batches(samples, budget=budget, world_size=1)
    return [pack(bundles, encoder.encode, encoder.pixels, policy.positions) for bundles in plan[0]], plan[0]


def compare(samples, encoder, policy, model):
    """Largest log-prob error, and largest relative gradient error over all parameters, packed against per-sample."""
    (batch,), (bundles,) = packed(samples, encoder, policy)
    logps, _ = policy(batch)
    weight = torch.randn(len(logps), generator=torch.Generator().manual_seed(0))
    (logps * weight).sum().backward()
    order = [s for bundle in bundles for s in bundle.samples]
    expected = torch.cat([per_sample_logps(model, encoder, s) for s in order])
    (expected * weight).sum().backward()
    theirs = dict(model.named_parameters())
    gradient_error = max(
        ((p.grad - theirs[name].grad).norm() / theirs[scale_of(name)].grad.norm().clamp(min=1e-6)).item()
        for name, p in policy.hf.named_parameters()
        if theirs[name].grad is not None
    )
    return (logps - expected).abs().max().item(), gradient_error


def scale_of(name):
    """The parameter whose gradient one is compared with: its own, but for a bias of keys that are not rotated. That
    changes all scores of a query alike, and so nothing: its gradient is rounding."""
    return name.replace("k_proj.bias", "v_proj.bias") if "vision" in name else name


@pytest.mark.parametrize(
    ("folder", "kernel"),
    [
        ("tiny_folder", "sdpa"),
        ("tiny_folder", "flash"),
        ("untied_folder", "sdpa"),
        pytest.param("untied_folder", "flash", marks=pytest.mark.soak),
    ],
)
def test_packed_forward_equals_per_sample_forward(folder, kernel, encoder, tmp_path, request):
    """Law 2: log-probs within 1e-5 and gradients within 1e-5 relative, with one image, two images and none."""
    path = request.getfixturevalue(folder)
    policy = Policy(load_model(path, torch.float32), PolicyConfig(dtype="float32", attention=kernel))
    model = load_model(path, torch.float32)
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [5, 1, 9, 3])
    logp_error, gradient_error = compare(samples, encoder, policy, model)
    assert logp_error <= 1e-5
    assert gradient_error <= 1e-5


@pytest.mark.parametrize("kernel", ["sdpa", "flash"])
def test_gradient_checkpointing_recomputes(kernel, tiny_folder, encoder, tmp_path):
    """With policy.gradient_checkpointing every decoder layer and vision block runs twice a step, in eval mode, without
    dropout; the gradients are the same."""
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [5, 9])
    found = {}
    for checkpointing in (False, True):
        config = PolicyConfig(dtype="float32", attention=kernel, gradient_checkpointing=checkpointing)
        policy = Policy(load_model(tiny_folder, torch.float32), config).eval()
        runs = [0]
        layers = [*policy.hf.model.language_model.layers, *policy.hf.model.visual.blocks]
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_, runs=runs: runs.__setitem__(0, runs[0] + 1))
        assert not any(module.training for layer in layers for module in layer.modules() if module is not layer)
        (batch,), _ = packed(samples, encoder, policy)
        policy(batch)[0].sum().backward()
        found[checkpointing] = runs[0] / len(layers), {n: p.grad for n, p in policy.named_parameters()}
    assert (found[False][0], found[True][0]) == (1, 2)
    torch.testing.assert_close(found[True][1], found[False][1], rtol=1e-5, atol=1e-6)


def test_a_batch_on_a_device_keeps_its_layout_on_the_host(encoder, policy, tmp_path):
    """What the layout reads never leaves the host: it would have to come back, and asynchronously at that."""
    (batch,), _ = packed(samples_for(queries_of_every_kind(tmp_path), encoder, [5]), encoder, policy)
    moved = batch.to("meta")
    kept = {name for name, value in vars(moved).items() if isinstance(value, torch.Tensor) and not value.is_meta}
    kept |= {name for name, value in moved.image_inputs.items() if not value.is_meta}
    assert kept == {"prompt_id", "response_id", "given", "image_grid_thw"}
    for kernel in ("sdpa", "flash"):
        attention.lay_out(moved, kernel)


@pytest.mark.gpu
def test_a_batch_goes_to_a_gpu_without_waiting(encoder, policy, tmp_path):
    """Packing never waits for the device, which computes the last batch meanwhile; the values arrive."""
    (batch,), _ = packed(samples_for(queries_of_every_kind(tmp_path), encoder, [5]), encoder, policy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = batch.to("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in vars(batch).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(moved, name).cpu(), value), name
    assert all(torch.equal(moved.image_inputs[name].cpu(), value) for name, value in batch.image_inputs.items())


def test_prompts_that_share_a_row_see_only_themselves(encoder, policy, tmp_path, monkeypatch):
    """Short prompts fill a row beside others; log-probs are those of a row each, and of one row for all."""
    queries = queries_of_every_kind(tmp_path)
    many = [dataclasses.replace(queries[2], id=f"text {i}") for i in range(4)]
    samples = samples_for(queries, encoder, [60]) + [
        dataclasses.replace(sample, group=sample.group + 3) for sample in samples_for(many, encoder, [2])
    ]
    (batch,), _ = packed(samples, encoder, policy)
    filled = attention.lay_out(batch, "sdpa")
    expected, _ = policy(batch)
    lengths = torch.bincount(batch.prompt_id).tolist()
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for rows, places in (
        (len(lengths), (list(range(len(lengths))), [0] * len(lengths))),
        (1, ([0] * len(lengths), starts)),
    ):
        monkeypatch.setattr(attention, "_fill_rows", lambda *_, places=places: places)
        assert attention.lay_out(batch, "sdpa").index.shape == (rows, max(lengths) if rows > 1 else sum(lengths))
        found, _ = policy(batch)
        assert (found - expected).abs().max() <= 1e-5
    assert filled.index.shape[0] < len(lengths)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_rows_are_filled_without_overlap(lengths):
    """Every piece lies within the width, apart from the others; no two rows would fit into one."""
    row, start = attention._fill_rows(lengths)
    width, taken = max(lengths), set()
    for length, at, begin in zip(lengths, row, start, strict=True):
        cells = {(at, column) for column in range(begin, begin + length)}
        assert not cells & taken and begin + length <= width
        taken |= cells
    filled = [sum(at == number for at, _ in taken) for number in range(max(row) + 1)]
    assert all(one + other > width for one, other in itertools.combinations(filled, 2))


def test_replayed_samples_see_their_groups_prompt(encoder, model, tiny_folder, tmp_path):
    """policy.attention=flash: replayed samples, also drawn twice, and groups of one, of text and of nothing but an
    empty response give the per-sample forward's log-probs and gradients."""
    one, two, text = queries_of_every_kind(tmp_path)
    samples = samples_for([one], encoder, [5, 9]) + samples_for([two], encoder, [1]) + samples_for([text], encoder, [7])
    empty = samples_for([dataclasses.replace(text, id="empty")], encoder, [0])
    policy = Policy(load_model(tiny_folder, torch.float32), PolicyConfig(dtype="float32", attention="flash"))
    logp_error, gradient_error = compare([*samples, samples[0], samples[0], *empty], encoder, policy, model)
    assert logp_error <= 1e-5 and gradient_error <= 1e-5


def test_flash_attention_takes_16_bits_on_a_gpu():
    """On CUDA fp32 is refused, naming policy.dtype, and auto takes SDPA for it; whatever else takes flash attention."""
    with pytest.raises(ConfigError, match="policy.attention=flash needs policy.dtype=bfloat16"):
        attention.kernel_for(PolicyConfig(dtype="float32", attention="flash"), True, attention.PLAIN)
    assert attention.kernel_for(PolicyConfig(dtype="float32", attention="flash"), False, attention.PLAIN) == "flash"
    chosen = {
        (dtype, on_gpu): attention.kernel_for(PolicyConfig(dtype=dtype), on_gpu, attention.PLAIN)
        for dtype in ("float32", "bfloat16")
        for on_gpu in (False, True)
    }
    assert [key for key, value in chosen.items() if value != "flash"] == [("float32", True)]
    assert chosen["float32", True] == "sdpa"


def test_removed_settings_are_refused():
    """What replaces them is named."""
    with pytest.raises(ConfigError, match="policy.attention='varlen' must be .*'flash'"):
        load_config("easy_vqa_cpu", {"policy.attention": "varlen"})
    with pytest.raises(ConfigError, match="'policy.fused_layers' is gone: .*policy.compile=true"):
        load_config("easy_vqa_cpu", {"policy.fused_layers": True})


@pytest.mark.gpu
def test_the_gpus_kernel_equals_the_default(tiny_folder, encoder, tmp_path):
    """Flash attention in bf16 is as far from fp32 as SDPA in bf16 is, or nearer."""
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [5, 1, 9])
    logps = {}
    for name, dtype in (("flash", "bfloat16"), ("sdpa", "bfloat16"), ("exact", "float32")):
        config = PolicyConfig(dtype=dtype, attention="sdpa" if name == "exact" else name)
        policy = Policy(load_model(tiny_folder, getattr(torch, dtype)), config).cuda()
        (batch,), _ = packed(samples, encoder, policy)
        with torch.no_grad():
            logps[name] = policy(batch.to(torch.device("cuda")))[0]
    error, usual = ((logps[name] - logps["exact"]).abs().mean() for name in ("flash", "sdpa"))
    assert error <= 1.5 * usual


def assert_queued(policy, batch):
    """Its second trip to the GPU, forward and backward never ask the device for an answer."""
    assert policy.kernel == "flash"
    policy(batch.to("cuda"))[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        policy(batch.to("cuda"))[0].sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu(tiny_folder, encoder, tmp_path):
    """From a batch on the host to its gradients everything is queued, the vision tower's windows included."""
    policy = Policy(load_model(tiny_folder, torch.bfloat16), PolicyConfig()).eval().cuda()
    (batch,), _ = packed(samples_for(queries_of_every_kind(tmp_path), encoder, [5, 9]), encoder, policy)
    assert_queued(policy, batch)
    (text,), _ = packed(samples_for(queries_of_every_kind(tmp_path)[2:], encoder, [5, 9]), encoder, policy)
    assert_queued(policy, text)


@pytest.mark.parametrize("fault", ["leak between responses", "position of the second response", "label shift"])
def test_planted_faults_are_seen(fault, encoder, policy, model, tmp_path, monkeypatch):
    """The comparison above is able to fail: each of three classic packing faults exceeds its bound."""
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [5, 9])
    original = pack

    def faulty(*args, **kwargs):
        batch = original(*args, **kwargs)
        if fault == "leak between responses":
            batch.response_id.clamp_(max=1)
        elif fault == "position of the second response":
            batch.position_ids[:, :, batch.response_id == 2] += 4
        else:
            batch.source_index[1:] = batch.source_index[:-1].clone()
        return batch

    monkeypatch.setitem(globals(), "pack", faulty)
    assert compare(samples, encoder, policy, model)[0] > 1e-3


def test_sampled_placeholders_are_ordinary_tokens(encoder, policy, tmp_path):
    """Law 4: placeholder ids inside a response stand for no image; forward and backward stay finite."""
    config = policy.hf.config
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [6])
    for sample in samples:
        sample.completion.token_ids[1:4] = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    (batch,), _ = packed(samples, encoder, policy)
    logps, entropy = policy(batch)
    logps.sum().backward()
    assert logps.isfinite().all() and entropy.isfinite().all()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


def test_empty_responses_and_single_samples(encoder, policy, model, tmp_path):
    """Law 5: an empty response adds a zero-length segment and nothing else; G = 1 packs like any group."""
    queries = queries_of_every_kind(tmp_path)
    samples = samples_for(queries, encoder, [0, 4])
    (batch,), _ = packed(samples, encoder, policy)
    assert (batch.cu_seqlens.diff() == 0).sum() == len(queries)
    assert len(batch.advantages) == len(samples) and len(batch.target_ids) == 4 * len(queries)
    logps, _ = policy(batch)
    expected = torch.cat([per_sample_logps(model, encoder, s) for s in samples if s.completion.tokens])
    ours = {tuple(s.completion.token_ids): None for s in samples}
    assert len(ours) > 1
    assert sorted((logps - 0).tolist()) == pytest.approx(sorted(expected.tolist()), abs=1e-5)
    alone = samples_for(queries[:1], encoder, [7])
    assert compare(alone, encoder, policy, model)[0] <= 1e-5


def test_a_rank_without_work_runs_a_weightless_row(encoder, policy):
    """A rank left without bundles gets a row that runs every module, images included, and counts for nothing."""
    batch = pack([], encoder.encode, encoder.pixels, policy.positions)
    assert batch.weights.tolist() == [0.0] and batch.loss_mask.tolist() == [False]
    called = []
    handle = policy.hf.model.visual.register_forward_hook(lambda *_: called.append(True))
    logps, _ = policy(batch)
    handle.remove()
    assert called and logps.isfinite().all()


def test_plan_is_balanced_bounded_and_complete(encoder, tmp_path):
    """Every sample is in one micro-batch, within the budget, the same number on every rank, loads within 10%."""
    queries = [dataclasses.replace(q, id=f"{q.id}/{n}") for n in range(20) for q in queries_of_every_kind(tmp_path)]
    samples = samples_for(queries, encoder, [5, 12, 30])
    for world in (1, 2, 3):
        plan = plan_micro_batches(samples, budget=600, world_size=world)
        assert len({len(rank) for rank in plan}) == 1
        flat = [s for rank in plan for micro in rank for bundle in micro for s in bundle.samples]
        assert sorted(map(id, flat)) == sorted(map(id, samples))
        loads = [sum(b.tokens for b in micro) for rank in plan for micro in rank]
        assert max(loads) <= 600
        per_rank = [sum(b.tokens for micro in rank for b in micro) for rank in plan]
        assert max(per_rank) <= 1.1 * min(per_rank)


def test_groups_beyond_the_budget_are_split(encoder, tmp_path):
    """A query whose responses exceed the budget together is split, each part with its own prompt; none is dropped."""
    (query, *_) = queries_of_every_kind(tmp_path)
    samples = samples_for([query], encoder, [40] * 8)
    prompt = samples[0].prompt_tokens
    plan = plan_micro_batches(samples, budget=prompt + 100, world_size=1)
    bundles = [b for micro in plan[0] for b in micro]
    assert len(bundles) == 4 and all(len(b.samples) == 2 and b.tokens == prompt + 78 for b in bundles)
    oversized = plan_micro_batches(samples, budget=10, world_size=2)
    assert sum(len(micro) for rank in oversized for micro in rank) == 8


def test_replayed_sample_joins_its_group(encoder, tmp_path):
    """A replayed sample whose query is in the batch shares that query's prompt, also when drawn twice."""
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [3, 4])
    plan = plan_micro_batches([*samples, samples[0], samples[0]], budget=10_000, world_size=1)
    (micro,) = plan[0]
    assert len(micro) == 3
    assert {b.query.id: len(b.samples) for b in micro} == {"one": 4, "two": 2, "text": 2}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("algorithm", [{}, {"rollout_correction": "token_truncate"}, {"top_entropy": 0.5}])
def test_a_row_is_what_its_responses_say_token_by_token(seed, algorithm):
    """Every tensor of a packed batch, built up one token at a time in plain Python: the same bits, with responses of
    any length, masked spans, -inf and NaN log-probs, importance and token weights, and the supervised term."""
    rng = np.random.default_rng(seed)
    prompts = {str(i): list(range(10 * i, 10 * i + 3 + i)) for i in range(4)}
    bundles = []
    for name, ids in prompts.items():
        samples = []
        for index, length in enumerate(rng.integers(0, 9, 3)):
            logprobs, scores = -rng.random((2, length)).astype(np.float32)
            logprobs[length // 2 :: 4] = (-np.inf, np.nan)[index % 2]
            rethought = Rethought(1, 3, "x", 0, 3) if length > 3 else None
            tokens = rng.integers(0, 150_000, length).tolist()
            kept = rng.random(length) < 0.5 if "top_entropy" in algorithm else None
            completion = Completion(tokens, logprobs.tolist(), "", "stop", rethought, scores.tolist(), kept)
            known = {"prompt_tokens": len(ids), "weight": float(rng.random()), "policy_version": index}
            samples.append(Sample(Query(name, "", ""), completion, float(rng.standard_normal()), **known))
        bundles.append(Bundle(samples[0].query, tuple(samples)))
    expected = {name: [] for name in "ids prompt response position source target old weight mask nll ends".split()}

    def put(**values):
        for name, value in values.items():
            expected[name].append(value)

    for number, bundle in enumerate(bundles):
        for place, token in enumerate(prompts[bundle.query.id]):
            put(ids=token, prompt=number, response=0, position=2 * place)
        last = len(expected["ids"]) - 1
        for r, sample in enumerate(bundle.samples, start=1):
            completion, source = sample.completion, last
            for i, token in enumerate(completion.token_ids.tolist()):
                span, old, factor = completion.rethought, completion.logprobs[i], 1.0
                forced = span is not None and span.trigger_start <= i < span.trigger_end
                if "top_entropy" in algorithm:
                    factor = (1.0 if forced or np.isfinite(old) else math.nan) * completion.kept[i]
                elif algorithm:
                    old, gap = completion.trainer_logprobs[i], completion.trainer_logprobs[i] - completion.logprobs[i]
                    factor = min(2.0, torch.tensor(gap).exp().item()) if np.isfinite(gap) else math.nan
                    factor = 1.0 if forced else factor
                    old = math.nan if math.isnan(factor) else old  # a fault is the log-prob's
                put(source=source, target=token, old=old, weight=sample.weight * factor)
                put(mask=span is None or not span.masked_start <= i < span.masked_end, nll=0.25 * (span is not None))
                source = len(expected["ids"])
                if i + 1 < completion.tokens:  # the last one is no input
                    put(ids=token, prompt=number, response=r, position=2 * place + 1 + i)
            put(ends=len(expected["target"]))
    batch = pack(
        bundles,
        lambda query: Prompt(query.id, prompts[query.id], [], []),
        lambda query: {},
        lambda prompt, images: 2 * torch.arange(len(prompt.token_ids)).expand(3, -1),
        policy_version=5,
        algorithm=AlgorithmConfig(**algorithm),
        nll_weight=0.25,
    )
    samples = [sample for bundle in bundles for sample in bundle.samples]
    pairs = {
        "input_ids": torch.tensor([expected["ids"]]),
        "position_ids": torch.tensor(expected["position"]).expand(3, 1, -1),
        "prompt_id": torch.tensor(expected["prompt"]),
        "response_id": torch.tensor(expected["response"]),
        "source_index": torch.tensor(expected["source"]),
        "target_ids": torch.tensor(expected["target"]),
        "old_logps": torch.tensor(np.array(expected["old"], np.float32)),
        "weights": torch.tensor(expected["weight"], dtype=torch.float32),
        "loss_mask": torch.tensor(expected["mask"]),
        "nll_weights": torch.tensor(expected["nll"], dtype=torch.float32),
        "cu_seqlens": torch.tensor([0, *expected["ends"]], dtype=torch.int32),
        "advantages": torch.tensor([s.advantage for s in samples], dtype=torch.float32),
        "age": torch.tensor([5 - s.policy_version for s in samples]),
    }
    for name, tensor in pairs.items():
        torch.testing.assert_close(getattr(batch, name), tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def test_bundle_counts_tokens_once_per_prompt(encoder, tmp_path):
    """A bundle's tokens are the prompt once plus each response without its last token: what the row really holds."""
    samples = samples_for(queries_of_every_kind(tmp_path)[:1], encoder, [5, 0, 1])
    bundle = Bundle(samples[0].query, tuple(samples))
    batch = pack([bundle], encoder.encode, encoder.pixels, lambda p, g: torch.arange(len(p.token_ids)).expand(3, -1))
    assert bundle.tokens == batch.tokens == samples[0].prompt_tokens + 4
