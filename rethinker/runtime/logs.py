"""One log file per rank, `logs/rank_00000.log`: messages, warnings, errors that ended the run or a thread, and stacks.

faulthandler writes the stacks of all threads there when the process crashes in C code, and whenever no phase
(profiling.py) has begun or ended for `run.stall_s`: from a C thread of its own, so also while C code that hangs keeps
the interpreter. Nothing is ended here: see rollout/deadline.py.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rethinker.runtime import profiling

# Loggers of libraries that keep their messages to themselves.
_CLOSED_LOGGERS = ("DeepSpeed", "transformers", "vllm")


class _RankFile(logging.FileHandler):
    """The log that `rank_log` has opened, for `follow` to find."""


@contextmanager
def rank_log(folder: Path, rank: int, stall_s: float) -> Iterator[Path]:
    """Within, this process's messages and stacks go to its file in `folder`; on rank 0 warnings also to stderr."""
    folder.mkdir(parents=True, exist_ok=True)
    path, root = folder / f"rank_{rank:05d}.log", logging.getLogger()
    file, screen = _RankFile(path, encoding="utf-8"), logging.StreamHandler()
    form = f"%(asctime)s.%(msecs)03d rank {rank} %(levelname)s %(name)s: %(message)s"
    file.setFormatter(logging.Formatter(form, datefmt="%Y-%m-%dT%H:%M:%S"))
    screen.setLevel(logging.WARNING)
    root.addHandler(file)
    if rank == 0:
        root.addHandler(screen)
    follow(*_CLOSED_LOGGERS)
    logging.captureWarnings(True)

    def thread_ended(by: threading.ExceptHookArgs) -> None:  # Python itself would write to stderr alone
        if by.exc_type is not SystemExit:
            root.error("%s ended", by.thread, exc_info=by[:3])

    show, threading.excepthook = threading.excepthook, thread_ended
    was_enabled = faulthandler.is_enabled()
    stacks = path.open("a")  # of its own: a library that configures logging closes the handler's, which opens it again
    faulthandler.enable(file=stacks)
    put_off = partial(faulthandler.dump_traceback_later, stall_s, repeat=True, file=stacks)
    profiling.on_progress.append(put_off)
    put_off()
    try:
        yield path
    except BaseException as error:
        root.removeHandler(screen)  # the screen gets it from Python itself
        logging.getLogger("rethinker").critical("ended by %s: %s", type(error).__name__, error, exc_info=error)
        raise
    finally:
        profiling.on_progress.remove(put_off)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.enable(file=sys.__stderr__) if was_enabled else faulthandler.disable()
        logging.captureWarnings(False)
        threading.excepthook = show
        for logger in map(logging.getLogger, (None, *_CLOSED_LOGGERS)):
            logger.removeHandler(file)
        root.removeHandler(screen)
        file.close()
        stacks.close()


def follow(*names: str) -> None:
    """Let the open log, if there is one, hear loggers that do not propagate; again after a library configured them."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _RankFile):
            for name in names:
                logging.getLogger(name).addHandler(handler)  # a second time does nothing
