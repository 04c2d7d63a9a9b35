"""Compiles csrc at its first use, keeps the result in the user's cache, and registers its ops with PyTorch.

The CPU library needs a C++ compiler, the CUDA library a CUDA build of PyTorch and nvcc too. Both use PyTorch's stable
ABI and nothing newer than torch 2.11. Where one cannot be built, a line on stderr says why and the PyTorch
implementation takes over, with the same results. Environment:

    RETHINKER_NATIVE=0  never compile
    CXX                 the C++ compiler, instead of g++, clang++ or c++, whichever is found first
    CUDA_HOME           where to look for bin/nvcc when it is not on the PATH
    XDG_CACHE_HOME      the cache is its folder rethinker_kernels (default ~/.cache)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"
"""Only what torch 2.11 has is used, so that a library depends on no newer one."""

NVCC_FLAGS = ["-O3", "-std=c++17", "-fmad=false"]  # no fused multiply-add: weights are the CPU's, bit for bit

_CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", STABLE_ABI]

BUILD_SECONDS = 300  # a compiler that takes longer hangs


class BuildError(Exception):
    """The library cannot be built here; the message says why in one line."""


def load(device_type: str) -> bool:
    """Whether the compiled ops run on tensors of this device type; builds and registers them when first asked.

    Args:
        device_type: "cpu" or "cuda"; others have no compiled ops.
    """
    if os.environ.get("RETHINKER_NATIVE") == "0" or device_type not in ("cpu", "cuda"):
        return False
    return _load(device_type)


@functools.cache
def _load(device_type: str) -> bool:
    if device_type == "cuda" and not _load("cpu"):  # which has the ops' schemas
        return False
    try:
        torch.ops.load_library(str(build(device_type)))
    except (BuildError, OSError) as error:
        reason = str(error).splitlines()[0]
        print(f"rethinker_kernels: the {device_type} sum tree runs in PyTorch, more slowly: {reason}", file=sys.stderr)
        return False
    if device_type == "cpu":
        for name in ("sum_tree_update_", "sum_tree_sample_", "sum_tree_sample_distinct_"):
            # What torch.compile needs to know: nothing is returned, the schema says what is written.
            torch.library.register_fake(f"rethinker::{name}", lambda *arguments: None)
    return True


def build(device_type: str, folder: Path | None = None) -> Path:
    """The compiled library, from the cache or made now; any number of processes may ask at once.

    The file's name holds a hash of all that goes into it, so it never is out of date. One process builds while the
    others wait for its lock; where a file system has no locks, the rename at the end still keeps every file whole.

    Args:
        device_type: "cpu" or "cuda".
        folder: where to keep it, instead of the user's cache.

    Raises:
        BuildError: there is no compiler, or it failed.
        OSError: the folder cannot be written.
    """
    compiler = _compiler()
    recipe = [torch.__version__, platform.machine(), *compiler, *_CXX_FLAGS, _version(*compiler)]
    if device_type == "cuda":
        nvcc = find_nvcc()
        recipe += [nvcc, *NVCC_FLAGS, *_architectures(), _version(nvcc)]
    inputs = hashlib.sha256()
    for part in recipe:
        inputs.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        inputs.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    folder = folder or _cache()
    library = folder / f"sum_tree_{device_type}_{inputs.hexdigest()[:20]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(library.with_suffix(".lock")):
        if not library.exists():
            print(f"rethinker_kernels: compiling the {device_type} sum tree, once", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=folder) as workplace:
                made = _compile(device_type, compiler, Path(workplace))
                os.replace(made, library)
    return library


def find_nvcc() -> str:
    """The CUDA compiler.

    Raises:
        BuildError: there is none.
    """
    homes = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    found = shutil.which("nvcc") or next((str(home / "nvcc") for home in homes if (home / "nvcc").exists()), None)
    if not found:
        raise BuildError("nvcc was not found; put it on the PATH or set CUDA_HOME")
    return found


def _compiler() -> list[str]:
    """The C++ compiler and the arguments that CXX gives it."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["clang++"], ["c++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise BuildError(f"no C++ compiler ({' '.join(wanted) or 'g++, clang++ or c++'}) was found; install one or set CXX")


def _architectures() -> list[str]:
    """Machine code for the GPUs of this machine."""
    found = sorted({torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())})
    if not torch.version.cuda or not found:
        raise BuildError("there is no CUDA device, or PyTorch is not a CUDA build")
    return [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}" for major, minor in found]


def _compile(device_type: str, compiler: list[str], workplace: Path) -> Path:
    """Compile and link in an empty folder."""
    package, made = Path(torch.__file__).parent, workplace / "made.so"
    headers, libraries = f"-I{package / 'include'}", [f"-L{package / 'lib'}", "-ltorch_cpu"]
    compile_cpp = [*compiler, *_CXX_FLAGS, headers]
    if device_type == "cpu":
        _run(*compile_cpp, "-shared", str(SOURCES / "sum_tree_cpu.cpp"), "-o", str(made), *libraries)
        return made
    nvcc, objects = [find_nvcc(), *NVCC_FLAGS, *_architectures()], [str(workplace / f"{i}.o") for i in range(2)]
    _run(*compile_cpp, "-DUSE_CUDA", "-c", str(SOURCES / "sum_tree_cuda.cpp"), "-o", objects[0])
    _run(*nvcc, "-Xcompiler", "-fPIC,-fvisibility=hidden", "-c", str(SOURCES / "sum_tree_cuda.cu"), "-o", objects[1])
    # nvcc links the CUDA runtime in: PyTorch's wheel may bring another release of it.
    _run(*nvcc, "-shared", *objects, "-o", str(made), *libraries, "-ltorch_cuda")
    return made


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took more than {BUILD_SECONDS} s") from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout).splitlines()
        reason = next((line for line in lines if "error" in line), lines[0] if lines else f"status {error.returncode}")
        raise BuildError(f"{command[0]} failed: {reason.strip()}") from None


def _version(*compiler: str) -> str:
    """What a compiler says it is."""
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler[0]} --version: {error}") from None


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rethinker_kernels"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        with contextlib.suppress(ImportError, OSError):  # a system, or a file system, without locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield
