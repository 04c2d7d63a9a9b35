"""A process that judges responses and can be killed: its handle in the trainer, and what runs inside.

`Worker` is the handle (see runtime/killable.py), `serve` what runs inside: it loads the reward functions, not torch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from rethinker.config import RewardConfig
from rethinker.rewards.entries import NEEDS, Entry
from rethinker.rewards.functions import RewardFunction, call_with, load_reward
from rethinker.rewards.rules import rules_of
from rethinker.runtime.killable import (
    Killable,
    LostError,
    answer_all,
    described,
    limit_memory,
    prepared,
)
from rethinker.samples import Query

LOOK_S = 0.5  # how often who waits for an answer looks whether the run is to stop

Asked = tuple[str, str, Query, dict[str, Any]]
"""(response, answer, query, facts by name): what a function is asked about a response."""
Verdict = tuple[float, str]
"""(value, "") of a response; or (0.0, failure), the failure as "reason: detail", and in further lines what is only this
response's."""
SKIPPED: Verdict = (0.0, "skipped")
"""Of a response that was not asked about, since the run is to stop."""


class Worker(Killable):
    """A process for calls of some functions, one at a time."""

    inside = "rethinker.rewards.worker"
    what = "checking process"
    closed = "the answer checker is closed"

    def __init__(self, entries: Sequence[Entry], config: RewardConfig) -> None:
        self.entries = list(entries)
        super().__init__(self.entries[0].named, (self.entries, config), config.memory_gb)

    def check(self, place: int, asked: Sequence[Asked]) -> list[Verdict]:
        """Call the function at a place among the worker's: what it says of each response.

        Raises:
            ConfigError: the process does not start, or could not load a function.
            RuntimeError: the worker is closed.
        """
        entry = self.entries[place]
        try:
            return self.ask((place, asked), entry.timeout_s)
        except LostError as lost:
            return [(0.0, failure_of(lost, entry))] * len(asked)


def failure_of(lost: LostError, entry: Entry) -> str:
    """The failure of a call over which its process was lost."""
    return f"timeout: {entry.timeout_setting}={entry.timeout_s}" if lost.reason == "timeout" else f"crash: {lost}"


def serve(fd: int) -> None:
    """Answer calls until the trainer closes the connection or dies."""
    link = Connection(fd)
    functions = load_functions(link)
    if functions is None:
        return

    def answer(message: tuple[int, Sequence[Asked]]) -> list[Verdict]:
        function, asked = functions[message[0]], message[1]
        try:
            said = call_with(function, asked)
            return _verdicts(said, len(asked)) if function.kind == "batch" else [verdict(said)]
        except MemoryError:
            raise
        except BaseException as error:  # SystemExit too: it is the call's, not the worker's
            return [failed(error)] * len(asked)

    answer_all(link, answer, lambda message: functions[message[0]].entry.timeout_s)


def load_functions(link: Connection) -> list[RewardFunction] | None:
    """Load the functions that the trainer names, limit the memory of their calls, and say so; None if that failed."""
    return prepared(link, _load)


def _load(opening: tuple[list[Entry], RewardConfig]) -> list[RewardFunction]:
    entries, config = opening
    functions = []
    for entry in entries:
        try:
            functions.append(load_reward(entry, rules_of(config)))
            if package := NEEDS.get(entry.function):  # now: it may take longer than a call may
                importlib.import_module(package)
        except BaseException as error:
            error.named = entry.named
            raise
    limit_memory(config.memory_gb)
    return functions


def verdict(value: Any) -> Verdict:
    """What a function's value comes to: a number of Python, NumPy or torch, but no text that spells one.

    Raises:
        Exception: it is no number.
    """
    if isinstance(value, (str, bytes, bytearray)):
        raise TypeError(f"a reward is a number, not the {type(value).__name__} {value[:40]!r}")
    number = float(value)
    return (number, "") if math.isfinite(number) else (0.0, "non_finite")


def failed(error: BaseException) -> Verdict:
    """The verdict of a call that raised an error: what it says is the kind of failure, and its notes (PEP 678) are what
    differs between failures of a kind."""
    notes = (f"\n{note}" for note in getattr(error, "__notes__", ()))
    return 0.0, f"error: {described(error)}{''.join(notes)[:500]}"


def _verdicts(values: Any, expected: int) -> list[Verdict]:
    """What a batch function's values come to, each for itself.

    Raises:
        TypeError, ValueError: they are no sequence, or not one for each response.
    """
    if isinstance(values, (str, bytes, bytearray, dict)):
        raise TypeError(f"a batch's rewards are a list of numbers, not a {type(values).__name__}")
    values = list(values)
    if len(values) != expected:
        raise ValueError(f"it returned {len(values)} rewards for {expected} responses")
    verdicts = []
    for value in values:
        try:
            verdicts.append(verdict(value))
        except MemoryError:
            raise
        except BaseException as error:
            verdicts.append(failed(error))
    return verdicts
