"""Attention over segments equals attention under a mask: outputs and every gradient, whatever the row holds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rethinker.policy import segment_attention
from rethinker.policy.attention import VISION, lay_out, row_attention
from rethinker.policy.segment_attention import Segments, Visible, attend, moved
from rethinker_kernels.merge_attention import merge_attention

# (tokens of a prompt, input tokens of its responses), one per prompt
ROWS = {
    "many": [(7, [3, 0, 1, 30]), (1, [5]), (40, [16, 16]), (9, [])],
    "one token each": [(1, [1])],
    "prompts of one token": [(1, [0]), (1, [2]), (1, [])],
    "no response token": [(4, []), (3, [0])],
    "no answer first": [(3, []), (2, [1, 1])],
    "one group of one": [(6, [8])],
    "of about the same lengths": [(7, [3, 9]), (5, [11]), (6, [4, 4, 4])],
}
BOUNDS = {torch.float32: 1e-5, torch.float64: 1e-12}


def row(groups) -> SimpleNamespace:
    """What a layout reads of a packed batch."""
    prompt, response = [], []
    for number, (asked, answered) in enumerate(groups):
        prompt += [number] * (asked + sum(answered))
        response += [0] * asked + [r for r, length in enumerate(answered, start=1) for _ in range(length)]
    return SimpleNamespace(prompt_id=torch.tensor(prompt), response_id=torch.tensor(response), tokens=len(prompt))


def mask_of(batch) -> torch.Tensor:
    """The rule of shared prompts, [T, T]."""
    p, r = batch.prompt_id, batch.response_id
    before = torch.ones(batch.tokens, batch.tokens, dtype=torch.bool).tril()
    return before & (p[:, None] == p) & ((r == 0) | (r[:, None] == r))


def masked(q, k, v, mask, scale):
    """Attention by its definition."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihe,jhe->hij", q, k) * scale
    return torch.einsum("hij,jhe->ihe", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def inputs(tokens, heads, key_heads, size, dtype, device="cpu"):
    """q, k, v and the gradient of the output."""
    generator = torch.Generator().manual_seed(tokens)
    made = (torch.randn(tokens, h, size, generator=generator) for h in (heads, key_heads, key_heads, heads))
    return [x.to(device, dtype) for x in made]


def results(function, q, k, v, gradient):
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def largest_error(found, expected):
    return max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))


def shared_error(groups, dtype, heads=6, key_heads=2) -> float:
    """Of the output and the gradients, against the mask."""
    batch = row(groups)
    given = inputs(batch.tokens, heads, key_heads, 16, dtype)
    visible = lay_out(batch, "flash").visible
    found = results(lambda q, k, v: attend(q, k, v, visible, 0.3), *given)
    return largest_error(found, results(lambda q, k, v: masked(q, k, v, mask_of(batch), 0.3), *given))


@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("groups", ROWS.values(), ids=ROWS)
def test_shared_prompts_equal_the_mask(groups, dtype, heads):
    """Outputs and gradients of q, k and v to 1e-5 in fp32 and 1e-12 in fp64, with as many key heads and with fewer."""
    assert shared_error(groups, dtype, *heads) <= BOUNDS[dtype]


def share_equally(out, lse, other, other_lse, rows):
    out[rows] = (out[rows] + other[rows]) / 2
    lse[:, rows] = torch.logaddexp(lse[:, rows], other_lse[:, rows])


def keep_the_sums(out, lse, other, other_lse, rows):
    merge_attention(out, lse.clone(), other, other_lse, rows)


