"""Handwritten digits as queries: read one, compare two, add two (1,797 images that ship with scikit-learn, CC BY 4.0).

Most of its questions are about two images, which easy-VQA has none of.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np

from rethinker.samples import Query

SIDE = 64  # pixels of an image; the originals have 8
PAIRS = 3  # partners of every image, each compared with it and added to it
TEST_SHARE = 0.2

READ = ("Which digit is this?", "What digit is in the image?", "Name the handwritten digit.")
COMPARE = {
    "larger": "<image><image>Which image shows the larger digit, the first or the second?",
    "smaller": "<image><image>Which image shows the smaller digit, the first or the second?",
}
ADD = "<image><image>What is the sum of the two digits?"


def digits(split: Literal["train", "test"]) -> list[Query]:
    """The questions of a split, always the same: 10,059 about 1,437 images, or 2,520 about the other 360.

    Ids are `digits/<split>/<image>/<question>`; metadata holds `category` ("read", "compare" or "add") and `image_ids`,
    which count scikit-learn's images. An image belongs to one split.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    values = data.target.tolist()  # [1797]
    order = np.random.default_rng(0).permutation(len(values))
    test_size = round(TEST_SHARE * len(values) / 10) * 10
    own = np.sort(order[:test_size] if split == "test" else order[test_size:])  # images of this split
    pictures = {i: {"bytes": _png(data.images[i])} for i in own.tolist()}
    rng = np.random.default_rng(1)
    queries = []

    def ask(category: str, question: str, answer: str | int, *shown: int, n: int = 0) -> None:
        name = f"digits/{split}/{shown[0]}/{category}{n or ''}"
        metadata = {"category": category, "image_ids": list(shown)}
        queries.append(Query(name, question, str(answer), tuple(pictures[j] for j in shown), metadata))

    for i in own.tolist():
        ask("read", READ[i % len(READ)], values[i], i)
        for n in range(PAIRS):
            other = _partner(rng, own, lambda j, i=i: values[j] != values[i])
            kind = ("larger", "smaller")[int(rng.integers(2))]
            first_wins = (values[i] > values[other]) == (kind == "larger")
            ask("compare", COMPARE[kind], "first" if first_wins else "second", i, other, n=n)
            other = _partner(rng, own, lambda j, i=i: j != i)
            ask("add", ADD, values[i] + values[other], i, other, n=n)
    return queries


def _partner(rng: np.random.Generator, own: np.ndarray, suits) -> int:
    while True:
        other = int(own[rng.integers(len(own))])
        if suits(other):
            return other


def _png(ink: np.ndarray) -> bytes:
    """An 8 x 8 image of ink from 0 to 16 as a PNG: dark on white, enlarged."""
    from PIL import Image

    grey = np.round(255 * (1 - ink / 16)).astype(np.uint8)
    image = Image.fromarray(grey).resize((SIDE, SIDE), Image.Resampling.BICUBIC).convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
