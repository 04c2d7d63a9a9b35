"""Stopping when asked: SIGTERM, SIGINT and their kin let the step end and the run be saved; a second one does not wait.

A launcher may pass on a signal that the terminal or the scheduler has sent to every process already, so two signals
within `_SAME_S` seconds are one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar

# kill and torchrun send TERM, Ctrl-C INT, Slurm with --signal=USR1@300 USR1, a terminal that closes HUP.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_SAME_S = 2.0


class StopRequested(Exception):
    """Raised by `check` in work that may be thrown away: it is done again when the run is resumed."""


class _State:
    name: str | None = None  # of the signal
    at = 0.0


# In work of this thread that a stop may break off: an event that may break it off, too.
_interruptible: ContextVar[threading.Event | None] = ContextVar("interruptible", default=None)


def requested() -> str | None:
    """The name of the signal that asked this process to stop, or None."""
    return _State.name


def check() -> None:
    """Called between the parts of long work.

    Raises:
        StopRequested: a stop was asked for, and the work is within `interruptible`.
    """
    abandoned = _interruptible.get()
    if abandoned is not None and (_State.name is not None or abandoned.is_set()):
        raise StopRequested(_State.name or "abandoned")


@contextlib.contextmanager
def interruptible(abandoned: threading.Event | None = None) -> Iterator[None]:
    """Work of this thread that a stop may break off, and so may the event `abandoned`."""
    outer = _interruptible.set(abandoned or threading.Event())
    try:
        yield
    finally:
        _interruptible.reset(outer)


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Within, the signals ask to stop instead of ending the process; one that is ignored (nohup) stays ignored."""
    _State.name, _State.at = None, 0.0
    if threading.current_thread() is not threading.main_thread():  # Python handles signals there only
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: object) -> None:
    now = time.monotonic()
    name = signal.Signals(number).name
    if _State.name is not None and now - _State.at > _SAME_S:
        _say(f"{name}: leaving at once, without saving")
        os._exit(128 + number)
    if _State.name is None:
        _State.name, _State.at = name, now
        if os.environ.get("RANK", "0") == "0":
            _say(f"{name}: the step ends, then the run is saved; once more leaves at once")


def _say(text: str) -> None:
    # Not print(): the signal may have arrived within a print.
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{text}\n".encode())
