"""Runs the variants of `benchmarks.train_step`, each in a process of its own: check it, then time it."""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.train_step_variants import VARIANTS, Prepared, Settings, behaviour_logps
from benchmarks.train_step_workload import Size, Workload, build_model, flops, model_config
from rethinker.policy.throughput import PEAK_FLOPS
from rethinker.runtime.profiling import phase

TOLERANCES = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 2e-1)}
"""(absolute error of the loss, relative L2 error of the gradients) that still counts as agreement.

Rounding alone makes gradient errors of about 2e-6 in fp32, and of 1e-2 in bf16 with 6 layers or 6e-2 with 36 (random
weights); a response read one position too late makes 1.
"""

GRADIENT_ENTRIES = 4096  # compared of each parameter, evenly spaced
_DEADLINE_S = 1800  # of a variant

Checked = tuple[float, dict[str, np.ndarray]]
"""A step's loss and its `gradients`."""


@dataclass(frozen=True)
class Job:
    """A variant's work, as its process gets it."""

    variant: str
    size: Size
    layers: int | None
    workload: Workload
    settings: Settings
    repeats: int
    threads: int
    trace: Path | None


def step(model: nn.Module, prepared: Prepared, device: str) -> Tensor:
    """Forward and backward of every micro-batch; the step's loss. Gradients are in the model's parameters."""
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    for batch in prepared.batches:
        on_device = batch.to(device)
        with phase("forward"):
            loss = prepared.loss(on_device)
        with phase("backward"):
            loss.backward()
        total += loss.detach()
    return total


def gradients(model: nn.Module) -> dict[str, np.ndarray]:
    """About GRADIENT_ENTRIES entries of every parameter's gradient, fp32. As arrays: each tensor sent opens a file."""
    taken = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            flat = parameter.grad.flatten()
            stride = max(1, flat.numel() // GRADIENT_ENTRIES) | 1  # odd: not the same column of every row
            taken[name] = flat[::stride].float().cpu().numpy()
    return taken


def run_variant(pipe: Any, job: Job) -> None:
    """A variant's process: sends ("checked", loss, gradients), then answers what it is asked.

    "warm" by ("warm",), "step" by ("seconds", wall, CPU), "end" by ("measured", result), its last; "stop" by nothing.
    Where it cannot go on, it sends ("skipped" or "failed", reason).
    """
    try:
        _run_variant(pipe, job)
    except ImportError as error:
        pipe.send(("skipped", _first_line(error)))
    except torch.OutOfMemoryError as error:
        pipe.send(("failed", f"out of memory: {_first_line(error)}"))
    except Exception as error:  # a peer's failure is a result of its own
        pipe.send(("failed", f"{type(error).__name__}: {_first_line(error)}"))


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]


def _run_variant(pipe: Any, job: Job) -> None:
    torch.set_num_threads(job.threads)
    device, on_gpu = job.settings.device, job.settings.device == "cuda"
    model = build_model(model_config(job.size, job.layers), device, job.settings.dtype)
    # transformers checkpoints only in training mode; there is no dropout in Qwen2.5-VL that this would switch on.
    model.train(job.settings.gradient_checkpointing)
    prepared = VARIANTS[job.variant](model, job.workload, job.settings)
    if on_gpu:
        prepared.batches = [_pinned(batch) for batch in prepared.batches]
    before = torch.cuda.memory_allocated() if on_gpu else _resident_bytes()
    loss = step(model, prepared, device)
    pipe.send(("checked", loss.item(), gradients(model)))
    while (asked := pipe.recv()) in ("warm", "step"):
        _synchronize(on_gpu)
        wall, cpu = time.perf_counter(), time.process_time()
        step(model, prepared, device)
        _synchronize(on_gpu)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if asked == "step":
            pipe.send(("seconds", wall, cpu))
            continue
        if job.trace:
            _trace(model, prepared, device, job)
        _reset_peak(on_gpu)
        pipe.send(("warm",))
    if asked != "end":
        return
    peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_resident_bytes()
    result = {
        "micro_batches": len(prepared.batches),
        "processed": asdict(prepared.counts),
        "useful_flops": flops(model, job.workload.useful),
        "processed_flops": flops(model, prepared.counts),
        "peak_flops": _peak_flops() if on_gpu else None,
        "memory_gib": (peak - before) / 2**30,
        "weights_gib": sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30,
    }
    pipe.send(("measured", result))


def _pinned(batch: Any) -> Any:
    return replace(batch, **{name: tensor.pin_memory() for name, tensor in vars(batch).items() if tensor is not None})


