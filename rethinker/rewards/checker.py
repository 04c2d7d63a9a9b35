"""The checker of answers: rewards by request id, from processes that can be killed.

A check can loop for ever (sympy), eat all memory, or crash the interpreter. So every check that is not plain string
work runs in a worker process with a deadline; a worker that misses it, or dies, is replaced, and that check scores 0
and is counted. No signal is used in this process, so any thread may ask.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from rethinker.config import RewardConfig
from rethinker.rewards.answers import compare, extract_boxed, undecided
from rethinker.rewards.check_worker import Worker
from rethinker.rewards.functions import context_of, load_reward
from rethinker.samples import Query

log = logging.getLogger(__name__)


class AnswerChecker:
    """Scores responses in a pool of killable processes. Workers start when first needed and end with `close`.

    `failures` counts responses scored 0 because their check could not be finished: `timeout`, `crash` (the worker died,
    or ran out of memory), `error` (the reward raised) and `non_finite`.

    Args:
        config: the reward, the number of workers, the deadline of one check, the memory of a worker's checks.

    Raises:
        ConfigError: `reward.function` cannot be loaded.
    """

    def __init__(self, config: RewardConfig) -> None:
        load_reward(config.function)  # a mistake is reported now, not in the first episode
        self.failures: Counter[str] = Counter()
        self._boxed = config.function == "boxed"
        self._workers = [Worker(config) for _ in range(config.workers)]
        self._idle = list(self._workers)
        self._named: set[str] = set()
        self._lock, self._closed = threading.Lock(), False

    def score(self, items: Iterable[tuple[str, str, Query]]) -> dict[str, float]:
        """Score (request id, response, query) triples.

        Returns:
            Request id to reward. Each request gets the reward of its own response, whatever order the checks end in.

        Raises:
            ValueError: a request id occurs twice.
            RuntimeError: the checker is closed.
            ConfigError: the workers cannot load the reward.
        """
        if self._closed:
            raise RuntimeError("the answer checker is closed")
        scores: dict[str, float] = {}
        checks: dict[Any, tuple[str, str, Query]] = {}
        requests: dict[Any, list[str]] = {}  # that share a check
        with self._lock:
            for request, response, query in items:
                if request in scores:
                    raise ValueError(f"request id {request!r} occurs twice")
                key, check = request, (response, query.answer, query)
                scores[request] = 0.0
                if self._boxed:
                    scores[request], key, check = self._decide(response, query)
                if check:
                    checks[key] = check
                    requests.setdefault(key, []).append(request)
            for key, (score, failure) in self._run(checks).items():
                scores.update(dict.fromkeys(requests[key], score))
                if failure:
                    self._count(failure, len(requests[key]), *checks[key])
        return scores

    def close(self) -> None:
        """End the workers; none is left behind."""
        self._closed = True
        for worker in self._workers:
            worker.close()

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decide(self, response: str, query: Query) -> tuple[float, Any, tuple[str, str, Query] | None]:
        """The boxed reward where string work decides it, else 0.0; the key and the check that are left to a worker."""
        predicted, (question, choices) = extract_boxed(response), context_of(query)
        if predicted is None:
            return 0.0, None, None
        try:
            verdict = compare(predicted, query.answer, question=question, choices=choices, equal=undecided)
        except Exception:  # a worker will fail on it in the same way, and there it is counted and named
            verdict = None
        if verdict is not None:
            return float(verdict), None, None
        key = (predicted, query.answer, question, repr(choices) if choices else "")
        return 0.0, key, (f"\\boxed{{{predicted}}}", query.answer, replace(query, images=()))

    def _run(self, checks: dict[Any, tuple[str, str, Query]]) -> dict[Any, tuple[float, str]]:
        """Run every check in some worker: key to (score, failure), as `Worker.check` returns them."""
        if not checks:
            return {}

        def run(check: tuple[str, str, Query]) -> tuple[float, str]:
            worker = self._idle.pop()
            try:
                return worker.check(*check)
            finally:
                self._idle.append(worker)

        # A thread for each worker: it sends a check and waits for its answer, so that no answer can be another check's.
        with ThreadPoolExecutor(min(len(checks), len(self._workers)), "answer check") as pool:
            return dict(zip(checks, pool.map(run, checks.values()), strict=True))

    def _count(self, failure: str, requests: int, response: str, answer: str, query: Query) -> None:
        """Count a failed check; every kind of failure is named once in the log, with what it was about."""
        reason, _, detail = failure.partition(": ")
        self.failures[reason] += requests
        if failure not in self._named and len(self._named) < 100:
            self._named.add(failure)
            reason += f", {detail}" if detail else ""
            log.warning("a check scored 0 (%s): query %r, %.200r for %.200r", reason, query.id, response, answer)
