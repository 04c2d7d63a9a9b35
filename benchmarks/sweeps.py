"""How the head's ops depend on what is fixed in the code: the rows of a chunk, and the tiles of the row kernels.

    python -m benchmarks.sweeps [chunks tiles products] [--out FILE]

Three sweeps: `linear_grpo_loss` as a whole, the three row kernels on a chunk's logits, and the matrix products of a
chunk. Needs a GPU; with TRITON_INTERPRET=1 every line runs at toy sizes in Triton's interpreter, which says nothing
about one.

Legend: R rows (tokens), C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.ceilings import HEADS, ROWS
from benchmarks.kernels import grpo_of, head_inputs, loss_step, ours
from benchmarks.timing import Step, measure
from rethinker_kernels import linear
from rethinker_kernels.devices import takes_exponentials, takes_triton
from rethinker_kernels.losses import Rows, Surrogate

REPEATS = 7 if torch.cuda.is_available() else 1

CHUNKS = (1920, 2048, 2816, 3584, 4096)
LOGITS = (512, 1024, 2048)

TILES: tuple[dict[str, int], ...] = (
    {},  # the kernels' own
    {"warps": 4, "lane_bytes": 2048, "gradient": 2048},
    {"warps": 8, "lane_bytes": 4096, "gradient": 4096},
    {"warps": 16, "lane_bytes": 8192, "gradient": 8192},
    {"warps": 32, "lane_bytes": 16384, "gradient": 16384},
)


@contextmanager
def chunk_rows(logits: int, gradient: int) -> Iterator[None]:
    """The head's ops make the logits of so many rows at a time, and multiply the gradient of so many."""
    with mock.patch.object(linear.Head, "chunks", (min(logits, gradient), gradient)):
        yield


@contextmanager
def row_tiles(**changes: int) -> Iterator[None]:
    """The row kernels run with these tiles, however many rows there are; without changes with their own."""
    from rethinker_kernels.triton_kernels import linear_loss as linear_rows
    from rethinker_kernels.triton_kernels import log_softmax

    own = log_softmax.tiles

    def changed(device: torch.device, rows: int) -> log_softmax.Tiles:
        return replace(log_softmax.GPU, **changes) if changes else own(device, rows)

    with mock.patch.object(linear_rows, "tiles", changed), mock.patch.object(log_softmax, "tiles", changed):
        yield


def sweep_products(head: tuple[int, int], chunks: tuple[int, ...], device: str) -> list[dict[str, Any]]:
    """TFLOP/s of the matrix products of a chunk by its rows."""
    D, V = head
    half = torch.bfloat16
    weight = torch.randn(V, D, device=device).to(half)
    grad_weight = torch.zeros(V, D, device=device)
    results = []
    for C in chunks:
        hidden, logits = torch.randn(C, D, device=device).to(half), torch.randn(C, V, device=device).to(half)
        wide, half_logits = torch.empty(C, V, device=device), torch.empty_like(logits)
        grad_hidden, half_weight = torch.empty_like(hidden), torch.empty_like(weight)
        # (a, b, out, added to out)
        products = {
            "logits": (hidden, weight.t(), half_logits, False),
            "logits in fp32": (hidden, weight.t(), wide, False),
            "hidden's gradient": (logits, weight, grad_hidden, False),
            "weight's gradient": (logits.t(), hidden, half_weight, False),
            "weight's gradient in fp32": (logits.t(), hidden, grad_weight, False),
            "weight's gradient added in fp32": (logits.t(), hidden, grad_weight, True),
        }
        rates = {}
        for name, (a, b, out, add) in products.items():
            step: Step = partial(linear.product, a, b, out=out, add=add)
            rates[name] = 2 * C * D * V / measure(step, REPEATS)["median_ms"] / 1e9
        results.append({"chunk_rows": C, "tflop_per_s": rates})
    return results


