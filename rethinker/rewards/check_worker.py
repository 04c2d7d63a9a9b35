"""One answer-checking process: `Worker` is its handle in the trainer, `serve` what runs inside.

A fresh interpreter, not a fork (the trainer has threads) and not multiprocessing's spawn (which imports the trainer's
main module again). It loads math-verify or the custom reward, not torch. It has one check at a time, so the trainer
knows which check a dead worker was at.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

from rethinker.config import ConfigError, RewardConfig
from rethinker.rewards.functions import load_reward
from rethinker.samples import Query

# Until a worker has imported what it needs; far beyond any healthy start, since a loaded machine is slow.
START_S = 120.0
READY = "ready"
OUT_OF_MEMORY = 77  # exit code


class Worker:
    """A process that is started by the first check, and again by the next one after each `kill`."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._process: subprocess.Popen | None = None
        self._link: Connection | None = None
        self._closed, self._busy = False, threading.Lock()

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
            self._start()
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
            self._link = None
        self._end()
        if self._process is not None:
            self._process.wait()
            self._process = None

    def _end(self) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        # A message longer than the socket's buffer waits for its reader: not for ever.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(START_S), 0))
        with theirs:
            reward = self.config
            code = (
                f"import sys; sys.path[:] = {sys.path!r}; from rethinker.rewards.check_worker import serve; "
                f"serve({theirs.fileno()}, {reward.function!r}, {reward.timeout_s!r}, {reward.memory_gb!r})"
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
        try:
            said = self._link.recv() if self._link.poll(START_S) else "no sign of life"
        except (EOFError, OSError):
            said = self._obituary()
        if said != READY:
            self.kill()
            raise ConfigError(f"reward.function={self.config.function}: its checking process does not start: {said}")

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


def serve(fd: int, function: str, timeout_s: float, memory_gb: float) -> None:
    """Answer checks until the trainer closes the connection or dies."""
    link = Connection(fd)
    try:
        reward = load_reward(function)
        if function == "boxed":
            import math_verify  # noqa: F401  (a second of imports belongs to the start, not to a check's deadline)
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
