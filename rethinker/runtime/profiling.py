"""Where a step's time goes: named phases (wall time and NVTX ranges) and torch profiler traces of chosen steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rethinker.config import ConfigError

# The parts of a step, in their order; `time_<name>_s` in metrics.jsonl is the time of each.
PHASES = ("rollout", "reward", "rethink", "train", "sync", "checkpoint")


@dataclass(frozen=True)
class Activity:
    """The phases that are open, outermost first, and when one last began or ended (time.monotonic, seconds)."""

    phases: tuple[str, ...]
    since: float


activity = Activity((), time.monotonic())  # of this process; the watchdog reads it


@contextmanager
def phase(name: str, times: dict[str, float] | None = None, watched: bool = True) -> Iterator[None]:
    """Mark a phase of the step for Nsight and the watchdog, and add its wall time.

    The NVTX range costs nothing when no profiler listens, and is left out without CUDA. The time is the host's: work
    the phase queued on the GPU counts where the host waits for it.

    Args:
        name: `rollout`, `reward`, `train`, `sync`, ...
        times: its entry `time_<name>_s` grows by the seconds spent here.
        watched: False in a thread beside the loop's, which alone the watchdog follows.
    """
    global activity
    outer = activity.phases
    if watched:
        activity = Activity((*outer, name), time.monotonic())
    torch = sys.modules.get("torch")  # only a process that uses torch can use CUDA
    start = time.perf_counter()
    with torch.cuda.nvtx.range(name) if torch and torch.cuda.is_initialized() else nullcontext():
        try:
            yield
        finally:
            if watched:
                activity = Activity(outer, time.monotonic())
            if times is not None:
                key = f"time_{name}_s"
                times[key] = times.get(key, 0.0) + time.perf_counter() - start


def parse_steps(spec: str | None) -> range:
    """`"3:5"` to `range(3, 5)`; null to an empty range.

    Raises:
        ConfigError: naming profile.steps.
    """
    if spec is None:
        return range(0)
    first, colon, end = spec.partition(":")
    if not colon or not first.isdecimal() or not end.isdecimal() or not 0 < int(first) < int(end):
        raise ConfigError(f"profile.steps={spec} must be first:end with 0 < first < end, as 3:5 for steps 3 and 4")
    return range(int(first), int(end))


class StepProfiler:
    """Writes one torch profiler trace (for Perfetto or chrome://tracing) of the steps of `profile.steps`."""

    def __init__(self, spec: str | None, folder: Path) -> None:
        """Args:
        spec: `profile.steps`; null profiles nothing.
        folder: the run's folder; the trace is `trace_steps_3_5.json` there.
        """
        self.steps = parse_steps(spec)
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
