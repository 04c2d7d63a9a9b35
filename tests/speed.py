"""How fast work is, whatever else its process and the machine do meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable


def least_cpu_s(work: Callable[[], object], times: int = 5) -> float:
    """The least CPU seconds that this thread spends on the work in so many calls.

    A single call may take ten times as long: a collection of all the garbage of the tests before falls into it, or
    another process empties the caches. What is slow by itself is slow in every call.
    """
    taken = []
    for _ in range(times):
        start = time.thread_time()
        work()
        taken.append(time.thread_time() - start)
    return min(taken)
