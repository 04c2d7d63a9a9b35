"""Compiles a source of csrc at its first use, keeps the library in the user's cache, and opens it.

The libraries are C functions on plain memory: they need a C++ compiler, or nvcc, and nothing of PyTorch. Environment:

    CXX             the C++ compiler, instead of g++, clang++ or c++, whichever is found first
    CUDA_HOME       where to look for bin/nvcc when it is not on the PATH
    XDG_CACHE_HOME  the cache is its folder rethinker_kernels (default ~/.cache)
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from ctypes import CDLL, c_char_p, c_double, c_int64, c_uint32, c_void_p
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "csrc"

# No fused multiply-add: weights are the same on every device, bit for bit.
CXX_FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC", "-fmad=false"]

FUNCTIONS = {
    "sum_tree_update": [c_void_p, c_int64, c_double, c_void_p, c_void_p, c_int64, c_void_p, c_void_p],
    "sum_tree_sample": [c_void_p, c_int64, c_void_p, c_uint32, c_int64, c_void_p, c_void_p],
}
"""Parameters of the functions that csrc/sum_tree.h declares."""


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why in one line."""


@functools.cache
def load(device_type: str) -> CDLL:
    """The library for memory of this device type; any number of processes may ask at once.

    The file's name holds a hash of all that goes into it, so it never is out of date.

    Raises:
        BuildError: there is no compiler, it failed, or the cache cannot be written.
    """
    source = SOURCES / f"sum_tree_{device_type}.{'cu' if device_type == 'cuda' else 'cpp'}"
    compiler = nvcc_for_these_gpus() if device_type == "cuda" else [*cxx(), *CXX_FLAGS]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rethinker_kernels"
    try:
        inputs = (
            platform.machine(),
            *platform.libc_ver(),
            *compiler,
            (SOURCES / "sum_tree.h").read_text(),
            source.read_text(),
        )
        made_of = hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:20]
        library = folder / f"sum_tree_{device_type}_{made_of}.so"
        if not library.exists():
            print(f"rethinker_kernels: compiling the {device_type} sum tree, once", file=sys.stderr)
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as workplace:
                made = Path(workplace) / library.name
                subprocess.run([*compiler, "-shared", source, "-o", made], check=True, capture_output=True, text=True)
                os.replace(made, library)  # whole, or not there
        return opened(library)
    except (OSError, subprocess.CalledProcessError) as error:
        lines = (getattr(error, "stderr", "") or str(error)).splitlines()
        reason = next((line.strip() for line in lines if "error" in line), lines[0])
        raise BuildError(f"the {device_type} sum tree does not compile: {reason}") from error


def opened(library: Path) -> CDLL:
    """The library in this file, with the types of its functions."""
    found = CDLL(str(library))
    for name, parameters in FUNCTIONS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = parameters, c_char_p
    return found


def cxx() -> list[str]:
    """The C++ compiler, and the arguments that CXX gives it; BuildError where there is none."""
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["g++"], ["clang++"], ["c++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    raise BuildError(f"no C++ compiler ({' '.join(wanted) or 'g++, clang++ or c++'}) was found; install one or set CXX")


def nvcc_for_these_gpus() -> list[str]:
    """`find_nvcc`, making code for this machine's GPUs; BuildError where there are none."""
    found = sorted({torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())})
    if not found:
        raise BuildError("there is no CUDA device")
    targets = [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}" for major, minor in found]
    return [find_nvcc(), *NVCC_FLAGS, *targets]


def find_nvcc() -> str:
    """The CUDA compiler; BuildError where there is none."""
    places = os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '')}/bin", "/usr/local/cuda/bin"
    if found := shutil.which("nvcc", path=os.pathsep.join(places)):
        return found
    raise BuildError("nvcc was not found; put it on the PATH or set CUDA_HOME")
