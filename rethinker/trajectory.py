"""A response that is made in several parts: turns of the policy, and between them tokens that nobody sampled.

Everything is done on token ids. Nothing is decoded and encoded again, so positions, log-probs and masks line up to the
token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rethinker.samples import Completion, Prompt


class Trajectory:
    """A response as far as it is made.

    Attributes:
        prompt: what the next turn goes on from: the query's prompt and all parts so far.
        room: tokens that are left for further parts.
        tokens: L so far.
    """

    def __init__(self, prompt: Prompt, longest: int) -> None:
        """
        Args:
            prompt: the query's.
            longest: tokens of all parts together.
        """
        self.prompt, self.room = prompt, longest
        self._start = len(prompt.token_ids)
        self._ids, self._logprobs = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
        self._experts: np.ndarray | None = None
        self._finish_reason = "stop"

    @property
    def tokens(self) -> int:
        return len(self.prompt.token_ids) - self._start

    def say(self, turn: Completion, kept: int | None = None) -> None:
        """Append the policy's turn, which was sampled from `prompt`: all of it, or its first `kept` tokens."""
        ids = turn.token_ids[:kept]
        self._add(ids, turn.logprobs[:kept], ids.tolist())
        self._finish_reason = turn.finish_reason
        if turn.experts is not None:
            known = np.zeros_like(turn.experts[:0]) if self._experts is None else self._experts
            # Of a turn that is cut, those of the tokens that stay: the next turn knows the others' successors.
            self._experts = np.concatenate([known, turn.experts[len(known) : len(self.prompt.token_ids)]])

    def hear(self, token_ids: Sequence[int], compact_ids: Sequence[int], images: Sequence[Any] = ()) -> None:
        """Append tokens that nobody sampled.

        Args:
            token_ids, compact_ids: as in `Prompt`.
            images: decoded, those that the tokens show.
        """
        self._add(np.asarray(token_ids, np.int32), np.full(len(token_ids), np.nan, np.float32), list(compact_ids))
        self.prompt = replace(self.prompt, images=[*self.prompt.images, *images])

    def forget_images(self) -> None:
        """Let go of the pixels of a response that is whole."""
        self.prompt = replace(self.prompt, images=[])

    def _add(self, ids: np.ndarray, logprobs: np.ndarray, compact_ids: list[int]) -> None:
        self._ids.append(ids)
        self._logprobs.append(logprobs)
        self.room -= len(ids)
        before = self.prompt
        self.prompt = replace(
            before, token_ids=before.token_ids + ids.tolist(), compact_ids=before.compact_ids + compact_ids
        )

    def completion(self, text: str, **others: Any) -> Completion:
        """The response, which ends as its last turn did unless the `others`, further fields of it, say so."""
        parts = {"token_ids": np.concatenate(self._ids), "logprobs": np.concatenate(self._logprobs), "text": text}
        return Completion(**parts | {"finish_reason": self._finish_reason, "experts": self._experts} | others)
