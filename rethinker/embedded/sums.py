"""Handwritten sums as queries: an image is a row of digits with + and - between, the question asks for the result.

The digits are scikit-learn's (1,797 images, CC BY 4.0). A sum is read from left to right and its running total is never
below 0. Its difficulty is its number of terms, which is its category: `data.category_weights` sets the hardest length
and the mix. A cell of 16 x 16 pixels per symbol is one image token of the tiny model.
"""

from __future__ import annotations

import io
import random
import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from rethinker.config import ConfigError, RethinkConfig
from rethinker.samples import Query

if TYPE_CHECKING:
    import torch

Parts = list[tuple[str, bool]]
"""A response in pieces that are tokenised apart, each with whether the warm-up teaches it."""

CELL = 16  # pixels of a symbol's side; the original digits have 8
TERMS = range(2, 8)
SYMBOLS = "0123456789+-"
# Digit images of each split, and questions of each number of terms.
SPLITS = {"train": (1197, 2000), "validation": (300, 300), "test": (300, 300)}
# Of the answers with steps that the warm-up teaches: how many are thought over; of those how many begin wrong, and in
# how many the trigger is taught, too. In the rest it is shown as if it had been forced: what is learned is the second
# answer, but not to begin one.
THOUGHT_OVER, SLIPS, OF_ITS_OWN = 0.35, 0.7, 0.3
QUESTIONS = ("What is the result?", "What does this come to?", "Work it out.")


def sums(split: Literal["train", "validation", "test"]) -> list[Query]:
    """The questions of a split, always the same: 2,000 (train) or 300 for every number of terms from 2 to 7.

    Ids are `sums/<split>/<terms>/<number>`. Metadata holds `category` ("2 terms"), `symbols` (as "6-0+8"), `steps` (as
    ["6-0=6", "6+8=14"]) and `image_ids`, which count scikit-learn's images. A digit's image belongs to one split.
    """
    own, rng = digit_images()[split], random.Random(f"sums {split}")
    queries = []
    for terms in TERMS:
        for number in range(SPLITS[split][1]):
            symbols = random_sum(terms, rng)
            shown = [rng.choice(own[int(digit)]) for digit in symbols[::2]]
            metadata = {
                "category": f"{terms} terms",
                "symbols": symbols,
                "steps": steps_of(symbols),
                "image_ids": shown,
            }
            image = {"bytes": _png(row_of_cells(symbols, shown))}
            question = QUESTIONS[number % len(QUESTIONS)]
            queries.append(Query(f"sums/{split}/{terms}/{number}", question, answer_of(symbols), (image,), metadata))
    return queries


def random_sum(terms: int, rng: random.Random) -> str:
    """The symbols of a sum, as "6-0+8", whose running total is never below 0."""
    digits = [rng.randrange(10) for _ in range(terms)]
    symbols, total = str(digits[0]), digits[0]
    for digit in digits[1:]:
        sign = "-" if digit <= total and rng.random() < 0.5 else "+"
        total += int(f"{sign}{digit}")
        symbols += f"{sign}{digit}"
    return symbols


def answer_of(symbols: str) -> str:
    """The result of a sum."""
    return steps_of(symbols)[-1].partition("=")[2]


def row_of_cells(symbols: str, image_ids: Sequence[int]) -> np.ndarray:
    """A sum as grey values [CELL, CELL * symbols]; `image_ids` are the images of its digits."""
    images = iter(image_ids)
    return np.concatenate([_cells()[symbol if symbol in "+-" else next(images)] for symbol in symbols], axis=1)


def steps_of(symbols: str) -> list[str]:
    """The steps of a sum from left to right: "6-0+8" as ["6-0=6", "6+8=14"]."""
    total, steps = int(symbols[0]), []
    for sign, digit in zip(symbols[1::2], symbols[2::2], strict=True):
        before, total = total, total + int(sign + digit)
        steps.append(f"{before}{sign}{digit}={total}")
    return steps


