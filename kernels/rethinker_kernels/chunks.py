"""How many rows the linear ops work on at a time: from the head's size, the GPU's processors and a bound on memory.

Legend: R rows, C rows of a chunk, D hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from functools import cache

CPU_LOGITS_BYTES = 64 * 2**20
"""Size of the logits that exist at a time on a CPU, and of the fp32 copies (about two) that are worked on at a time."""

LOGITS_BYTES = 320 * 2**20
"""The same on a GPU, though at least LOGITS_ROWS rows: 512 fp32 rows of a vocabulary of 152,064."""

LOGITS_ROWS = 512
"""With much fewer, reading the weight would take longer than multiplying with it."""

WORKSPACE = 2_000_000_000
"""Bytes that logits, their gradient and the fp32 sum of the weight's gradient may take on a GPU beyond the gradients
that are returned. Where that sum alone takes more when it is narrowed (4 V D: Qwen2.5-VL 7B's head), as much as it."""

TILE = (128, 256)
"""Rows and columns of a matrix product that a processor works on at a time."""

BALANCE = 180
"""FLOP of a 16-bit product in the time that a byte takes from memory (H200, measured: 764 TFLOP/s, 4.25 TB/s)."""


@cache
def chunk_rows(rows: int, width: int, vocabulary: int, element_size: int, processors: int) -> tuple[int, int]:
    """(rows whose logits exist at a time, rows whose gradient is multiplied at a time).

    The more rows a product of the gradient has, the more seldom the weight's fp32 gradient is read and written, and the
    more memory it takes. A GPU computes a product in waves of one TILE per processor, of which the last may leave most
    processors idle. That counts in the hidden states' gradient, of few tiles that each sum over the whole vocabulary.
    So of all multiples of a tile's rows within WORKSPACE that C is taken for which, summed over the chunks of R rows,

        waves(C, V) * D  +  waves(C, D) * V  +  waves(V, D) * C  +  8 * V * D * BALANCE / (2 * 128 * 256 * processors)
        logits              hidden's gradient   weight's            its fp32 sum, read and written

    is least, in steps of a wave along the summed dimension. cuBLAS may split a long sum over idle processors, so this
    is a lower bound of a shape's efficiency. Logits are fp32 also where inputs are of 16 bits, and apart from their
    gradient then; otherwise the gradient takes their place, and both numbers are the same.

    Args:
        rows, width, vocabulary: R, D, V.
        element_size: bytes of an element of the inputs.
        processors: the GPU's streaming multiprocessors; 0 for a CPU, where memory alone decides.
    """
    in_place = element_size >= 4
    if not processors:
        most = max(CPU_LOGITS_BYTES // (vocabulary * max(element_size, 4)), 1)
        return most, most
    tile = TILE[0]
    logits = max(LOGITS_BYTES // (4 * vocabulary) // tile * tile, LOGITS_ROWS)
    if in_place:
        most = max(WORKSPACE // (vocabulary * element_size), tile)
    else:  # per column of the vocabulary: the bound, less the fp32 sum beyond the returned gradient, less fp32 logits
        most = max((max(WORKSPACE // vocabulary, 4 * width) - 2 * width - 4 * logits) // 2, logits)

    def waves(high: int, wide: int) -> int:
        return math.ceil(math.ceil(high / TILE[0]) * math.ceil(wide / TILE[1]) / processors)

    def steps(size: int) -> float:
        """Of one chunk."""
        part = size if in_place else logits
        full, rest = divmod(size, part)
        products = (full * waves(part, vocabulary) + waves(rest, vocabulary)) * width
        products += waves(size, width) * vocabulary + waves(vocabulary, width) * size
        return products + 8 * vocabulary * width * BALANCE / (2 * TILE[0] * TILE[1] * processors)

    def total(size: int) -> float:
        full, rest = divmod(rows, size)
        return full * steps(size) + (steps(rest) if rest else 0)

    needed = math.ceil(rows / tile) * tile
    best = min(range(tile, min(most, needed) + 1, tile), key=total, default=tile)
    return (best, best) if in_place else (logits, best)


def slices(start: int, stop: int, size: int) -> list[slice]:
    """[start, stop) in pieces of `size`, the last of what is left."""
    return [slice(first, min(first + size, stop)) for first in range(start, stop, size)]


def chunk_bytes(rows: int, width: int, vocabulary: int, element_size: int, processors: int) -> int:
    """Most that logits and their gradient take at a time; arguments as in `chunk_rows`."""
    logits, products = (min(n, rows) for n in chunk_rows(rows, width, vocabulary, element_size, processors))
    return vocabulary * (4 * min(logits, products) + 2 * products if element_size < 4 else element_size * products)
