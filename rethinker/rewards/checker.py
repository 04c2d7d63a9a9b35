"""The checker of answers: rewards by request id, from processes that can be killed.

A reward can loop for ever, eat all memory, or crash the interpreter. So every check that is not plain string work runs
in a worker process with a deadline; a worker that misses it, or dies, is replaced, and that check scores 0 and is
counted. No signal is used in this process, so any thread may ask.

A worker is a fresh interpreter, not a fork (the trainer has threads) and not multiprocessing's spawn (which imports the
trainer's main module again). `Worker` is its handle in the trainer, `serve` what runs inside: it loads the reward,
not torch. It has one check at a time, so the trainer knows which check a dead worker was at.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from cachetools import LRUCache

from rethinker.config import ConfigError, RewardConfig
from rethinker.rewards.answers import compare, extract_boxed, undecided
from rethinker.rewards.functions import context_of, load_reward
from rethinker.rewards.published import published_verdict
from rethinker.rewards.rules import Rules, rules_of
from rethinker.samples import Query

log = logging.getLogger(__name__)

# Until a worker has imported what it needs; far beyond any healthy start, since a loaded machine is slow.
START_S = 120.0
# Verdicts that are kept: the responses of an episode often end in the same few answers, and so do those of the next.
KEPT_VERDICTS = 16_384
READY = "ready"
OUT_OF_MEMORY = 77  # exit code


class AnswerChecker(contextlib.AbstractContextManager):
    """Scores responses in a pool of killable processes. Workers start with `start`, or when first needed, and end with
    `close`.

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
        self._boxed, self._rules = config.function == "boxed", rules_of(config)
        self._verdicts: LRUCache[Any, float] = LRUCache(KEPT_VERDICTS)
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
                if key in self._verdicts:
                    scores[request] = self._verdicts[key]
                elif check:
                    checks[key] = check
                    requests.setdefault(key, []).append(request)
            for key, (score, failure) in self._run(checks).items():
                scores.update(dict.fromkeys(requests[key], score))
                if self._boxed and not failure:
                    self._verdicts[key] = score
                if failure:
                    self._count(failure, len(requests[key]), *checks[key])
        return scores

    def start(self) -> None:
        """Start the workers, without waiting for them, so that no check need wait for their imports."""
        for worker in self._workers:
            worker.start()

    def close(self) -> None:
        """End the workers; none is left behind."""
        self._closed = True
        for worker in self._workers:
            worker.close()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _decide(self, response: str, query: Query) -> tuple[float, Any, tuple[str, str, Query] | None]:
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


class Worker:
    """A process that `start` or the first check starts, and the next check after each `kill` again."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._process: subprocess.Popen | None = None
        self._link: Connection | None = None
        self._ready = False  # it has said so
        self._closed, self._busy = False, threading.Lock()

    def start(self) -> None:
        """Start the process without waiting for it: the first check does, and says what went wrong in it."""
        with self._busy:
            if self._link is None and not self._closed:
                self._launch()

    def check(self, response: str, answer: str, query: Query) -> tuple[float, str]:
        """(reward, "") of a response; or (0.0, failure), the failure as "reason: detail".

        Raises:
            ConfigError: the process does not start, or could not load the reward.
            RuntimeError: the worker is closed.
        """
        with self._busy:
            try:
                if not self._closed:
                    return self._check(response, answer, query)
            except ConfigError:
                if not self._closed:  # else its process was ended while it started
                    raise
            raise RuntimeError("the answer checker is closed")

    def close(self) -> None:
        """End the process for good; a check under way fails."""
        self._closed = True
        self._end()
        with self._busy:
            self.kill()

    def _check(self, response: str, answer: str, query: Query) -> tuple[float, str]:
        if self._link is None or self._process.poll() is not None:  # it may have died since its last answer
            self.kill()
            self._launch()
        self._await_ready()
        try:
            self._link.send((response, answer, query))
            if self._link.poll(self.config.timeout_s):
                return self._link.recv()
            failure = f"timeout: reward.timeout_s={self.config.timeout_s}"
        except (EOFError, OSError):
            failure = f"crash: {self._obituary()}"
        self.kill()
        return 0.0, failure

    def kill(self) -> None:
        """End the process and everything it started, at once, and reap it."""
        if self._link is not None:
            self._link.close()
            self._link, self._ready = None, False
        self._end()
        if self._process is not None:
            self._process.wait()
            self._process = None

    def _end(self) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        # A message longer than the socket's buffer waits for its reader: not for ever.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(START_S), 0))
        with theirs:
            reward = self.config
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from rethinker.rewards.checker import Rules, serve; "
                f"serve({theirs.fileno()}, {reward.function!r}, {rules_of(reward)!r}, {reward.timeout_s!r}, "
                f"{reward.memory_gb!r})"
            )
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"OMP_NUM_THREADS": "1", **os.environ},
                start_new_session=True,  # so that it and its children can be killed as one, and Ctrl-C is not theirs
            )
        if self._closed:  # meanwhile: `close` did not know this process yet
            self._end()
        self._link = Connection(ours.detach())

    def _await_ready(self) -> None:
        if self._ready:
            return
        try:
            said = self._link.recv() if self._link.poll(START_S) else "no sign of life"
        except (EOFError, OSError):
            said = self._obituary()
        if said != READY:
            self.kill()
            raise ConfigError(f"reward.function={self.config.function}: its checking process does not start: {said}")
        self._ready = True

    def _obituary(self) -> str:
        """How a worker that died ended."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "the connection was closed"
        if code == OUT_OF_MEMORY:
            return f"more than {self.config.memory_gb:g} GiB of memory"
        if code < 0:
            with contextlib.suppress(ValueError):
                return signal.Signals(-code).name
        return f"exit code {code}"


def serve(fd: int, function: str, rules: Rules, timeout_s: float, memory_gb: float) -> None:
    """Answer checks until the trainer closes the connection or dies."""
    link = Connection(fd)
    try:
        reward = load_reward(function, rules)
        _limit_memory(memory_gb)
    except BaseException as error:
        link.send(_described(error))
        return
    link.send(READY)
    # The kernel ends a worker that a dead trainer left behind in an endless check. A living one has killed it by then.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    worker = os.getpid()
    while True:
        try:
            check = link.recv()
        except (EOFError, OSError):
            return
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
        try:
            score = _number(reward(*check))
            answer = (score, "") if math.isfinite(score) else (0.0, "non_finite")
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except BaseException as error:  # SystemExit too: it is the check's, not the worker's
            answer = 0.0, f"error: {_described(error)}"
        if os.getpid() != worker:  # a reward that forked and let the child return: its answer is one too many
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            link.send(answer)
        except OSError:
            return


def _number(reward: Any) -> float:
    """A reward as a float: of Python, NumPy or torch, but no text that spells one."""
    if isinstance(reward, (str, bytes, bytearray)):
        raise TypeError(f"a reward is a number, not the {type(reward).__name__} {reward[:40]!r}")
    return float(reward)


def _described(error: BaseException) -> str:
    """The error in one line of text that can be logged; whatever its own text does is the check's fault as well."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = type(error).__name__
    return text.encode("utf-8", "backslashreplace").decode()[:500]


def _limit_memory(memory_gb: float) -> None:
    """Bound what the process may add to its data memory (address space would not do: CUDA reserves much of it), and let
    the kernel end this process first when memory runs out."""
    import resource

    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[5]) * resource.getpagesize()
    size = taken + int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
