r"""Rewards: the built-in check of the last `\boxed{}`, custom functions, and the processes that run both safely.

A check can loop for ever (sympy), eat all memory, or crash the interpreter. So every check that is not plain string
work runs in a worker process with a deadline; a worker that misses it, or dies, is replaced, and that check scores 0
and is counted. Scores are keyed by request id. No signal is used in this process, so any thread may ask.
"""

from __future__ import annotations

import inspect
import logging
import math
import threading
import time
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable
from multiprocessing import connection
from typing import Any

from rethinker.config import ConfigError, RewardConfig
from rethinker.rewards.answers import compare, extract_boxed, math_equal, undecided
from rethinker.rewards.check_worker import Worker, WorkerFailed
from rethinker.runtime.user_code import user_function
from rethinker.samples import Query

log = logging.getLogger(__name__)

RewardFunction = Callable[[str, str, Query], float]

# Checks that go to a worker in one message, and verdicts remembered between calls.
CHUNK = 16
REMEMBERED = 65536


def answers_match(predicted: str, answer: str, query: Query | None = None) -> bool:
    """Whether a predicted answer is the expected one, by the rules of `answers`. Never raises; may take long on hard
    mathematics, which is why training asks an AnswerChecker.

    Args:
        predicted: what the box holds.
        answer: the expected answer, boxed or not.
        query: where options are found, in `metadata["choices"]` or in the question.
    """
    question, choices = _context(query)
    try:
        return bool(compare(predicted, answer, question=question, choices=choices, equal=math_equal))
    except Exception:  # sympy raises anything on odd input; what cannot be compared does not match
        return False


def boxed_reward(response: str, answer: str, query: Query | None = None) -> float:
    r"""1.0 if the last `\boxed{}` of the response holds the answer, else 0.0; a response without a box scores 0."""
    predicted = extract_boxed(response)
    return float(predicted is not None and answers_match(predicted, answer, query))


