"""Recurrent layers over a packed row: every response goes on where its prompt has ended, exactly.

A recurrent layer (linear attention, a short convolution) reads tokens in their order. In a packed row
`[prompt][r1][r2]..` the prompt is read once; each response then starts from the prompt's last state, and its
convolution sees the prompt's last inputs, as if it stood behind a prompt of its own.

Legend: T tokens of the row, B rows of L tokens as the attention kernel sees them, N runs (prompts, or responses).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rethinker.samples import PackedBatch

CHUNK = 64  # tokens that kernels of linear attention read at once, and pad to


@dataclass(frozen=True)
class Runs:
    """Prompts, or responses, that are read in one call: each padded to A tokens, or one behind the other."""

    places: Tensor  # [N * A] int64 in the row of T tokens, or [all] without padding
    real: Tensor | None  # [N, A] bool: is no padding
    bounds: Tensor | None  # [N + 1] int64 from 0 to all: cu_seqlens, instead of padding
    bounds_on_host: np.ndarray | None
    starts: Tensor | None  # [N] int64: the prompt from whose last state each goes on, as the calls return them

    @property
    def mask(self) -> Tensor:
        """Of `places`: whether it is no padding."""
        return torch.ones_like(self.places, dtype=torch.bool) if self.real is None else self.real

    def of_row(self, x: Tensor) -> Tensor:
        """[T, ...] to [N, A, ...], or to [1, all, ...]; padding repeats a run's last token."""
        part = x.index_select(0, self.places)
        return part[None] if self.real is None else part.view(*self.real.shape, *x.shape[1:])

    def gates_of_row(self, x: Tensor) -> Tensor:
        """[T, H] likewise, but with 0 in padding."""
        part = self.of_row(x)
        return part if self.real is None else part.masked_fill(~self.real[..., None], 0.0)


@dataclass(frozen=True)
class Sequences:
    """The prompts and responses of a packed batch, for layers that read them in their order."""

    calls: tuple[Runs, ...]  # those of prompts before those of responses
    order: Tensor  # [T] int64: where each token's output is among those of all calls, one behind the other
    seen: Tensor  # [X] int64: places of the tokens that convolutions read, each run behind its past; T for none
    own: Tensor  # [T] int64: where each token stands among these
    index: Tensor | None = None  # [B, L] int64: Layout.index
    position: Tensor | None = None  # [T] int64: Layout.position

    def row(self, x: Tensor) -> Tensor:
        """[B, L, ...] as layers have it to the packed row [T, ...]."""
        x = x.flatten(0, 1)
        return x if self.position is None else x.index_select(0, self.position)

    def rows(self, x: Tensor) -> Tensor:
        """The packed row [T, ...] back to [B, L, ...]."""
        return x[None] if self.index is None else x[self.index]

    def convolve(self, x: Tensor, convolution: Callable[[Tensor], Tensor]) -> Tensor:
        """A causal convolution of the row.

        Args:
            x: [T, C].
            convolution: from [1, C, X] to the same shape; each output sees no more inputs of the past than the batch
                was laid out for.

        Returns:
            [T, C].
        """
        seen = torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, self.seen)
        return convolution(seen.t()[None])[0].t().index_select(0, self.own)

    def recur(
        self, rule: Callable[..., tuple[Tensor, Tensor]], q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor
    ) -> Tensor:
        """Linear attention [T, H, V] by a rule with the signature of flash-linear-attention's.

        Args:
            rule: (q, k, v [N, A, H, E], g=, beta= [N, A, H], initial_state= [N, H, E, V] or None, output_final_state=,
                cu_seqlens=, cu_seqlens_cpu=) to (output [N, A, H, V], last states [N, H, E, V]). With cu_seqlens the N
                runs stand behind one another, [1, all, H, E]. A token with g = beta = 0 leaves the state as it is.
            q, k: [T, H, E].
            v: [T, H, V].
            g: [T, H], the logarithm of what the state is multiplied by.
            beta: [T, H], how far the state goes to a new value.
        """
        outputs, states = [], []
        for runs in self.calls:
            initial = None if runs.starts is None else torch.cat(states).index_select(0, runs.starts)
            output, state = rule(
                *(runs.of_row(x) for x in (q, k, v)),
                g=runs.gates_of_row(g),
                beta=runs.gates_of_row(beta),
                initial_state=initial,
                output_final_state=initial is None,
                cu_seqlens=runs.bounds,
                cu_seqlens_cpu=None if runs.bounds is None else torch.from_numpy(runs.bounds_on_host),
            )
            outputs.append(output.flatten(0, 1))
            if initial is None:
                states.append(state)
        return torch.cat(outputs).index_select(0, self.order)


