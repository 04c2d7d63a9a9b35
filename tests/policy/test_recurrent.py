"""Recurrent layers read a packed row as if every response stood behind a prompt of its own: law 2 by itself, in fp64,
and each way that a state may leak."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rethinker.policy.recurrent import Runs, Sequences, sequences_of
from rethinker.policy.segment_attention import moved
from rethinker.samples import PackedBatch
from tests.families.tiny_models import create
from tests.policy.helpers import queries_of_every_kind, samples_for
from tests.policy.switches import make
from tests.policy.test_packing import compare
from tests.policy.test_segment_attention import row

TAIL = 3
H, E = 2, 4


def rule(q, k, v, g, beta, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None):
    """The gated delta rule (arXiv 2412.06464, eq. 10), token by token in the inputs' type; by bounds, run by run."""
    if cu_seqlens is not None:
        runs = list(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False))
        begun = [None] * len(runs) if initial_state is None else initial_state.split(1)
        parts = [
            rule(*(x[:, a:b] for x in (q, k, v, g, beta)), initial_state=start)
            for (a, b), start in zip(runs, begun, strict=True)
        ]
        return torch.cat([out for out, _ in parts], dim=1), torch.cat([state for _, state in parts])
    state = q.new_zeros(len(q), H, E, E) if initial_state is None else initial_state
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        change = (v[:, t] - torch.einsum("nhe,nhev->nhv", k[:, t], state)) * beta[:, t, :, None]
        state = state + k[:, t, :, :, None] * change[:, :, None]
        out.append(torch.einsum("nhe,nhev->nhv", q[:, t], state))
    return torch.stack(out, dim=1), state


def layer(x, weight):
    """What a linear-attention layer computes of inputs [T, C] in `recur` and `convolve`: q, k, v, g and beta."""
    parts = x.split([H * E] * 3 + [H, H], dim=-1)
    q, k, v = (part.unflatten(-1, (H, E)) for part in parts[:3])
    return {"q": q, "k": F.normalize(k, dim=-1), "v": v, "g": F.logsigmoid(parts[3]), "beta": parts[4].sigmoid()}


def convolution(weight, seen):
    """[1, C, X] to the same shape, causal."""
    return F.conv1d(F.pad(seen, (TAIL, 0)), weight[:, None], groups=len(weight))


