"""Boards of handwritten sums as queries: one of 16 sums is marked by its colour, and the question asks for its result.

A board is reduced to a quarter of its sides before the model sees it: the mark can still be seen, but a symbol has
4 x 4 pixels and sixteen of them share one image token. Cut out of the board, a tile is shown in full, a symbol as one
image token. Whoever looks again can answer, whoever does not has to guess. The sums are those of sums.py: their digits,
their splits of scikit-learn's images, their difficulty.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from rethinker.config import ConfigError
from rethinker.embedded.sums import (
    CELL,
    SYMBOLS,
    Parts,
    answer_of,
    answer_text,
    digit_images,
    random_sum,
    row_of_cells,
    slow_answer,
    steps_of,
)
from rethinker.samples import Query

if TYPE_CHECKING:
    import torch

TERMS, OF_OTHERS = range(2, 5), (6, 3, 1)  # of the marked sum, and how often the others have as many
COLUMNS, ROWS = 2, 8  # of tiles
CELLS = 8  # of a tile, one for each of up to seven symbols; the others are blank
TILES, WIDTH, HEIGHT = COLUMNS * ROWS, COLUMNS * CELLS * CELL, ROWS * CELL
SHRUNK = 4  # how many times a side of the board is as long as that of the image that the model sees at first
# Questions of each number of terms.
SPLITS = {"train": 1000, "validation": 150, "test": 150}
QUESTIONS = ("What is the marked result?", "What does the marked sum come to?", "Work out the marked sum.")
# Of the warm-up: guesses for every look, and how many of the looks are at any tile.
GUESSES, MISSES = 1.5, 0.5
# What an image token may show: a symbol, a blank cell, or, of the reduced board, which of four rows is marked or none.
BLANK = len(SYMBOLS)
UNMARKED = BLANK + 1 + SHRUNK


def boards(split: Literal["train", "validation", "test"]) -> list[Query]:
    """The questions of a split, always the same: 1,000 (train) or 150 for every number of terms from 2 to 4.

    Ids are `boards/<split>/<terms>/<number>`. Metadata holds what sums.py's does of the marked sum, and `tiles` (all
    sums of the board, from left to right and from top to bottom), `tile` (the marked one's number), `box` (its left,
    top, right and bottom in pixels of the whole board) and `image_ids` of all digits in the order of the tiles.
    """
    own, rng = digit_images()[split], random.Random(f"boards {split}")
    queries = []
    for terms in TERMS:
        for number in range(SPLITS[split]):
            tile = rng.randrange(TILES)
            lengths = rng.choices(TERMS, OF_OTHERS, k=TILES)
            lengths[tile] = terms
            tiles = [random_sum(length, rng) for length in lengths]
            shown = [[rng.choice(own[int(digit)]) for digit in symbols[::2]] for symbols in tiles]
            metadata = {
                "category": f"{terms} terms",
                "symbols": tiles[tile],
                "steps": steps_of(tiles[tile]),
                "tiles": tiles,
                "tile": tile,
                "box": box_of(tile),
                "image_ids": [image for images in shown for image in images],
            }
            image = {"bytes": _board(tiles, shown, tile)}
            question = QUESTIONS[number % len(QUESTIONS)]
            answer = answer_of(tiles[tile])
            queries.append(Query(f"boards/{split}/{terms}/{number}", question, answer, (image,), metadata))
    return queries


def box_of(tile: int) -> list[int]:
    """Left, top, right and bottom of a tile in pixels of the whole board."""
    row, column = divmod(tile, COLUMNS)
    width = CELLS * CELL
    return [column * width, row * CELL, (column + 1) * width, (row + 1) * CELL]


def _board(tiles: Sequence[str], image_ids: Sequence[Sequence[int]], marked: int) -> bytes:
    """The board as a PNG file of 16 levels of grey, in the marked tile of yellow."""
    from PIL import Image

    levels = np.full((HEIGHT, WIDTH), 15, np.uint8)
    for tile, (symbols, images) in enumerate(zip(tiles, image_ids, strict=True)):
        left, top, _, bottom = box_of(tile)
        levels[top:bottom, left : left + CELL * len(symbols)] = np.round(row_of_cells(symbols, images) / 17)
    left, top, right, bottom = box_of(marked)
    levels[top:bottom, left:right] += 16
    image = Image.fromarray(levels)
    image.putpalette(
        [value for blue in (17, 0) for level in range(16) for value in (17 * level, 17 * level, blue * level)]
    )
    return _png(image)


def _png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def crop_call(tile: int) -> str:
    """The call, as the policy writes it, that shows a tile in full: its box is that of the reduced board."""
    box = [side // SHRUNK for side in box_of(tile)]
    return f"<tool_call>\n{json.dumps({'name': 'crop', 'arguments': {'bbox_2d': box}})}\n</tool_call>"


class BoardsTeacher:
    """What the warm-up teaches about boards: to read the symbols of tiles and to see where a mark is, to guess, and to
    look again.

    A guess is `\\boxed{1}`. A look is a call of `crop`, often of a tile that is not marked, and then the slow answer of
    SumsTeacher to what that tile shows.
    """

    classes = UNMARKED + 1
    environment, hears = "crop", ("<tool_response>\nimage 2: ", "\n</tool_response>")

    def sees(self, query: Query) -> bool:
        """Whether it is known what the query's image shows."""
        return len(query.images) == 1 and {"tiles", "tile", "box"} <= query.metadata.keys()

    def view(self, query: Query, rng: random.Random) -> Query:
        """The board and one of its tiles in full, every second time the marked one."""
        tiles, marked = query.metadata["tiles"], query.metadata["tile"]
        tile = marked if rng.random() < 0.5 else rng.randrange(TILES)
        row, column = divmod(marked, COLUMNS)
        across = CELLS // SHRUNK  # tokens of the reduced board that a tile reaches into, side by side
        side = [UNMARKED] * (ROWS // SHRUNK * COLUMNS * across)  # [tokens]
        place = row // SHRUNK * COLUMNS * across + column * across
        side[place : place + across] = [BLANK + 1 + row % SHRUNK] * across
        symbols = [SYMBOLS.index(symbol) for symbol in tiles[tile]]
        shows = side + symbols + [BLANK] * (CELLS - len(symbols))
        return replace(query, images=(*query.images, {"bytes": cut_out(query, tile)}), metadata={"shows": shows})

    def look_loss(self, scores: torch.Tensor, owner: torch.Tensor, views: Sequence[Query]) -> tuple[torch.Tensor, int]:
        """Cross-entropy of what each image token of the views shows, from its scores [tokens, classes], and how many
        they are."""
        import torch

        shown = [what for view in views for what in view.metadata["shows"]]
        if len(shown) != len(scores):
            raise ConfigError(
                f"data.min_pixels, data.max_pixels: boards and their tiles have {len(scores)} image tokens here and "
                f"must have {len(shown)}: set data.min_pixels=256 and data.max_pixels=2048"
            )
        return torch.nn.functional.cross_entropy(scores, torch.tensor(shown)), len(shown)

    def responses(self, query: Query, rng: random.Random) -> list[Parts]:
        """A guess, at times twice, for its weight, and a look, in two turns."""
        guesses = 1 + (rng.random() < GUESSES - 1)
        tile = rng.randrange(TILES) if rng.random() < MISSES else query.metadata["tile"]
        look = [(crop_call(tile), True), (slow_answer(query.metadata["tiles"][tile]), True)]
        return [[(answer_text(query.answer), True)]] * guesses + [look]


def cut_out(query: Query, tile: int) -> bytes:
    """A tile of the query's board in full, as a PNG file."""
    from PIL import Image

    with Image.open(io.BytesIO(query.images[0]["bytes"])) as board:
        return _png(board.crop(box_of(tile)))
