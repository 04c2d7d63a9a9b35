"""One log file per rank, `logs/rank_00000.log`: messages, warnings, the error that ended the run, stacks of a crash.

The file rotates. Python's writers follow it by themselves; those that only know a file descriptor (faulthandler, which
writes while the interpreter may be dead) get one that is pointed at the new file at each rotation.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from logging.handlers import RotatingFileHandler
from pathlib import Path

# A rank writes some kB per hour, and about 50 kB with every dump of its stacks: a file holds weeks, or 200 dumps, and
# a library that floods the log cannot fill the disk: 60 MB per rank at most.
MAX_BYTES = 10_000_000
OLDER_FILES = 5

# Loggers of libraries that keep their messages to themselves.
_CLOSED_LOGGERS = ("DeepSpeed", "transformers", "vllm")


class RankLog:
    """`with RankLog(...) as log:` sends this process's messages to its file; on rank 0 warnings also to stderr."""

    def __init__(self, folder: Path, rank: int) -> None:
        """Args:
        folder: the run's `logs`; it is made.
        rank: names the file.
        """
        self.path = folder / f"rank_{rank:05d}.log"
        self._rank = rank

    def __enter__(self) -> RankLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _RankFile(self.path, self._rank)
        self.descriptor = self._file.descriptor
        self._handlers: list[logging.Handler] = [self._file]
        if self._rank == 0:
            self._handlers.append(screen := logging.StreamHandler())
            screen.setLevel(logging.WARNING)
        root = logging.getLogger()
        for handler in self._handlers:
            root.addHandler(handler)
        follow(*_CLOSED_LOGGERS)
        logging.captureWarnings(True)
        self._had_faulthandler = faulthandler.is_enabled()
        faulthandler.enable(file=self.descriptor)
        self._hook, threading.excepthook = threading.excepthook, self._thread_ended
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self._file.note(logging.CRITICAL, f"ended by {kind.__name__}: {error}", error)
        threading.excepthook = self._hook
        faulthandler.enable(file=sys.__stderr__) if self._had_faulthandler else faulthandler.disable()
        logging.captureWarnings(False)
        for name in (None, *_CLOSED_LOGGERS):
            for handler in self._handlers:
                logging.getLogger(name).removeHandler(handler)
        self._file.close()
        os.close(self.descriptor)

    def _thread_ended(self, happened: threading.ExceptHookArgs) -> None:
        if happened.exc_value is not None:
            name = happened.thread.name if happened.thread else "?"
            self._file.note(logging.ERROR, f"thread {name} ended by an error", happened.exc_value)
        self._hook(happened)


def follow(*names: str) -> None:
    """Let the open log, if there is one, hear loggers that do not propagate; again after a library configured them."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _RankFile):
            for name in names:
                logging.getLogger(name).addHandler(handler)  # a second time does nothing


class _RankFile(RotatingFileHandler):
    """The rotating file, and a descriptor that stays valid over rotations."""

    def __init__(self, path: Path, rank: int) -> None:
        super().__init__(path, maxBytes=MAX_BYTES, backupCount=OLDER_FILES, encoding="utf-8")
        form = f"%(asctime)s.%(msecs)03d rank {rank} %(levelname)s %(name)s: %(message)s"
        self.setFormatter(logging.Formatter(form, datefmt="%Y-%m-%dT%H:%M:%S"))
        self.descriptor = os.dup(self.stream.fileno())  # appends too, so the writers do not overwrite each other

    def doRollover(self) -> None:
        """Start a new file; whoever holds the descriptor writes there from now on, without a moment in between."""
        super().doRollover()
        os.dup2(self.stream.fileno(), self.descriptor, inheritable=False)

    def note(self, level: int, message: str, error: BaseException) -> None:
        """Write a message with an error's traceback to this file only: the screen gets it from Python itself."""
        trace = (type(error), error, error.__traceback__)
        self.handle(logging.LogRecord("rethinker", level, __file__, 0, message, (), trace))
