"""What this machine can do at best: the rates that the floors of the ops are computed from.

    python -m benchmarks.ceilings [--out FILE]

A copy, a large matrix product in a short burst and for seconds on end, and the three plain matrix products of a real
head's shapes, which no loss over that head can do without: the floor of `linear_grpo_loss`. A GPU at its power limit
lowers its clocks within a second, so a rate from a burst is not a floor of anything that runs for long. Without a GPU
toy sizes, which say nothing about one.

Legend: R rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Step, measure

HEADS = {"3B": (2048, 151_936), "7B": (3584, 152_064), "32B": (5120, 152_064), "72B": (8192, 152_064)}
"""(D, V) of Qwen2.5-VL's heads."""

ROWS = 16_384
SMALL = (512, 64, 4_096)  # (R, D, V) without a GPU

SECONDS = 2.0  # what "sustained" means


def copy_bytes_per_s(repeats: int = 20) -> float:
    """Bytes read and written per second by a copy of 2 GiB (64 MiB without a GPU)."""
    on_gpu = torch.cuda.is_available()
    source = torch.zeros(2**31 if on_gpu else 2**26, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    target = torch.empty_like(source)
    return 2e3 * source.numel() / measure(lambda: target.copy_(source), repeats)["median_ms"]


def head_products(size: tuple[int, int, int], products: int = 3) -> Step:
    """A step of the head's first `products` plain matrix products: logits, hidden's gradient, the weight's gradient.

    Over all R rows at once, inputs and results of 16 bits: without chunks, and without the fp32 sum over them.
    """
    R, D, V = size
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    hidden, weight = (torch.randn(n, D, device=device).to(dtype) for n in (R, V))
    logits = torch.mm(hidden, weight.t())  # random values: zeros take less power and more speed
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def step() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        if products > 1:
            torch.mm(logits, weight, out=grad_hidden)
        if products > 2:
            torch.mm(logits.t(), hidden, out=grad_weight)

    return step


def square_flop_per_s(seconds: float) -> float:
    """FLOP per second of a product of 8,192-row square matrices (256 without a GPU)."""
    on_gpu = torch.cuda.is_available()
    n = 8192 if on_gpu else 256
    a, b = (torch.randn(n, n, device="cuda" if on_gpu else "cpu") for _ in range(2))
    if on_gpu:
        a, b = a.bfloat16(), b.bfloat16()
        torch.cuda.synchronize()
        time.sleep(1.0)  # what ran before has lowered the clocks, and a burst starts from rested ones
    return 2e3 * n**3 / measure(lambda: a @ b, 5, seconds=seconds)["median_ms"]


def under_load() -> dict[str, str] | None:
    """Clocks, power and temperature, as nvidia-smi says them in the middle of a second of matrix products."""
    fields = ("clocks.sm", "clocks.mem", "power.draw", "power.limit", "temperature.gpu")
    if not (torch.cuda.is_available() and shutil.which("nvidia-smi")):
        return None
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    for _ in range(1000):  # queued: about 1.5 s on an H200
        a @ a
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    torch.cuda.synchronize()
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else None


def device() -> dict[str, Any]:
    """What the runtime says of the GPU and of the tools beside it."""
    tools = {name: shutil.which(name) is not None for name in ("nvcc", "ncu", "compute-sanitizer")}
    if not torch.cuda.is_available():
        return {"tools": tools}
    about = torch.cuda.get_device_properties(0)
    return {
        "capability": [about.major, about.minor],
        "multiprocessors": about.multi_processor_count,
        "l2_mib": about.L2_cache_size / 2**20,
        "memory_gib": about.total_memory / 2**30,
        "cuda": torch.version.cuda,
        "tools": tools,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the result here")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    seconds = SECONDS if on_gpu else 0.0
    result: dict[str, Any] = {"device": device(), "copy_tb_per_s": copy_bytes_per_s() / 1e12}
    result["square_tflop_per_s"] = {
        "burst": square_flop_per_s(0.0) / 1e12,
        "sustained": square_flop_per_s(seconds) / 1e12,
    }
    result["under_load"] = under_load()
    sizes = {name: (ROWS, *HEADS[name]) for name in ("3B", "7B")} if on_gpu else {"small": SMALL}
    result["head_products"] = {}
    for name, size in sizes.items():
        ms = measure(head_products(size), 10, seconds=seconds)["median_ms"]
        flop = 6 * size[0] * size[1] * size[2]
        result["head_products"][name] = {"rows_width_vocabulary": size, "ms": ms, "tflop_per_s": flop / ms / 1e9}
    text = json.dumps(result, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
