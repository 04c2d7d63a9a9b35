"""A process that can be killed: its handle in the trainer, and what each kind of them does inside.

It is a fresh interpreter, not a fork (the trainer has threads) and not multiprocessing's spawn (which imports the
trainer's main module again). It has one message at a time, so the trainer knows which one a dead process was at.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, ClassVar, TypeVar

from rethinker.config import ConfigError

T = TypeVar("T")

# Until a process has imported what it needs; far beyond any healthy start, since a loaded machine is slow.
START_S = 120.0
# Until a message that has begun has gone through: large ones take seconds, and one that stops half-way would for ever.
TRANSFER_S = 120.0
READY = "ready"
OUT_OF_MEMORY = 77  # exit code


class LostError(Exception):
    """A process that was lost over a message.

    `reason` is `timeout`, `memory` (it wanted more than it may have) or `crash`; the text says how it ended.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Killable:
    """A process that answers messages, one at a time; `start` or the first message starts it, and the next message
    after each `kill` again.

    Args:
        named: the setting that needs it and its value, for messages.
        opening: the first thing that it is sent: what it needs to get ready.
        memory_gb: what `limit_memory` has in it, GiB, for messages.
    """

    inside: str
    """The module whose `serve`, called with the number of its end of the connection, runs in the process."""
    what = "process"
    """What messages call it."""
    closed = "the process is closed"
    """What a message to a closed one is answered."""
    variables: ClassVar[dict[str, str]] = {}
    """Variables of its environment, beside the trainer's."""

    def __init__(self, named: str, opening: Any, memory_gb: float) -> None:
        self._named, self._opening, self._memory_gb = named, opening, memory_gb
        self._process: subprocess.Popen | None = None
        self._link: Connection | None = None
        self._ready = False  # it has said so
        self._closed, self._busy = False, threading.Lock()

    def start(self) -> None:
        """Start the process without waiting for it: the first message does, and says what went wrong in it."""
        with self._busy:
            if self._link is None and not self._closed:
                self._launch()

    def ask(self, message: Any, timeout_s: float) -> Any:
        """What it answers to a message.

        Raises:
            LostError: it did not answer in time, or died; it has been killed.
            ConfigError: the process does not start, or cannot get ready.
            RuntimeError: it is closed.
        """
        with self._in_use():
            self._get_ready()
            try:
                self._link.send(message)
                if self._link.poll(timeout_s):
                    return self._received()
                lost = LostError("timeout", f"no answer within {timeout_s:g} seconds")
            except (EOFError, OSError):
                lost = self._obituary()
            self.kill()
            raise lost

    def close(self) -> None:
        """End the process for good; a message under way fails."""
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
            except (ConfigError, LostError):
                if not self._closed:  # else its process was ended by that
                    raise
            raise RuntimeError(self.closed)

    def _received(self) -> Any:
        """The answer that has arrived; a subclass may read another form."""
        return self._link.recv()

    def _get_ready(self) -> None:
        """A running process that has what it needs."""
        if self._link is None or self._process.poll() is not None:  # it may have died since its last answer
            self.kill()
            self._launch()
        if self._ready:
            return
        named = self._named
        try:
            said = self._link.recv() if self._link.poll(START_S) else "no sign of life"
        except (EOFError, OSError):
            said = str(self._obituary())
        if isinstance(said, tuple):
            named, said = said[0] or named, said[1]
        if said != READY:
            self.kill()
            raise ConfigError(f"{named}: its {self.what} does not start: {said}")
        self._ready = True

    def _end(self) -> None:
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        for limit in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, limit, struct.pack("ll", int(TRANSFER_S), 0))
        with theirs:
            code = f"import sys; sys.path[:] = {sys.path!r}; from {self.inside} import serve; serve({theirs.fileno()})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={"OMP_NUM_THREADS": "1", **os.environ, **self.variables},
                start_new_session=True,  # so that it and its children can be killed as one, and Ctrl-C is not theirs
            )
        if self._closed:  # meanwhile: `close` did not know this process yet
            self._end()
        self._link = Connection(ours.detach())
        with contextlib.suppress(OSError):  # it has ended already: who waits for it hears how
            self._link.send(self._opening)

    def _obituary(self) -> LostError:
        """How a process that died ended."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return LostError("crash", "the connection was closed")
        if code == OUT_OF_MEMORY:
            return LostError("memory", f"more than {self._memory_gb:g} GiB of memory")
        if code < 0:
            with contextlib.suppress(ValueError):
                return LostError("crash", signal.Signals(-code).name)
        return LostError("crash", f"exit code {code}")


def prepared(link: Connection, prepare: Callable[[Any], T]) -> T | None:
    """Inside: what `prepare` makes of the opening, and the trainer told that the process is ready; None if that failed,
    and the trainer told why. An error's `named`, where it has one, is the setting to blame."""
    try:
        made = prepare(link.recv())
    except BaseException as error:
        with contextlib.suppress(OSError):
            link.send((getattr(error, "named", None), described(error)))
        return None
    link.send(READY)
    return made


def answer_all(
    link: Connection,
    answer: Callable[[Any], Any],
    timeout_of: Callable[[Any], float],
    send: Callable[[Any], None] | None = None,
) -> None:
    """Inside: answer messages, one after the other, until the trainer closes the connection or dies.

    Args:
        answer: of a message; what it raises but MemoryError, with which the process ends, is for itself to answer.
        timeout_of: of a message, in seconds.
        send: how answers are sent, by default as pickles.
    """
    own = os.getpid()
    while True:
        try:
            message = link.recv()
        except (EOFError, OSError):
            return
        end_if_stuck(timeout_of(message))
        try:
            said = answer(message)
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        if os.getpid() != own:  # a call that forked and let the child return: its answer is one too many
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            (send or link.send)(said)
        except OSError:
            return


def end_if_stuck(timeout_s: float) -> None:
    """Let the kernel end this process if it is at a message far beyond its deadline: a dead trainer left it behind. A
    living one has killed it by then."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)


def described(error: BaseException) -> str:
    """The error in one line of text that can be logged; whatever its own text does is the call's fault as well."""
    try:
        text = f"{type(error).__name__}: {error}"
    except BaseException:
        text = type(error).__name__
    return " ".join(text.encode("utf-8", "backslashreplace").decode()[:500].split())


def limit_memory(memory_gb: float) -> None:
    """Bound what the process may add to its data memory (address space would not do: CUDA reserves much of it), and let
    the kernel end this process first when memory runs out."""
    import resource

    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[5]) * resource.getpagesize()
    size = taken + int(memory_gb * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