def runs_of(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Where each prompt and each response of a packed row starts, and its length: [runs] int64 each, in their order."""
    prompt, response = batch.prompt_id, batch.response_id
    change = (prompt[1:] != prompt[:-1]) | (response[1:] != response[:-1])
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.nonzero(change)[:, 0] + 1])
    return starts, torch.diff(starts, append=torch.tensor([len(prompt)]))


def sequences_of(batch: PackedBatch, tail: int, *, padded: bool) -> Sequences:
    """The prompts and responses of a batch, on the host.

    Args:
        batch: packed.
        tail: earlier inputs that a convolution sees.
        padded: whether runs are padded and those of about the same lengths read together; else all prompts, and all
            responses, stand in one row with their bounds.
    """
    starts, lengths = runs_of(batch)
    answers = batch.response_id[starts] > 0
    asked = torch.nonzero(~answers)[:, 0][batch.prompt_id[starts]]  # [runs]: the run that is the prompt of each
    prompts = _alike(torch.nonzero(~answers)[:, 0], lengths, padded)
    responses = _alike(torch.nonzero(answers)[:, 0], lengths, padded)
    state = torch.empty_like(starts)  # of each prompt: the place of its last state among those of all calls
    state[torch.cat(prompts)] = torch.arange(int((~answers).sum()))
    read = _padded if padded else _joined
    calls = [read(starts, lengths, chosen, None) for chosen in prompts]
    calls += [read(starts, lengths, chosen, state[asked[chosen]]) for chosen in responses]
    places = torch.cat([call.places for call in calls])
    real = torch.cat([call.mask.flatten() for call in calls])
    order = torch.empty(batch.tokens, dtype=torch.int64)
    order[places[real]] = torch.nonzero(real)[:, 0]
    return Sequences(tuple(calls), order, *_with_pasts(starts, lengths, asked, answers, tail))


def _with_pasts(starts: Tensor, lengths: Tensor, asked: Tensor, answers: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """`Sequences.seen` and `own`: before a prompt there are zeros, before a response its prompt's last inputs."""
    runs, tokens = len(starts), int(lengths.sum())
    own = torch.arange(tokens) + tail * (1 + torch.repeat_interleave(torch.arange(runs), lengths))
    seen = torch.full((tokens + tail * runs,), tokens)
    seen[own] = torch.arange(tokens)
    step = torch.arange(tail)
    past = (starts + lengths)[asked][:, None] - tail + step  # [runs, tail]
    known = answers[:, None] & (past >= starts[asked][:, None])
    seen[(starts + tail * torch.arange(runs))[:, None] + step] = torch.where(known, past, tokens)
    return seen, own


def _alike(runs: Tensor, lengths: Tensor, padded: bool) -> list[Tensor]:
    """Runs that are read in one call: all, or of those that are padded the ones of about as many chunks."""
    if not len(runs):
        return []
    if not padded:
        return [runs]
    chunks = (lengths[runs] + CHUNK - 1) // CHUNK
    step = 2 ** (chunks.log2().floor().long() - 2).clamp(min=0)  # at most a quarter of a run is padding, or a chunk
    rounded = (chunks + step - 1) // step * step
    return [runs[rounded == size] for size in rounded.unique()]


def _padded(starts: Tensor, lengths: Tensor, chosen: Tensor, state: Tensor | None) -> Runs:
    step = torch.arange(int(lengths[chosen].max()))
    real = step < lengths[chosen, None]
    places = starts[chosen, None] + step.minimum(lengths[chosen, None] - 1)
    return Runs(places.flatten(), real, None, None, state)


def _joined(starts: Tensor, lengths: Tensor, chosen: Tensor, state: Tensor | None) -> Runs:
    size = lengths[chosen]
    bounds = torch.cat([size.new_zeros(1), size.cumsum(0)])
    places = torch.repeat_interleave(starts[chosen] - bounds[:-1], size) + torch.arange(int(bounds[-1]))
    return Runs(places, None, bounds, bounds.numpy(), state)
