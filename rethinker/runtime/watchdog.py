"""Says where a run hangs: after `run.stall_s` without progress every rank writes the stacks of its threads to its log.

A Python thread does this, so that a report has phase, step and time, and the next one can wait longer. It needs the
interpreter, which C code may hold for ever; so each time it wakes it also puts off a timer of faulthandler, whose own C
thread writes the stacks when nobody puts it off any more. Nothing is ended here: see rollout/deadline.py.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from contextlib import suppress

from rethinker.runtime import profiling
from rethinker.runtime.logs import RankLog


class Watchdog:
    """`with Watchdog(...) as watchdog:` around the loop, which sets `watchdog.step`."""

    def __init__(self, stall_s: float, log: RankLog, rank: int) -> None:
        """Args:
        stall_s: `run.stall_s`: report when no phase has begun or ended for so long; then after twice that, and so on.
        log: this rank's, open.
        rank: for the messages.
        """
        self.step = 0
        self._stall_s, self._log, self._rank = stall_s, log, rank
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        profiling.activity = profiling.Activity((), time.monotonic())
        self._put_off_timer()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(timeout=1)  # it may be stuck in a write itself
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        seen, reports = profiling.activity, 0
        # Often enough that a report is late by a tenth at most.
        while not self._ended.wait(self._stall_s / 10):
            self._put_off_timer()
            before, seen = seen, profiling.activity
            if seen is not before:
                if reports:
                    self._write(f"rank {self._rank}: step {self.step} goes on\n")
                reports = 0
            still = time.monotonic() - seen.since
            if still >= self._stall_s * 2**reports:
                self._report(seen.phases, still)
                reports += 1

    def _put_off_timer(self) -> None:
        faulthandler.dump_traceback_later(1.5 * self._stall_s, repeat=True, file=self._log.descriptor)

    def _report(self, phases: tuple[str, ...], seconds: float) -> None:
        where = f"in {' > '.join(phases)}" if phases else "between the phases"
        what = (
            f"rank {self._rank}: no progress for {seconds:.3g} s {where} of step {self.step} "
            f"(run.stall_s={self._stall_s:g})"
        )
        self._write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {what}; all threads:\n")
        faulthandler.dump_traceback(file=self._log.descriptor, all_threads=True)
        # Not through sys.stderr or logging: the thread that hangs may hold their locks.
        self._write(f"{what}; stacks in {self._log.path}\n", to=2)

    def _write(self, text: str, to: int | None = None) -> None:
        with suppress(OSError):  # a full disk, a closed terminal
            os.write(self._log.descriptor if to is None else to, text.encode())
