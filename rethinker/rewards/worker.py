"""A process that judges responses and can be killed: its handle in the trainer, and what runs inside.

A worker is a fresh interpreter, not a fork (the trainer has threads) and not multiprocessing's spawn (which imports the
trainer's main module again). `Worker` is its handle, `serve` what runs inside: it loads the reward functions, not
torch. It has one call at a time, so the trainer knows which call a dead worker was at.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from rethinker.config import ConfigError, RewardConfig
from rethinker.rewards.entries import NEEDS, Entry
from rethinker.rewards.functions import RewardFunction, call_with, load_reward
from rethinker.rewards.rules import rules_of
from rethinker.samples import Query

# Until a worker has imported what it needs; far beyond any healthy start, since a loaded machine is slow.
START_S = 120.0
LOOK_S = 0.5  # how often who waits for an answer looks whether the run is to stop
READY = "ready"
OUT_OF_MEMORY = 77  # exit code

Asked = tuple[str, str, Query, dict[str, Any]]
"""(response, answer, query, facts by name): what a function is asked about a response."""
Verdict = tuple[float, str]
"""(value, "") of a response; or (0.0, failure), the failure as "reason: detail", and in further lines what is only this
response's."""
SKIPPED: Verdict = (0.0, "skipped")
"""Of a response that was not asked about, since the run is to stop."""


class Worker:
    """A process for calls of some functions, one at a time; `start` or the first call starts it, and the next call
    after each `kill` again."""

    inside = "rethinker.rewards.worker"
    """The module whose `serve` runs in the process."""

    def __init__(self, entries: Sequence[Entry], config: RewardConfig) -> None:
        self.entries, self.config = list(entries), config
        self._process: subprocess.Popen | None = None
        self._link: Connection | None = None
        self._ready = False  # it has said so
        self._closed, self._busy = False, threading.Lock()

    def start(self) -> None:
        """Start the process without waiting for it: the first call does, and says what went wrong in it."""
        with self._busy:
            if self._link is None and not self._closed:
                self._launch()

    def check(self, place: int, asked: Sequence[Asked]) -> list[Verdict]:
        """Call the function at a place among the worker's: what it says of each response.

        Raises:
            ConfigError: the process does not start, or could not load a function.
            RuntimeError: the worker is closed.
        """
        with self._in_use():
            return self._check(place, asked)

    def close(self) -> None:
        """End the process for good; a call under way fails."""
        self._closed = True
        self._end()
        with self._busy:
            self.kill()

    def kill(self) -> None:
        """End the process and everything it started, at once, and reap it."""
        if self._link is not None:
            self._link.close()
            self._link, self._ready = None, False
        self._end()
        if self._process is not None:
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        with self._busy:
            try:
                if not self._closed:
                    yield
                    return
            except ConfigError:
                if not self._closed:  # else its process was ended while it started
                    raise
            raise RuntimeError("the answer checker is closed")

    def _check(self, place: int, asked: Sequence[Asked]) -> list[Verdict]:
        entry = self.entries[place]
        self._get_ready()
        try:
            self._link.send((place, asked))
            if self._link.poll(entry.timeout_s):
                return self._link.recv()
            failure = f"timeout: {entry.timeout_setting}={entry.timeout_s}"
        except (EOFError, OSError):
            failure = f"crash: {self._obituary()}"
        self.kill()
        return [(0.0, failure)] * len(asked)

    def _get_ready(self) -> None:
        """A running process that has loaded its functions."""
        if self._link is None or self._process.poll() is not None:  # it may have died since its last answer
            self.kill()
            self._launch()
        if self._ready:
            return
        named = self.entries[0].named
        try:
            said = self._link.recv() if self._link.poll(START_S) else "no sign of life"
        except (EOFError, OSError):
            said = self._obituary()
        if isinstance(said, tuple):
            named, said = said
        if said != READY:
            self.kill()
            raise ConfigError(f"{named}: its checking process does not start: {said}")
        self._ready = True

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
            code = f"import sys; sys.path[:] = {sys.path!r}; from {self.inside} import serve; serve({theirs.fileno()})"
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
        with contextlib.suppress(OSError):  # it has ended already: who waits for it hears how
            self._link.send((self.entries, self.config))

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


def serve(fd: int) -> None:
    """Answer calls until the trainer closes the connection or dies."""
    link = Connection(fd)
    functions = load_functions(link)
    if functions is None:
        return
    worker = os.getpid()
    while True:
        try:
            place, asked = link.recv()
        except (EOFError, OSError):
            return
        function = functions[place]
        end_if_stuck(function.entry.timeout_s)
        try:
            said = call_with(function, asked)
            verdicts = _verdicts(said, len(asked)) if function.kind == "batch" else [verdict(said)]
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        except BaseException as error:  # SystemExit too: it is the call's, not the worker's
            verdicts = [failed(error)] * len(asked)
        if os.getpid() != worker:  # a reward that forked and let the child return: its answer is one too many
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            link.send(verdicts)
        except OSError:
            return


def load_functions(link: Connection) -> list[RewardFunction] | None:
    """Load the functions that the trainer names, limit the memory of their calls, and say so; None if that failed."""
    entry = None
    try:
        entries, config = link.recv()
        functions = []
        for entry in entries:
            functions.append(load_reward(entry, rules_of(config)))
            if package := NEEDS.get(entry.function):  # now: it may take longer than a call may
                importlib.import_module(package)
        _limit_memory(config.memory_gb)
    except BaseException as error:
        with contextlib.suppress(OSError):
            link.send((entry.named, _described(error)) if entry else _described(error))
        return None
    link.send(READY)
    return functions


def end_if_stuck(timeout_s: float) -> None:
    """Let the kernel end this process if it is in a call far beyond its deadline: a dead trainer left it behind. A
    living one has killed it by then."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)


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
    return 0.0, f"error: {_described(error)}{''.join(notes)[:500]}"


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


def _described(error: BaseException) -> str:
    """The error in one line of text that can be logged; whatever its own text does is the call's fault as well."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = type(error).__name__
    return " ".join(text.encode("utf-8", "backslashreplace").decode()[:500].split())


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