def load_reward(spec: str) -> RewardFunction:
    """The reward that `reward.function` names: `boxed`, or `path/to/file.py:function` taking (response, answer, query).

    Raises:
        ConfigError: no such file or function, a file that fails to import, or another signature.
    """
    function = user_function("reward.function", spec, {"boxed": boxed_reward})
    try:
        inspect.signature(function).bind("response", "answer", "query")
    except TypeError as error:
        raise ConfigError(f"reward.function={spec}: it must take (response, answer, query); {error}") from error
    except ValueError:  # a builtin without a signature
        pass
    return function


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
        self.config = config
        self.failures: Counter[str] = Counter()
        self._boxed = config.function == "boxed"
        self._workers = [Worker(config.function, config.timeout_s, config.memory_gb) for _ in range(config.workers)]
        self._verdicts: OrderedDict[tuple[Any, ...], float] = OrderedDict()
        self._named: set[str] = set()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _stop, self._workers)

    def score(self, items: Iterable[tuple[str, str, Query]]) -> dict[str, float]:
        """Score (request id, response, query) triples.

        Returns:
            Request id to reward. Each request gets the reward of its own response, whatever order the checks end in.

        Raises:
            ValueError: a request id occurs twice.
            RuntimeError: the checker is closed.
            ConfigError: the workers cannot load the reward.
        """
        if not self._finalizer.alive:
            raise RuntimeError("the answer checker is closed")
        with self._lock:
            return self._score_boxed(list(items)) if self._boxed else self._score_custom(list(items))

    def close(self) -> None:
        """End the workers; none is left behind."""
        self._finalizer()

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score_boxed(self, items: list[tuple[str, str, Query]]) -> dict[str, float]:
        """String work here; only what needs mathematics goes to a worker, and every question once."""
        scores: dict[str, float] = {}
        asking: dict[tuple[Any, ...], list[str]] = {}
        checks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        for request, response, query in items:
            if request in scores:
                raise ValueError(f"request id {request!r} occurs twice")
            scores[request] = 0.0
            predicted = extract_boxed(response)
            if predicted is None:
                continue
            question, choices = _context(query)
            key = (predicted, query.answer, question, repr(choices) if choices else "")
            if key in self._verdicts:
                self._verdicts.move_to_end(key)
                scores[request] = self._verdicts[key]
                continue
            try:
                verdict = compare(predicted, query.answer, question=question, choices=choices, equal=undecided)
            except Exception:  # a worker will fail on it in the same way, and there it is counted and named
                verdict = None
            if verdict is not None:
                scores[request] = float(verdict)
                continue
            asking.setdefault(key, []).append(request)
            checks[key] = (predicted, query.answer, question, choices)
        for key, (score, failure) in self._run(checks).items():
            for request in asking[key]:
                scores[request] = score
            if failure:
                self._count(failure, len(asking[key]), f"predicted {key[0]!r}, answer {key[1]!r}")
                continue
            self._verdicts[key] = score
            if len(self._verdicts) > REMEMBERED:
                self._verdicts.popitem(last=False)
        return scores

    def _score_custom(self, items: list[tuple[str, str, Query]]) -> dict[str, float]:
        checks = {request: (response, query.answer, query) for request, response, query in items}
        if len(checks) < len(items):
            raise ValueError("a request id occurs twice")
        results = self._run(checks)
        for request, (_, failure) in results.items():
            if failure:
                self._count(failure, 1, f"query {checks[request][2].id!r}")
        return {request: results[request][0] for request in checks}

    def _count(self, failure: str, requests: int, subject: str) -> None:
        """Count a failed check; every kind of failure is named once in the log, with what it was about."""
        reason, _, detail = failure.partition(": ")
        self.failures[reason] += requests
        if failure not in self._named and len(self._named) < 100:
            self._named.add(failure)
            log.warning("a check scored 0 (%s%s): %s", reason, f", {detail}" if detail else "", subject)

    def _run(self, checks: dict[Any, Any]) -> dict[Any, tuple[float, str]]:
        """Run every check in some worker: key to (score, "") or (0.0, "reason: detail")."""
        waiting = deque(checks)
        results: dict[Any, tuple[float, str]] = {}
        busy: dict[Any, tuple[Worker, deque[Any]]] = {}  # connection to its worker and the checks it has yet to answer
        idle = list(self._workers)
        share = max(1, min(CHUNK, -(-len(waiting) // len(self._workers))))

        def settle(worker: Worker, link: Any, failure: str) -> None:
            """A worker is lost: the check it was at fails, the ones behind it wait again."""
            todo = busy.pop(link)[1]
            results[todo.popleft()] = (0.0, failure)
            waiting.extendleft(reversed(todo))
            worker.kill()
            idle.append(worker)

        try:
            while waiting or busy:
                while waiting and idle:
                    worker = idle.pop()
                    todo = deque(waiting.popleft() for _ in range(min(share, len(waiting))))
                    link = worker.send([checks[key] for key in todo])
                    busy[link] = worker, todo
                now = time.monotonic()
                patience = min(worker.deadline for worker, _ in busy.values()) - now
                for link in connection.wait(list(busy), timeout=max(0.0, patience)):
                    worker, todo = busy[link]
                    was_started = worker.started
                    answer = worker.receive()
                    if not was_started:
                        continue  # it said that it is ready
                    if answer is None:
                        settle(worker, link, f"crash: {worker.obituary()}")
                        continue
                    score, failure = answer
                    if not failure and not math.isfinite(score):
                        score, failure = 0.0, "non_finite"
                    results[todo.popleft()] = (0.0 if failure else score, failure)
                    if not todo:
                        del busy[link]
                        idle.append(worker)
                for link, (worker, _) in list(busy.items()):
                    if time.monotonic() > worker.deadline and not link.poll():
                        if not worker.started:
                            raise WorkerFailed("its checking process does not start: no sign of life")
                        settle(worker, link, f"timeout: reward.timeout_s={self.config.timeout_s}")
        except WorkerFailed as error:
            raise ConfigError(f"reward.function={self.config.function}: {error}") from error
        finally:  # on an exception, answers still under way must not be taken for those of the next call
            for worker, _ in busy.values():
                worker.kill()
        return results


def _context(query: Query | None) -> tuple[str, Any]:
    """(question, options) that an answer is read in."""
    if query is None:
        return "", None
    return query.question, query.metadata.get("choices") or query.metadata.get("options")


def _stop(workers: list[Worker]) -> None:
    for worker in workers:
        worker.kill()