def packed_outputs(sequences: Sequences, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return sequences.recur(rule, **layer(sequences.convolve(x, partial(convolution, weight)), weight))


def own_outputs(batch: PackedBatch, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same of every prompt, and of every response behind a prompt of its own."""
    out = torch.empty(len(x), H, E, dtype=x.dtype)
    for prompt in batch.prompt_id.unique():
        of_prompt = batch.prompt_id == prompt
        asked = of_prompt & (batch.response_id == 0)
        for response in batch.response_id[of_prompt].unique():
            own = of_prompt & (batch.response_id == response)
            whole = torch.cat([x[asked], x[own]]) if response else x[own]
            mixed = convolution(weight, whole.t()[None])[0].t()
            parts = {name: part[None] for name, part in layer(mixed, weight).items()}
            out[own] = rule(**parts)[0][0, -int(own.sum()) :]
    return out


def inputs(batch: PackedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    width = 3 * H * E + 2 * H
    make = partial(torch.randn, generator=generator, dtype=torch.float64, requires_grad=True)
    return make(len(batch.prompt_id), width), make(width, TAIL + 1)


prompts = st.lists(st.tuples(st.integers(1, 90), st.lists(st.integers(1, 70), max_size=4)), min_size=1, max_size=4)


@pytest.mark.parametrize("padded", [True, False])
@settings(max_examples=25)
@given(lengths=prompts)
@example(lengths=[(40, [3]), (1, [4]), (2, [1, 5])])  # a short prompt behind a long one
def test_every_response_goes_on_from_its_own_prompt(padded, lengths):
    """Outputs and gradients equal those of every sequence by itself to fp64 rounding: prompts shorter than the
    convolution, prompts without responses, runs of many chunks; padded, and by bounds as on a GPU."""
    batch = row(lengths)
    x, weight = inputs(batch)
    sequences = sequences_of(batch, TAIL, padded=padded)
    expected, found = own_outputs(batch, x, weight), packed_outputs(sequences, x, weight)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    factor = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad((out * factor).sum(), (x, weight)) for out in (found, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def neighbours_state(sequences: Sequences) -> Sequences:
    """Every response starts from the prompt beside its own."""
    last = max(int(call.starts.max()) for call in sequences.calls if call.starts is not None)
    calls = (c if c.starts is None else replace(c, starts=(c.starts + 1) % (last + 1)) for c in sequences.calls)
    return replace(sequences, calls=tuple(calls))


def no_state(sequences: Sequences) -> Sequences:
    """Every response starts from nothing."""
    return replace(sequences, calls=tuple(replace(call, starts=None) for call in sequences.calls))


def no_tail(sequences: Sequences) -> Sequences:
    """A response's convolution sees zeros before it, as a prompt's does."""
    T, past = len(sequences.order), torch.ones_like(sequences.seen, dtype=torch.bool)
    past[sequences.own] = False
    return replace(sequences, seen=sequences.seen.masked_fill(past, T))


def neighbours_tail(sequences: Sequences) -> Sequences:
    """The convolution reads on over the bounds of the row, as it would without any."""
    T = len(sequences.order)
    behind = torch.arange(T)[:, None] - torch.arange(TAIL, 0, -1)
    seen = sequences.seen.clone()
    firsts = torch.nonzero(sequences.own.diff(prepend=torch.tensor([-1])) > 1)[:, 0]
    for first in firsts.tolist():
        at = int(sequences.own[first])
        seen[at - TAIL : at] = torch.where(behind[first] < 0, T, behind[first])
    return replace(sequences, seen=seen)


def padding_counts(sequences: Sequences) -> Sequences:
    """Padding changes the state that a prompt ends with."""
    calls = (replace(call, real=torch.ones_like(call.real)) for call in sequences.calls)
    order = sequences.order  # the same places: only the gates of padding differ
    return replace(sequences, calls=tuple(calls), order=order)


FAULTS = [neighbours_state, no_state, no_tail, neighbours_tail, padding_counts]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_leaks_are_seen(fault):
    """The comparison above is able to fail: by each way to lose or to mix what is before a response."""
    batch = row([(5, [4, 2]), (9, [3]), (7, [6, 1, 2])])
    x, weight = inputs(batch)
    sequences, expected = sequences_of(batch, TAIL, padded=True), own_outputs(batch, x, weight)
    torch.testing.assert_close(packed_outputs(sequences, x, weight), expected, rtol=1e-10, atol=1e-10)
    error = (packed_outputs(fault(sequences), x, weight) - expected).abs().max()
    assert error > 1e-2


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_a_model_with_linear_attention(fault, tmp_path, monkeypatch):
    """Law 2 of Qwen3.5 whole: three prompts of different lengths with four responses each, one image, two and none; and
    a leak moves its log-probs."""
    from rethinker.config import DataConfig
    from rethinker.data.prompts import PromptEncoder
    from rethinker.policy import attention
    from rethinker.policy.loading import load_model, load_processor

    folder = create("qwen3_5", tmp_path / "model")
    encoder = PromptEncoder(load_processor(folder), DataConfig(min_pixels=1024, max_pixels=8192))
    policy, model = make(folder), load_model(folder, torch.float32)
    model.load_state_dict(policy.hf.state_dict())
    samples = samples_for(queries_of_every_kind(tmp_path), encoder, [5, 1, 9, 3])
    if fault:
        monkeypatch.setattr(attention, "sequences_of", lambda *given, **kept: fault(sequences_of(*given, **kept)))
        assert compare(samples, encoder, policy, model)[0] > 1e-3
    else:
        logp_error, gradient_error = compare(samples, encoder, policy, model)
        assert logp_error <= 1e-5 and gradient_error <= 1e-5


def test_runs_of_about_the_same_length_are_read_together():
    """At most a quarter of a padded run is padding, or less than a chunk; without padding there are two calls."""
    lengths = [(3, [5] * 4), (900, [64, 65, 700, 130]), (70, [])]
    batch = row(lengths)
    padded, joined = (sequences_of(batch, TAIL, padded=kind) for kind in (True, False))
    assert len(joined.calls) == 2 and all(call.bounds is not None and call.real is None for call in joined.calls)
    for call in padded.calls:
        own = call.real.sum(1)
        assert ((call.real.shape[1] - own) <= torch.maximum(own // 3, torch.tensor(64))).all()
    runs = sum(1 + len(responses) for _, responses in lengths)
    assert sum(len(call.real) for call in padded.calls) == runs == 1 + 4 + 1 + 4 + 1
    assert isinstance(padded.calls[0], Runs) and padded.calls[0].starts is None


@pytest.mark.gpu
def test_the_gpus_kernels_equal_pytorchs():
    """flash-linear-attention's rule, by the bounds of runs and with their initial states, gives PyTorch's outputs and
    gradients of padded runs; so does the convolution."""
    from rethinker.families.qwen3_5 import library

    batch = row([(5, [4, 2]), (90, [3, 70]), (7, [6, 1, 2])])
    x, weight = (part.detach().float().cuda().requires_grad_() for part in inputs(batch))
    found = {}
    for on_gpu in (False, True):
        convolve, chunk_rule = library(on_gpu)
        sequences = moved(sequences_of(batch, TAIL, padded=not on_gpu), x.device)
        seen = sequences.convolve(x, partial(convolve, weight=weight, bias=None, activation="silu"))
        parts = layer(seen, weight)
        wide = {name: F.pad(parts[name], (0, 28)) for name in ("q", "k", "v")}  # heads of 32
        out = sequences.recur(partial(chunk_rule, use_qk_l2norm_in_kernel=True), **parts | wide)
        found[on_gpu] = out, *torch.autograd.grad(out.square().sum(), (x, weight))
    torch.testing.assert_close(found[True], found[False], rtol=1e-2, atol=1e-3)
