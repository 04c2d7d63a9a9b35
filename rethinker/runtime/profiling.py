"""Where a step's time goes: named phases (wall time and NVTX ranges) and torch profiler traces of chosen steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

# The parts of a step, in their order; `time_<name>_s` in metrics.jsonl is the time of each.
PHASES = ("rollout", "reward", "rethink", "train", "sync", "checkpoint")


on_progress: list[Callable[[], None]] = []
"""Called whenever a phase begins or ends: a log that is open (logs.py) puts off its report of a stall."""


def _progress() -> None:
    for call in on_progress:
        call()


@contextmanager
def phase(name: str, times: dict[str, float] | None = None) -> Iterator[None]:
    """Mark a phase of the step for Nsight, add its wall time to `times` as `time_<name>_s`, and put off the report of a
    stall. The time is the host's: work that is queued on the GPU counts where the host waits for it."""
    _progress()
    torch = sys.modules.get("torch")  # only a process that uses torch can use CUDA
    start = time.perf_counter()
    with torch.cuda.nvtx.range(name) if torch and torch.cuda.is_initialized() else nullcontext():
        try:
            yield
        finally:
            _progress()
            if times is not None:
                key = f"time_{name}_s"
                times[key] = times.get(key, 0.0) + time.perf_counter() - start


class StepProfiler:
    """Writes one torch profiler trace (for Perfetto or chrome://tracing) of the steps of `profile.steps`."""

    def __init__(self, spec: str | None, folder: Path) -> None:
        """`spec` is `profile.steps`, and the trace `trace_steps_3_5.json` in the run's folder."""
        self.steps = range(*map(int, spec.split(":"))) if spec else range(0)
        self.file = folder / f"trace_steps_{self.steps.start}_{self.steps.stop}.json"
        self._profile = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Runs optimizer step number `step`, recorded if it was asked for."""
        if step in self.steps and self._profile is None:
            from torch.profiler import profile

            self._profile = profile(record_shapes=True)
            self._profile.start()
        yield
        if step + 1 not in self.steps:
            self.close()

    def close(self) -> None:
        """Write the trace if one is being recorded: also when the run ends inside the chosen steps."""
        if self._profile is not None:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self.file))
            self._profile = None
