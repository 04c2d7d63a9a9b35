"""Which tokens see which: the shared-prompt mask, laid out for the attention kernel at hand.

Token i attends to token j iff j <= i, both belong to the same prompt, and j is in the prompt or in i's own response.
Legend: T tokens of the packed row; B rows of L tokens as the kernel sees them; N sequences, H heads of size E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rethinker.samples import PackedBatch

FLEX_BLOCK = 128  # FlexAttention's tile; rows padded to it share one compiled kernel


VARLEN = "rethinker_varlen"  # transformers' name for `varlen_attention`


class Segments(NamedTuple):
    """Sequences behind one another in one row."""

    bounds: torch.Tensor  # [N + 1] int32: sequence n is the tokens bounds[n] to bounds[n + 1]
    longest: int


@dataclass
class Layout:
    """The packed row rearranged for the attention kernel.

    `index[b, l]` is the row position that stands at (b, l); padding repeats position 0 and attends to itself only.
    `position[t]` is where row token t went, in the flattened [B * L]; if it went to several places, one of them.
    """

    index: torch.Tensor  # [B, L] int64
    position: torch.Tensor  # [T] int64
    padding: torch.Tensor  # [B, L] bool
    mask: Any = None  # [B, 1, L, L] bool for SDPA, a BlockMask for FlexAttention
    segments: Segments | None = None  # for sequences of variable length, instead of a mask

    def to(self, device: torch.device) -> Layout:
        """On a device."""
        mask = None if self.mask is None else self.mask.to(device)
        segments = self.segments and self.segments._replace(bounds=self.segments.bounds.to(device))
        return Layout(self.index.to(device), self.position.to(device), self.padding.to(device), mask, segments)


def lay_out(batch: PackedBatch, kernel: str) -> Layout:
    """Arrange a packed batch for `kernel`: "flex" keeps one row, "sdpa" gives each prompt a row of its own, "varlen"
    gives each response a sequence of its own with a copy of its prompt.

    SDPA computes every masked pair too, so one row of T tokens would cost T^2; a row per prompt costs sum(L^2).
    Where prompts differ so much that padding would more than double the row, SDPA keeps the single row as well.
    """
    if kernel == "varlen":
        return _unshared(batch)
    T = batch.tokens
    lengths = torch.bincount(batch.prompt_id)
    longest = int(lengths.max())
    if kernel == "sdpa" and longest * len(lengths) <= 2 * T:
        rows, width = len(lengths), longest
        starts = torch.cumsum(lengths, 0) - lengths
    else:
        rows, width = 1, T if kernel == "sdpa" else -(-T // FLEX_BLOCK) * FLEX_BLOCK
        starts, lengths = torch.zeros(1, dtype=torch.int64), torch.tensor([T])
    column = torch.arange(width).expand(rows, width)
    valid = column < lengths[:, None]
    index = torch.where(valid, starts[:, None] + column, 0)
    prompt = torch.where(valid, batch.prompt_id[index], -1 - column)  # padding: a prompt of its own
    response = batch.response_id[index]
    position = torch.empty(T, dtype=torch.int64)
    position[index[valid]] = torch.arange(rows * width).view(rows, width)[valid]
    if kernel == "flex":
        return Layout(index, position, ~valid, _block_mask(prompt[0], response[0]))
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same_prompt = prompt[:, :, None] == prompt[:, None, :]
    shared = (response[:, None, :] == 0) | (response[:, :, None] == response[:, None, :])
    return Layout(index, position, ~valid, (causal & same_prompt & shared)[:, None])


def _unshared(batch: PackedBatch) -> Layout:
    """`[prompt][r1] [prompt][r2] ...`: ordinary causal sequences, for kernels that know no mask of pairs."""
    parts: list[torch.Tensor] = []
    for number in range(int(batch.prompt_id.max()) + 1):
        (own,) = torch.nonzero(batch.prompt_id == number, as_tuple=True)
        prompt, response = own[batch.response_id[own] == 0], batch.response_id[own]
        # A response of one token is predicted by its prompt and is no input.
        parts += [torch.cat([prompt, own[response == r]]) for r in response.unique().tolist() if r] or [prompt]
    lengths = torch.tensor([len(part) for part in parts])
    index = torch.cat(parts)
    last = torch.full((batch.tokens,), len(index))
    position = last.scatter_reduce(0, index, torch.arange(len(index)), "amin")  # of several places the first
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    index = index[None]
    return Layout(index, position, torch.zeros_like(index).bool(), segments=Segments(bounds, int(lengths.max())))


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    segments: Segments | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence: torch's flash-attention kernel on CUDA, sequence by sequence elsewhere.

    Args:
        query: [1, H, L, E].
        key, value: [1, H or a divisor of it, L, E].
        segments: of the L tokens.

    Returns:
        [1, L, H, E], and no attention weights.
    """
    bounds, longest = segments
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))
        out = varlen_attn(
            q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True
        )
        return out[None], None
    pieces = [part.split(bounds.diff().tolist(), dim=2) for part in (query, key, value)]
    outs = [
        scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*pieces, strict=True)
    ]
    return torch.cat(outs, dim=2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)


def _block_mask(prompt: torch.Tensor, response: torch.Tensor) -> Any:
    """The same predicate as a FlexAttention BlockMask: only blocks with a visible pair are computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt, response = prompt.to(device), response.to(device)

    def visible(_batch, _head, i, j):
        return (i >= j) & (prompt[i] == prompt[j]) & ((response[j] == 0) | (response[j] == response[i]))

    n = len(prompt)
    return create_block_mask(visible, None, None, n, n, device=device, _compile=device == "cuda")
