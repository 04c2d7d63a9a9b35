"""How long a step takes: the device's time with its queue kept full, the host's time apart from it, and memory."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Step = Callable[[], Any]

_LONGEST_WAIT_MS = 20.0  # a step that takes the host longer than this is not queued whole


def measure(step: Step, repeats: int, *, seconds: float = 0.0) -> dict[str, Any]:
    """Time a step and the memory it takes beyond its inputs.

    On a GPU the step's launches are queued behind a kernel that only waits, so that the time from its first launch to
    the end of its last one holds no gap in which the device waited for the host (unless the step itself waits for the
    device); the L2 cache is overwritten before every repeat. Without a GPU both times are the wall clock's.

    Args:
        step: called `repeats` times after three calls (or `repeats`, if fewer) that are not counted.
        repeats: at least so many.
        seconds: go on at least for so long, and count the second half only: a GPU at its power limit lowers its
            clocks within a second.

    Returns:
        `median_ms` and `quartiles_ms` of the device's time; `host_ms`, the median time until a call returns with
        nothing queued before it; `memory_mib`, the peak beyond what was allocated before (None without a GPU, where a
        process's peak cannot be told apart by step); `repeats`.
    """
    host = [_host_ms(step) for _ in range(min(3, repeats))]
    on_gpu = torch.cuda.is_available()
    times, memory = [], None
    start = time.perf_counter()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        scratch = torch.empty(
            max(2 * torch.cuda.get_device_properties(0).L2_cache_size, 1), dtype=torch.uint8, device="cuda"
        )
        wait_ms = min(1.5 * min(host) + 0.1, _LONGEST_WAIT_MS)
        while len(times) < repeats or time.perf_counter() - start < seconds:
            scratch.zero_()
            wait(wait_ms)
            times.append(_device_ms(step))
        memory = (torch.cuda.max_memory_allocated() - before - scratch.numel()) / 2**20
    else:
        while len(times) < repeats or time.perf_counter() - start < seconds:
            times.append(_host_ms(step))
    if seconds:
        times = times[len(times) // 2 :]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else 3 * times
    return {
        "median_ms": median,
        "quartiles_ms": [low, high],
        "host_ms": statistics.median(host) if on_gpu else median,
        "memory_mib": memory,
        "repeats": len(times),
    }


def _host_ms(step: Step) -> float:
    """Until the call returns."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - start)


def _device_ms(step: Step) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def wait(milliseconds: float) -> None:
    """Queue a kernel that does nothing for about so long."""
    torch.cuda._sleep(int(milliseconds * _cycles_per_ms()))


@functools.cache
def _cycles_per_ms() -> float:
    cycles = 20_000_000
    torch.cuda._sleep(cycles)  # its first launch loads it
    return cycles / _device_ms(lambda: torch.cuda._sleep(cycles))


def kernels_of(step: Step, most: int = 12) -> list[dict[str, Any]]:
    """The step's kernels (operators, without a GPU) by the time they take: `name`, `count`, `ms`."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    kind = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, kind))[:most]
    return [{"name": e.key[:100], "count": e.count, "ms": getattr(e, kind) / 1e3} for e in events if getattr(e, kind)]