def _synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _trace(model: nn.Module, prepared: Prepared, device: str, job: Job) -> None:
    from torch.profiler import profile

    with profile(record_shapes=True) as recorded:
        step(model, prepared, device)
        _synchronize(device == "cuda")
    job.trace.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(job.trace / f"{re.sub(r'[^a-z]+', '_', job.variant)}.json"))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _reset_peak(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:  # so that what compiling took does not count; Linux only, as /proc is
        Path("/proc/self/clear_refs").write_text("5")


def _peak_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def agreement(mine: Checked, theirs: Checked) -> dict[str, Any]:
    """How far two variants' (loss, gradients) are apart.

    Returns:
        `loss_error`, absolute; `gradient_error`, the L2 norm of the difference over that of `theirs`, all parameters
        together, each scaled to norm 1 so that none drowns the others; `worst_error` and `worst_parameter`, that of
        the one that differs most; `missing`, parameters that only one of both has a gradient for.
    """
    (loss, ours), (expected, reference) = mine, theirs
    norms = {name: np.linalg.norm(gradient) for name, gradient in reference.items()}
    floor = 1e-4 * max(norms.values())
    errors = {}
    for name in sorted(ours.keys() & reference.keys()):
        # A gradient that is all but zero has no direction to agree on.
        errors[name] = float(np.linalg.norm(ours[name] - reference[name]) / max(norms[name], floor))
    worst = max(errors, key=lambda name: np.nan_to_num(errors[name], nan=np.inf))
    return {
        "loss": loss,
        "loss_error": abs(loss - expected),
        "gradient_error": statistics.fmean(error**2 for error in errors.values()) ** 0.5,
        "worst_error": errors[worst],
        "worst_parameter": worst,
        "missing": sorted(ours.keys() ^ reference.keys()),
    }


def agrees(found: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether the errors of `agreement` are within TOLERANCES; NaN never is."""
    loss, gradient = TOLERANCES[dtype]
    return found["loss_error"] <= loss and found["gradient_error"] <= gradient and not found["missing"]


class Side:
    """A variant in a process of its own, and what has been measured of it."""

    def __init__(self, job: Job) -> None:
        self.job, self.result, self.seconds, self.cpu_seconds = job, {}, [], []
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=run_variant, args=(other, job))
        self._process.start()
        other.close()

    @property
    def works(self) -> bool:
        """Whether nothing has stopped it yet."""
        return not self.result.keys() & {"skipped", "failed"}

    def ask(self, message: str | None) -> list[Any] | None:
        """Send `message`, if any, and return the answer's values; None, with a reason in `result`, if there is none."""
        try:
            if message:
                self._pipe.send(message)
            if not self._pipe.poll(_DEADLINE_S):
                kind, values = "failed", [f"no answer in {_DEADLINE_S} s"]
            else:
                kind, *values = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            kind, values = "failed", [f"its process ended with exit code {self._process.exitcode}"]
        if kind in ("skipped", "failed"):
            self.result[kind] = values[0]
            return None
        return values

    def check(self, first: tuple[str, Checked] | None) -> tuple[str, Checked] | None:
        """Hold its first step against that of the first variant that worked; returns the latter's name and step."""
        found = self.ask(None)
        if found is None:
            return first
        mine = (found[0], found[1])
        first = first or (self.job.variant, mine)
        self.result["agreement"] = agreement(mine, first[1]) | {"with": first[0]}
        if not agrees(self.result["agreement"], self.job.settings.dtype):
            self.result["failed"] = f"disagrees with {first[0]}: {self.result['agreement']}"
        return first

    def step(self) -> None:
        """Take a timed step."""
        if found := self.ask("step"):
            self.seconds.append(found[0])
            self.cpu_seconds.append(found[1])

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):  # it may have ended already
            self._pipe.send("stop")
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def compare(jobs: list[Job], *, in_turns: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Check every variant against the first one that works, and time those that agree.

    Args:
        jobs: one per variant.
        in_turns: all processes live at once and take their steps in turn, so that other load on the machine meets all
            of them; otherwise one variant at a time, as a GPU's memory wants it.

    Yields:
        (variant, result): `agreement` and the figures, or `skipped` or `failed` with the reason.
    """
    first = None
    for together in [jobs] if in_turns else [[job] for job in jobs]:
        sides: list[Side] = []
        try:
            for job in together:
                sides.append(Side(job))
                first = sides[-1].check(first)
                if sides[-1].works:
                    sides[-1].ask("warm")  # the first step compiled; this one meets every shape again
            for _ in range(together[0].repeats):
                for side in sides:
                    if side.works:
                        side.step()
            for side in sides:
                if side.works and (measured := side.ask("end")):
                    side.result |= _summary(side, measured[0])
        finally:
            for side in sides:
                side.close()
        yield from ((side.job.variant, side.result) for side in sides)


def _summary(side: Side, measured: dict[str, Any]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(side.seconds, n=4, method="inclusive")
    peak, useful, processed = (measured.pop(f"{name}_flops") for name in ("peak", "useful", "processed"))
    return {
        "median_s": median,
        "quartiles_s": [low, high],
        "cpu_median_s": statistics.median(side.cpu_seconds),
        "repeats": len(side.seconds),
        "useful_tokens_per_s": side.job.workload.useful.tokens / median,
        "processed_tokens_per_s": measured["processed"]["tokens"] / median,
        "useful_tflop": useful / 1e12,
        "processed_tflop": processed / 1e12,
        "useful_mfu": peak and useful / (median * peak),
        "processed_mfu": peak and processed / (median * peak),
        **measured,
    }


def _peak_flops() -> float | None:
    """Of this GPU, dense bf16; None if it is not in the list. The parent never asks: it would hold GPU memory."""
    name = torch.cuda.get_device_name(0)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def score(job: Job) -> list[list[float]]:
    """`behaviour_logps` of the job's model and workload; for a process of its own."""
    torch.set_num_threads(job.threads)
    model = build_model(model_config(job.size, job.layers), job.settings.device, job.settings.dtype)
    return behaviour_logps(model, job.workload, job.settings)
