"""The checker of answers: rewards by request id, from processes that can be killed.

A reward can loop for ever, eat all memory, or crash the interpreter. So every check that is not plain string work runs
in a worker process with a deadline (worker.py, async_worker.py); a worker that misses it, or dies, is replaced, and
that check scores 0 and is counted. No signal is used in this process, so any thread may ask.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

from cachetools import LRUCache, cached

from rethinker.config import ConfigError, RewardConfig
from rethinker.rewards.answers import compare, extract_boxed, undecided
from rethinker.rewards.async_worker import AsyncWorker
from rethinker.rewards.functions import TRIALS, RewardFunction, context_of, load_rewards
from rethinker.rewards.published import published_verdict
from rethinker.rewards.rules import rules_of
from rethinker.rewards.worker import LOOK_S, SKIPPED, Asked, Verdict, Worker
from rethinker.runtime import signals
from rethinker.samples import Query

log = logging.getLogger(__name__)

# Verdicts that are kept: the responses of an episode often end in the same few answers, and so do those of the next.
KEPT_VERDICTS = 16_384
# Queries whose images are kept for their other responses.
KEPT_IMAGES = 16

Item = tuple[str, str, Query]
"""(request id, response, query)."""


@dataclass(frozen=True)
class _Call:
    """One call of a function, or all calls of an async one: about `items`, whose values `requests` get."""

    function: RewardFunction
    items: list[Item]
    requests: dict[str, list[str]] = field(default_factory=dict)  # of boxed: those that share a check, by the first
    keys: dict[str, Any] = field(default_factory=dict)  # of boxed: of the verdicts that are kept, likewise


class AnswerChecker(contextlib.AbstractContextManager):
    """Scores responses in a pool of killable processes. Workers start with `start`, or when first needed, and end with
    `close`. A function that is not async runs in any of `reward.workers` processes, an async one in its own.

    `failures` counts responses scored 0 because their check could not be finished: `timeout`, `crash` (the worker died,
    or ran out of memory), `error` (the reward raised) and `non_finite`; of several functions behind their names.
    `stopping` says why the run is to stop: a check failed of a function whose `on_failure` is stop. From then on no
    check is made, and values mean nothing.

    Args:
        config: the reward functions, the number of workers, the deadline of a call, the memory of a worker's calls.
        max_tokens: rollout.max_new_tokens, for functions that ask for it.
        images: opens a query's images as PNG, for functions that ask for them; any thread may call it.

    Raises:
        ConfigError: a function cannot be loaded; see `load_rewards`.
    """

    def __init__(
        self,
        config: RewardConfig,
        max_tokens: int | None = None,
        images: Callable[[Query], list[bytes]] | None = None,
    ) -> None:
        self.functions = load_rewards(config, max_tokens)  # a mistake is reported now, not in the first episode
        self.failures: Counter[str] = Counter()
        self.stopping: str | None = None
        self._rules, self._max_tokens, self._images = rules_of(config), max_tokens, images
        self._verdicts: LRUCache[Any, float] = LRUCache(KEPT_VERDICTS)
        plain = [function.entry for function in self.functions if function.kind != "async"]
        self._places = {entry.name: place for place, entry in enumerate(plain)}
        self._workers = [Worker(plain, config) for _ in range(config.workers)] if plain else []
        self._idle = list(self._workers)
        self._async = {f.entry.name: AsyncWorker([f.entry], config) for f in self.functions if f.kind == "async"}
        self._named: set[str] = set()
        self._lock, self._closed = threading.Lock(), False

    def score(self, items: Iterable[Item], lengths: Mapping[str, tuple[int, bool]] | None = None) -> dict[str, float]:
        """The first function's values, which say what is right; see `score_all`."""
        first = self.functions[:1]
        return self._score(first, items, lengths or {})[first[0].entry.name]

    def score_all(self, items: Iterable[Item], lengths: Mapping[str, tuple[int, bool]]) -> dict[str, dict[str, float]]:
        """Score (request id, response, query) triples.

        Args:
            items: in which the responses to a query stand together, as a batch function is to see them.
            lengths: by request id the response's tokens, and whether the longest length ended it.

        Returns:
            By the name of each function: request id to value. Each request gets the value of its own response, whatever
            order the checks end in.

        Raises:
            ValueError: a request id occurs twice.
            RuntimeError: the checker is closed.
            ConfigError: the workers cannot load a function.
            StopRequested: as `signals.check`.
        """
        return self._score(self.functions, items, lengths)

    def check_working(self) -> None:
        """For callers that are not asked to save anything first.

        Raises:
            ConfigError: a check failed of a function whose `on_failure` is stop.
        """
        if self.stopping:
            raise ConfigError(self.stopping)

    def start(self) -> None:
        """Start the workers, without waiting for them, so that no check need wait for their imports."""
        for worker in self._all_workers:
            worker.start()

    def try_out(self) -> None:
        """Have each function that needs what is elsewhere judge a response before the first episode, which is slow. One
        that cannot is a warning, since its `on_failure` is zero.

        Raises:
            ConfigError: or an error, since that is stop.
        """
        for entry in (f.entry for f in self.functions if f.entry.function in TRIALS):
            trial = TRIALS[entry.function]()
            ((_, failure),) = self._async[entry.name].check_all([trial], lambda about: about, threading.Event())
            if failure:
                said = f"{entry.named}: it cannot judge ({failure.replace(chr(10), '; ')})"
                if entry.on_failure == "stop":
                    raise ConfigError(f"{said}; repair that, or set {entry.place}.on_failure=zero")
                log.warning("%s: responses have the value 0 by it until it can", said)

    def close(self) -> None:
        """End the workers; none is left behind."""
        self._closed = True
        for worker in self._all_workers:
            worker.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _all_workers(self) -> list[Worker]:
        return [*self._workers, *self._async.values()]

    def _score(
        self, functions: Sequence[RewardFunction], items: Iterable[Item], lengths: Mapping[str, tuple[int, bool]]
    ) -> dict[str, dict[str, float]]:
        if self._closed:
            raise RuntimeError("the answer checker is closed")
        with self._lock:
            items, seen = list(items), set()
            for request, *_ in items:
                if request in seen:
                    raise ValueError(f"request id {request!r} occurs twice")
                seen.add(request)
            values: dict[str, dict[str, float]] = {function.entry.name: {} for function in functions}
            calls = [call for f in functions for call in self._calls(f, items, values[f.entry.name])]
            for call, verdicts in zip(calls, self._run(calls, lengths), strict=True):
                self._settle(call, verdicts, values[call.function.entry.name])
        return {name: {request: of[request] for request, *_ in items} for name, of in values.items()}

    def _calls(self, function: RewardFunction, items: list[Item], values: dict[str, float]) -> Iterator[_Call]:
        """The calls of a function that its values take; those that take none go into `values` at once."""
        if function.entry.function == "boxed":
            yield from self._boxed_calls(function, items, values)
        elif not items or function.kind == "async":
            yield from [_Call(function, items)] if items else []
        elif function.kind == "single":
            yield from (_Call(function, [item]) for item in items)
        else:  # in about equal parts for all workers, the responses to a query in one part
            size, part = -(-len(items) // len(self._workers)), []
            for _, group in groupby(items, key=lambda item: id(item[2])):
                part += group
                if len(part) >= size:
                    yield _Call(function, part)
                    part = []
            yield from [_Call(function, part)] if part else []

    def _boxed_calls(self, function: RewardFunction, items: list[Item], values: dict[str, float]) -> Iterator[_Call]:
        checks: dict[Any, Item] = {}
        requests: dict[Any, list[str]] = {}  # that share a check
        for request, response, query in items:
            values[request], key, check = self._decide(response, query)
            if key in self._verdicts:
                values[request] = self._verdicts[key]
            elif check:
                checks.setdefault(key, (request, *check))
                requests.setdefault(key, []).append(request)
        for key, check in checks.items():
            yield _Call(function, [check], {check[0]: requests[key]}, {check[0]: key})

    def _decide(self, response: str, query: Query) -> tuple[float, Any, tuple[str, Query] | None]:
        """The boxed reward where string work decides it, else 0.0; the key and the check that are left to a worker."""
        predicted, (question, choices) = extract_boxed(response), context_of(query)
        if predicted is None:
            return 0.0, None, None
        verdict = published_verdict(predicted, query.answer, query)
        if verdict is not None:
            return float(verdict), None, None
        try:
            verdict = compare(
                predicted, query.answer, question=question, choices=choices, rules=self._rules, equal=undecided
            )
        except Exception:  # a worker will fail on it in the same way, and there it is counted and named
            verdict = None
        if verdict is not None:
            return float(verdict), None, None
        key = (predicted, query.answer, question, repr(choices) if choices else "")
        return 0.0, key, (f"\\boxed{{{predicted}}}", replace(query, images=()))

    def _run(self, calls: list[_Call], lengths: Mapping[str, tuple[int, bool]]) -> list[list[Verdict]]:
        """Run every call in some worker: of each call the verdicts on its items."""
        if not calls:
            return []
        broken_off = threading.Event()
        if self.stopping:
            broken_off.set()
        images = self._images and cached(LRUCache(KEPT_IMAGES), key=id, lock=threading.Lock())(self._images)

        def asked(function: RewardFunction, item: Item) -> Asked:
            request, response, query = item
            tokens, truncated = lengths.get(request, (None, None))
            known = {"tokens": tokens, "truncated": truncated, "max_tokens": self._max_tokens}
            facts = {name: images(query) if name == "images" else known[name] for name in function.facts}
            return response, query.answer, query, facts

        def run(call: _Call) -> list[Verdict]:
            if broken_off.is_set():
                return [SKIPPED] * len(call.items)
            entry, about = call.function.entry, partial(asked, call.function)
            if call.function.kind == "async":
                verdicts = self._async[entry.name].check_all(call.items, about, broken_off)
            else:
                worker = self._idle.pop()
                try:
                    verdicts = worker.check(self._places[entry.name], [*map(about, call.items)])
                finally:
                    self._idle.append(worker)
            if entry.on_failure == "stop" and any(failure for _, failure in verdicts):
                broken_off.set()
            return verdicts

        # A thread for each worker: it sends a call and waits for its answer, so that no answer can be another call's.
        with (
            ThreadPoolExecutor(max(1, len(self._workers)), "answer check") as pool,
            ThreadPoolExecutor(max(1, len(self._async)), "async answer check") as async_pool,
        ):
            pools = {"async": async_pool}
            futures = [pools.get(call.function.kind, pool).submit(run, call) for call in calls]
            try:
                under_way = set(futures)
                while under_way:
                    done, under_way = wait(under_way, LOOK_S, FIRST_EXCEPTION)
                    for future in done:
                        future.result()
                    signals.check()
            except BaseException:
                broken_off.set()
                raise
        return [future.result() for future in futures]

    def _settle(self, call: _Call, verdicts: list[Verdict], values: dict[str, float]) -> None:
        """Give every request its value, keep verdicts that may be asked for again, and count failures."""
        for item, verdict in zip(call.items, verdicts, strict=True):
            request, (value, failure) = item[0], verdict
            requests = call.requests.get(request, [request])
            values.update(dict.fromkeys(requests, value))
            if failure and verdict != SKIPPED:
                self._count(failure, len(requests), call.function, item)
            elif request in call.keys and not failure:
                self._verdicts[call.keys[request]] = value

    def _count(self, failure: str, requests: int, function: RewardFunction, item: Item) -> None:
        """Count a failed check; every kind of failure is named once in the log, with what it was about."""
        _, response, query = item
        entry, (kind, *notes) = function.entry, failure.split("\n")
        reason, _, detail = kind.partition(": ")
        several = len(self.functions) > 1
        self.failures[f"{entry.name}: {reason}" if several else reason] += requests
        reason = "; ".join([f"{reason}, {detail}" if detail else reason, *notes])
        if entry.on_failure == "stop" and not self.stopping:
            self.stopping = (
                f"{entry.named}: a check failed ({reason}), of query {query.id!r}; repair what failed, or set "
                f"{entry.place}.on_failure=zero"
            )
        if (said := f"{entry.name} {kind}") not in self._named and len(self._named) < 100:
            self._named.add(said)
            of = f" of {entry.name}" if several else ""
            log.warning(
                "a check%s scored 0 (%s): query %r, %.200r for %.200r", of, reason, query.id, response, query.answer
            )