@cache
def digit_images() -> dict[str, dict[int, list[int]]]:
    """By split and digit the numbers of scikit-learn's images: an image belongs to one split."""
    from sklearn.datasets import load_digits

    values = load_digits().target.tolist()  # [1797]
    order = random.Random(0).sample(range(len(values)), len(values))
    found: dict[str, dict[int, list[int]]] = {}
    start = 0
    for split, (images, _) in SPLITS.items():
        part = sorted(order[start : start + images])
        found[split] = {digit: [i for i in part if values[i] == digit] for digit in range(10)}
        start += images
    return found


@cache
def _cells() -> dict[int | str, np.ndarray]:
    """The cell of every digit's image and of + and -: [CELL, CELL] grey values, dark on white."""
    from PIL import Image
    from sklearn.datasets import load_digits

    cells: dict[int | str, np.ndarray] = {}
    for i, ink in enumerate(load_digits().images):  # [8, 8] from 0 to 16
        grey = Image.fromarray(np.round(255 * (1 - ink / 16)).astype(np.uint8))
        cells[i] = np.asarray(grey.resize((CELL, CELL), Image.Resampling.BICUBIC))
    plus = np.full((CELL, CELL), 255, np.uint8)
    plus[7:9, 3:13] = 0
    minus = plus.copy()
    plus[3:13, 7:9] = 0
    return cells | {"+": plus, "-": minus}


def _png(grey: np.ndarray) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return buffer.getvalue()


class SumsTeacher:
    """What the warm-up teaches about sums: to read the symbols, and three ways to answer.

    A fast answer is `\\boxed{1}`. A slow one has its steps before, a line each: `6-0=6`, `6+8=14`, `\\boxed{14}`. One
    that is thought over is a slow answer, mostly with a slip, then a forced trigger, then the slow answer.
    """

    classes = len(SYMBOLS)
    environment, hears = None, ()

    def sees(self, query: Query) -> bool:
        """Whether it is known what the query's image shows; a board shows more than the sum that it asks for."""
        return (
            "tiles" not in query.metadata
            and re.fullmatch(r"[0-9]([+-][0-9])+", str(query.metadata.get("symbols"))) is not None
        )

    def view(self, query: Query, rng: random.Random) -> Query:
        """The query as looking is practised on it: as it is."""
        return query

    def look_loss(
        self, scores: torch.Tensor, owner: torch.Tensor, queries: Sequence[Query]
    ) -> tuple[torch.Tensor, int]:
        """Cross-entropy of the symbols, and how many they are, from a score per image token [tokens, classes]: a token
        is a cell."""
        import torch

        shown = [SYMBOLS.index(symbol) for query in queries for symbol in query.metadata["symbols"]]
        if len(shown) != len(scores):
            raise ConfigError(
                f"data.min_pixels, data.max_pixels: {len(scores)} image tokens show {len(shown)} symbols of sums, and "
                "must be one each: set data.min_pixels=256 and data.max_pixels=4096"
            )
        return torch.nn.functional.cross_entropy(scores, torch.tensor(shown)), len(shown)

    def responses(self, query: Query, rng: random.Random) -> list[Parts]:
        """Two to every question, so that its prompt is computed once: at once, and with steps.

        What is not taught comes first: a slip, and what is thought over not of its own accord.
        """
        symbols = query.metadata["symbols"]
        fast, slow = answer_text(query.answer), slow_answer(symbols)
        if rng.random() >= THOUGHT_OVER:
            return [[(fast, True)], [(slow, True)]]
        trigger = rng.choice(list(RethinkConfig().triggers.values()))
        own = rng.random() < OF_ITS_OWN
        first = (with_slip(symbols, rng), False) if rng.random() < SLIPS else (slow, own)
        return [[(fast, True)], [first, (trigger, own), ("\n" + slow, True)]]


def answer_text(answer: str) -> str:
    """The answer as the reward reads it."""
    return f"\\boxed{{{answer}}}"


def slow_answer(symbols: str) -> str:
    """The steps of a sum, a line each, and the answer."""
    return "\n".join([*steps_of(symbols), answer_text(answer_of(symbols))])


def with_slip(symbols: str, rng: random.Random) -> str:
    """The slow answer of one who takes a digit for another; the total may then fall below 0."""
    place = 2 * rng.randrange(len(symbols) // 2 + 1)
    misread = rng.choice([digit for digit in "0123456789" if digit != symbols[place]])
    return slow_answer(symbols[:place] + misread + symbols[place + 1 :])
