"""merge_attention: attention over two sets of keys, from the results over each."""

from __future__ import annotations

import torch
from torch import Tensor

from rethinker_kernels.devices import takes_triton


def merge_attention(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, rows: Tensor) -> None:
    """Make `out` and `lse`, in place, those over both sets of keys, for some queries.

        merged = torch.logaddexp(lse, other_lse)
        out = exp(lse - merged) * out + exp(other_lse - merged) * other
        lse = merged

    The other queries keep theirs, and what `other` says of them is not read. One launch on a GPU, fp32 inside.

    Args:
        out: [T, H, E], last dimension contiguous: attention of T queries over one set of keys.
        lse: [H, T] contiguous fp32 (fp64 of fp64): log-sum-exps of its scores.
        other, other_lse: the same over the other set, which must hold no key of the first.
        rows: [R] int64, different from each other: the queries that see keys of both sets.
    """
    if takes_triton(out):
        from rethinker_kernels.triton_kernels.merge_attention import merge_attention

        merge_attention(out, lse, other, other_lse, rows)
        return
    mine, theirs = (part.index_select(1, rows) for part in (lse, other_lse))  # [H, R]; a fifth of indexing's time
    merged = torch.logaddexp(mine, theirs)
    share, rest = ((part - merged).exp().t()[..., None] for part in (mine, theirs))  # [R, H, 1]
    both = share * out.index_select(0, rows) + rest * other.index_select(0, rows)
    out.index_copy_(0, rows, both.to(out.dtype))
    lse.index_copy_(1, rows, merged)
