"""Which tokens see which: the shared-prompt mask, laid out for the attention kernel at hand.

Token i attends to token j iff j <= i, both belong to the same prompt, and j is in the prompt or in i's own response.
Legend: T tokens of the packed row; B rows of L tokens as the kernel sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rethinker.samples import PackedBatch

FLEX_BLOCK = 128  # FlexAttention's tile; rows padded to it share one compiled kernel


@dataclass
class Layout:
    """The packed row rearranged for the attention kernel.

    `index[b, l]` is the row position that stands at (b, l); padding repeats position 0 and attends to itself only.
    `position[t]` is where row token t went, in the flattened [B * L].
    """

    index: torch.Tensor  # [B, L] int64
    position: torch.Tensor  # [T] int64
    mask: Any  # [B, 1, L, L] bool for SDPA, a BlockMask for FlexAttention


def lay_out(batch: PackedBatch, kernel: str) -> Layout:
    """Arrange a packed batch for `kernel`: "flex" keeps one row, "sdpa" gives each prompt a row of its own.

    SDPA computes every masked pair too, so one row of T tokens would cost T^2; a row per prompt costs sum(L^2).
    Where prompts differ so much that padding would more than double the row, SDPA keeps the single row as well.
    """
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
        return Layout(index, position, _block_mask(prompt[0], response[0]))
    causal = torch.ones(width, width, dtype=torch.bool).tril()
    same_prompt = prompt[:, :, None] == prompt[:, None, :]
    shared = (response[:, None, :] == 0) | (response[:, :, None] == response[:, None, :])
    return Layout(index, position, (causal & same_prompt & shared)[:, None])


def _block_mask(prompt: torch.Tensor, response: torch.Tensor) -> Any:
    """The same predicate as a FlexAttention BlockMask: only blocks with a visible pair are computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompt, response = prompt.to(device), response.to(device)

    def visible(_batch, _head, i, j):
        return (i >= j) & (prompt[i] == prompt[j]) & ((response[j] == 0) | (response[j] == response[i]))

    n = len(prompt)
    return create_block_mask(visible, None, None, n, n, device=device, _compile=device == "cuda")