def sweep_chunks(
    head: tuple[int, int], rows: int, chunks: tuple[int, ...], logits: tuple[int, ...], device: str
) -> list[dict[str, Any]]:
    """`linear_grpo_loss`, forward and backward, by the rows of a chunk; None: the op's own choice."""
    inputs = head_inputs(rows, *head, device)
    step = loss_step(grpo_of(ours))(inputs)
    own = linear.Head(inputs["hidden"], inputs["weight"], None, inputs["index"], 1.0).chunks
    results = [{"logits_rows": None, "gradient_rows": None, "own_choice": own, **measure(step, REPEATS)}]
    if takes_exponentials(inputs["hidden"], inputs["weight"], None, 1.0):
        logits = logits[:1]  # there are none
    for B, C in product(logits, chunks):
        with chunk_rows(B, C):
            results.append({"logits_rows": B, "gradient_rows": C, **measure(step, REPEATS)})
    return results


def sweep_tiles(rows: int, vocabulary: int, dtype: torch.dtype, tiles: tuple[dict[str, int], ...], device: str):
    """Milliseconds of the row kernels on logits [rows, vocabulary] by their tiles, and bytes per second.

    The bytes are those of reading each logit once and, in `grpo_rows` and `gradient`, writing 16 bits for it once: what
    a second read takes beyond the L2 cache lowers the rate.
    """
    from rethinker_kernels.triton_kernels import linear_loss, log_softmax

    logits = torch.randn(rows, vocabulary, device=device).to(dtype)
    out = torch.empty_like(logits, dtype=torch.bfloat16)
    index, ones = torch.randint(vocabulary, (rows,), device=device), torch.ones(rows, device=device)
    # A positive advantage and a ratio far below 1: no row is clipped, so every gradient is computed.
    old = torch.full((rows,), 10.0, device=device)
    saved = log_softmax.forward_rows(logits, index, 1.0, True)[2]
    grpo = (Rows(old, ones, None, ones.bool(), ones), ones, None, Surrogate())
    steps: dict[str, Step] = {
        "forward": lambda: log_softmax.forward_rows(logits, index, 1.0, True),
        "gradient": lambda: log_softmax.gradient_rows(logits, index, 1.0, saved, None, ones, None, out=out),
        "grpo_rows": lambda: linear_loss.grpo_rows(logits, index, 1.0, *grpo, out=out),
    }
    results = []
    for changes in tiles:
        measured = {}
        with row_tiles(**changes):
            for name, step in steps.items():
                ms = measure(step, REPEATS)["median_ms"]
                size = logits.element_size() + (0 if name == "forward" else out.element_size())
                measured[name] = {"median_ms": ms, "tb_per_s": logits.numel() * size / ms / 1e9}
        results.append({"tiles": changes, "rows": rows, "vocabulary": vocabulary, "dtype": str(dtype), **measured})
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", nargs="*", help="which: chunks, tiles, products (default: all)")
    parser.add_argument("--out", type=Path, help="write the result here, after every sweep")
    options = parser.parse_args(arguments)
    if not takes_triton(torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")):
        sys.exit("benchmarks.sweeps measures Triton kernels: it needs a GPU (or TRITON_INTERPRET=1 for toy sizes)")
    on_gpu = torch.cuda.is_available()
    device, rows = ("cuda", ROWS) if on_gpu else ("cpu", 16)
    heads = {name: HEADS[name] for name in ("3B", "7B")} if on_gpu else {"toy": (16, 300)}
    chunks, logits = (CHUNKS, LOGITS) if on_gpu else ((8,), (4,))
    # As linear_grpo_loss calls them, and as selective_log_softmax does.
    inputs = ((512, torch.float32), (2816, torch.bfloat16)) if on_gpu else ((2, torch.float32),)
    vocabulary = HEADS["7B"][1] if on_gpu else 300
    tiles = TILES if on_gpu else ({}, {"lane_bytes": 64, "gradient": 256})
    sweeps: dict[str, Callable[[], Any]] = {
        "chunks": lambda: {name: sweep_chunks(head, rows, chunks, logits, device) for name, head in heads.items()},
        "tiles": lambda: [row for n, t in inputs for row in sweep_tiles(n, vocabulary, t, tiles, device)],
        "products": lambda: {name: sweep_products(head, chunks, device) for name, head in heads.items()},
    }
    if unknown := set(options.sweeps) - set(sweeps):
        parser.error(f"no sweep is called {', '.join(sorted(unknown))}; there are {', '.join(sweeps)}")
    result: dict[str, Any] = {}
    for name in options.sweeps or sweeps:
        result[name] = sweeps[name]()
        print(name, json.dumps(result[name]), flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
