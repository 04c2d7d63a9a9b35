"""The device's time is that of its work: the host's launches and the waiting for them are not in it."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing


class Device:
    """A simulated GPU with a clock of its own: work queues behind earlier work, and launching takes the host's time."""

    def __init__(self, launch_ms: float) -> None:
        self.host = self.busy_until = 0.0  # ms
        self.launch_ms = launch_ms

    def launch(self, ms: float) -> None:
        self.host += self.launch_ms
        self.busy_until = max(self.host, self.busy_until) + ms

    def synchronize(self) -> None:
        self.host = max(self.host, self.busy_until)

    def event(self, enable_timing: bool):
        made = SimpleNamespace(at=0.0)
        made.record = lambda: setattr(made, "at", max(self.host, self.busy_until))
        made.synchronize = self.synchronize
        made.elapsed_time = lambda other: other.at - made.at
        return made


@pytest.fixture
def device(monkeypatch):
    made = Device(launch_ms=0.2)
    scratch = SimpleNamespace(zero_=lambda: made.launch(0.05), numel=lambda: 2**20)
    cuda = {
        "is_available": lambda: True,
        "synchronize": made.synchronize,
        "Event": made.event,
        "_sleep": lambda cycles: made.launch(cycles / 1e6),
        "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=2**19),
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 2**20,
        "max_memory_allocated": lambda: 5 * 2**20,
    }
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(
        timing, "torch", SimpleNamespace(cuda=torch.cuda, uint8=torch.uint8, empty=lambda *_, **__: scratch)
    )
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: made.host / 1e3))
    timing._cycles_per_ms.cache_clear()
    yield made
    timing._cycles_per_ms.cache_clear()


def test_gaps_between_launches_are_the_hosts(device):
    """Five kernels of 0.1 ms, each taking the host 0.2 ms to launch, are 0.5 ms of the device and 1 ms of the host."""

    def step():
        for _ in range(5):
            device.launch(0.1)

    found = timing.measure(step, 7)
    assert found["median_ms"] == pytest.approx(0.5) and found["host_ms"] == pytest.approx(1.0)
    assert found["repeats"] == 7 and found["memory_mib"] == pytest.approx(3)  # less the 1 MiB that clears the cache


def test_a_step_that_waits_for_the_device_keeps_its_gaps(device):
    """Waiting inside the step is part of it: two kernels of 1 ms with a wait between them take both and the launch."""

    def step():
        device.launch(1.0)
        device.synchronize()
        device.launch(1.0)

    assert timing.measure(step, 3)["median_ms"] == pytest.approx(2.2)


def test_the_second_half_counts_when_a_time_is_given(device):
    """A device that slows down under load is measured as it is then."""
    taken = iter([1.0] * 40 + [2.0] * 10**6)
    found = timing.measure(lambda: device.launch(next(taken)), 3, seconds=0.5)
    assert found["median_ms"] == pytest.approx(2.0) and found["repeats"] > 60


def test_without_a_gpu_both_times_are_the_clocks():
    """On a CPU a step of 10 ms takes 10 ms of either, and memory is not told."""
    found = timing.measure(lambda: time.sleep(0.01), 3)
    assert 10 <= found["median_ms"] == found["host_ms"] < 50 and found["memory_mib"] is None


def test_operators_are_listed_by_time():
    """A step's largest operator comes first."""
    a = torch.randn(300, 300)
    names = [kernel["name"] for kernel in timing.kernels_of(lambda: (a @ a).sum())]
    assert names[0] == "aten::mm" and "aten::sum" in names
