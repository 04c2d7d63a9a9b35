"""A deadline for work that may hang: an error from Python code, and an end of the process if C code never returns."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

from rethinker.runtime import signals

# A hung collective never returns to Python. After this much more time the process ends, so that the launcher
# stops the other ranks too.
GRACE_S = 60.0


class Deadline:
    """`with Deadline(...) as deadline:` and call `deadline.check()` between the parts of the work.

    Args:
        what: the work, for the message ("the rollout of 64 prompts").
        seconds: time allowed: rollout.timeout_s.
    """

    def __init__(self, what: str, seconds: float):
        self.message = f"{what} did not end within rollout.timeout_s={seconds:g} seconds; raise it if the work is long"
        self.seconds = seconds

    def __enter__(self) -> Deadline:
        self.end = time.monotonic() + self.seconds
        self._timer = threading.Timer(self.seconds + GRACE_S, self._end_process)
        self._timer.daemon = True
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def check(self, progress: str = "") -> None:
        """Raise once the time is up; `progress` says how far the work came.

        Raises:
            TimeoutError: naming the work and the setting.
            StopRequested: the process was asked to stop, and this work may be broken off.
        """
        signals.check()
        if time.monotonic() > self.end:
            raise TimeoutError(f"{self.message} ({progress})" if progress else self.message)

    def _end_process(self) -> None:
        print(f"{self.message}. Stuck at:", file=sys.stderr)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)