FAULTS = {
    "parts weigh the same": (segment_attention, "merge_attention", share_equally),
    "backward of unmerged sums": (segment_attention, "merge_attention", keep_the_sums),
    "no gradient of shared keys": (torch.Tensor, "index_add_", lambda self, *_: self),
    "padding keys are seen": (segment_attention, "_padding_mask", lambda *_: None),
    "padding is not told apart": (torch.Tensor, "masked_fill", lambda self, mask, value: self),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_faults_are_seen(fault, monkeypatch):
    """The comparison above is able to fail."""
    monkeypatch.setattr(*fault)
    assert not shared_error(ROWS["of about the same lengths"], torch.float64) < 1e-3


def test_log_sums_are_as_merging_wants_them():
    """[H, T] contiguous: the Triton half of merge_attention, in its interpreter, too, counts on it."""
    lengths = torch.tensor([3, 5])
    q, k, v, _ = inputs(8, 4, 2, 16, torch.float32)
    out, lse = segment_attention._cpu_forward(q, k, v, Segments.of(lengths, lengths), True, 0.3)
    assert (out.shape, lse.shape) == ((8, 4, 16), (4, 8)) and out.is_contiguous() and lse.is_contiguous()


def test_segments_of_about_the_same_lengths_share_a_call():
    """However many segments a row has, the CPU's kernel is called for a few lengths, and at most a quarter of a
    segment, or 7 tokens, is padding; every token of a segment that has queries and keys is in one call."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randint(0, high, (1000,), generator=generator) for high in (97, 33))
    padded = Segments.of(queries, keys).padded
    assert len(padded) <= 10 * 4  # to 8, 16, 24, 32, 40, 48, 56, 64, 80, 96 queries and 8, 16, 24, 32 keys
    for side, lengths in enumerate((queries, keys)):
        of_call = [call[side] for call in padded]
        assert all(((~call.real).sum(1) <= (call.real.sum(1) / 4).clamp(min=7)).all() for call in of_call)
        starts, both = lengths.cumsum(0) - lengths, (queries > 0) & (keys > 0)
        expected = [torch.arange(a, a + n) for a, n in zip(starts[both], lengths[both], strict=True)]
        found = torch.cat([call.into[call.real.flatten()] for call in of_call])
        assert found.sort().values.tolist() == torch.cat(expected).tolist()


def test_images_and_windows_see_themselves():
    """Without causality each segment is an ordinary bidirectional attention of its own."""
    lengths = torch.tensor([4, 1, 16, 7])
    q, k, v, gradient = inputs(28, 4, 4, 8, torch.float64)
    visible = Visible(Segments.of(lengths, lengths), causal=False)
    number = torch.arange(4).repeat_interleave(lengths)
    expected = results(lambda *x: masked(*x, number[:, None] == number, 0.5), q, k, v, gradient)
    found = results(lambda *x: attend(*x, visible, 0.5), q, k, v, gradient)
    assert largest_error(found, expected) <= 1e-12


def test_sixteen_bits_are_as_exact_as_plain_pytorch():
    """In bf16 on a CPU the errors against fp64 are at most those of the definition in bf16: sums are fp32 inside."""
    batch = row(ROWS["many"])
    given = inputs(batch.tokens, 6, 2, 16, torch.bfloat16)
    assert_as_exact(batch, given, factor=1.0)


def assert_as_exact(batch, given, factor: float) -> None:
    """Relative errors of the output and each gradient against fp64 within a factor of plain PyTorch's."""
    device, mask = given[0].device, mask_of(batch).to(given[0].device)
    visible = moved(lay_out(batch, "flash").visible, device)
    exact = results(lambda *x: masked(*x, mask, 0.3), *(x.double() for x in given))
    plain = results(lambda *x: masked(*x, mask, 0.3), *given)
    found = results(lambda *x: attend(*x, visible, 0.3), *given)
    for name, ours, theirs, right in zip(("out", "dq", "dk", "dv"), found, plain, exact, strict=True):
        error, usual = ((x.double() - right).norm() / right.norm() for x in (ours, theirs))
        assert error <= factor * usual, (name, error, usual)


def test_windows_of_a_row_are_one_call(monkeypatch):
    """As transformers hands a vision tower's row over: all windows at once, by their bounds."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    q, k, v, _ = inputs(12, 2, 2, 8, torch.float32)
    given = [x.transpose(0, 1)[None] for x in (q, k, v)]
    bounds = torch.tensor([0, 4, 12], dtype=torch.int32)
    out, _ = ALL_ATTENTION_FUNCTIONS[VISION](
        None, *given, attention_mask=None, scaling=0.5, cu_seq_lens_q=bounds, max_length_q=8, is_causal=False
    )
    own = Segments(bounds, bounds, 8, 8)
    expected, _ = row_attention(None, *given, None, scaling=0.5, visible=Visible(own, causal=False))
    assert out.shape == (1, 12, 2, 8) and torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "groups",
    [*ROWS.values(), [(300, [130, 1, 257, 0]), (1, [129]), (128, [128] * 3), (77, [])], [(1, [1]), (1, [1])]],
    ids=[*ROWS, "longer than a tile", "one token each, twice"],
)
def test_flash_kernels_are_as_exact_as_plain_pytorch(groups, dtype):
    """On a GPU, in 16 bits, with 128 and with 64 entries a head: errors against fp64 at most 1.5 times those of plain
    PyTorch.

    Where prompts have one token, queries see so few keys that their gradients all but cancel. Flash attention takes
    what they cancel against from the rounded output, plain PyTorch from its own sums: 2.5 times there.
    """
    batch, factor = row(groups), 2.5 if all(prompt == 1 for prompt, _ in groups) else 1.5
    for size, heads in ((128, (28, 4)), (64, (8, 8))):
        assert_as_exact(batch, inputs(batch.tokens, *heads, size, dtype, "cuda"), factor)


@pytest.mark.gpu
def test_attention_does_not_wait_for_the_gpu():
    """Layout, forward and backward are queued: nothing in them asks the device for an answer."""
    batch = row(ROWS["many"])
    given = inputs(batch.tokens, 8, 2, 64, torch.bfloat16, "cuda")
    visible = moved(lay_out(batch, "flash").visible, torch.device("cuda"))
    results(lambda *x: attend(*x, visible, 0.3), *given)  # compiled and loaded
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        visible = moved(lay_out(batch, "flash").visible, torch.device("cuda"))
        results(lambda *x: attend(*x, visible, 0.3), *given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
