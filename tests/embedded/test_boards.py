"""Boards of sums: one marked tile that a crop shows in full, right answers, splits that share no digit's image."""

from __future__ import annotations

import io
import json
import random
import re

import numpy as np
import pytest
import torch
from PIL import Image

from rethinker.config import ConfigError, DataConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded.boards import (
    BLANK,
    CELLS,
    GUESSES,
    MISSES,
    SHRUNK,
    SPLITS,
    TILES,
    UNMARKED,
    BoardsTeacher,
    boards,
    box_of,
    crop_call,
    cut_out,
)
from rethinker.embedded.easy_vqa import EasyVqaTeacher
from rethinker.embedded.sums import (
    CELL,
    SYMBOLS,
    SumsTeacher,
    digit_images,
    row_of_cells,
    slow_answer,
    steps_of,
    sums,
)
from rethinker.embedded.tiny import create_tiny
from rethinker.embedded.warmup import as_bundle, dialogue_of, teacher_of
from rethinker.policy.loading import load_processor
from rethinker.settings import resolve_config

DATA = DataConfig(prompt="{question}", system="", min_pixels=256, max_pixels=2048)


@pytest.fixture(scope="module")
def splits():
    return {split: boards(split) for split in SPLITS}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return PromptEncoder(load_processor(create_tiny(tmp_path_factory.mktemp("tiny"))), DATA)


def pixels(file: bytes) -> np.ndarray:
    """[height, width, 3]"""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def test_the_marked_sum_is_asked_for(splits):
    """The answer and the steps are those of the marked tile, whose number of terms is the category."""
    for query in (query for queries in splits.values() for query in queries):
        told, marked = query.metadata, query.metadata["tiles"][query.metadata["tile"]]
        assert len(told["tiles"]) == TILES and told["symbols"] == marked and told["box"] == box_of(told["tile"])
        assert told["category"] == f"{len(re.findall('[0-9]', marked))} terms"
        assert query.answer == str(eval(marked)) and told["steps"] == steps_of(marked)
    assert [len(queries) for queries in splits.values()] == [3000, 450, 450]


def test_every_tile_is_marked_about_as_often(splits):
    """A guess of where the mark is finds it once in 16."""
    counts = np.bincount([query.metadata["tile"] for query in splits["train"]], minlength=TILES)
    assert counts.min() > 130 and counts.max() < 250


def test_the_image_shows_the_board(splits):
    """Every tile is its sum's cells, dark on white, and blank behind them; the marked one, and no other, is yellow."""
    for query in (query for queries in splits.values() for query in queries[::97]):
        shown, images = pixels(query.images[0]["bytes"]), iter(query.metadata["image_ids"])
        yellow = (shown[..., 2] == 0) & (shown[..., 0] > 0)  # [height, width]
        left, top, right, bottom = query.metadata["box"]
        assert yellow[top:bottom, left:right].mean() > 0.7 and yellow.sum() == yellow[top:bottom, left:right].sum()
        for tile, symbols in enumerate(query.metadata["tiles"]):
            left, top, right, bottom = box_of(tile)
            red = shown[top:bottom, left:right, 0]
            own = row_of_cells(symbols, [next(images) for _ in symbols[::2]])
            assert abs(red[:, : own.shape[1]] - own).max() <= 9 and (red[:, own.shape[1] :] == 255).all()
        assert next(images, None) is None


def test_no_digit_is_in_two_splits(splits):
    """A board is made of its own split's images, those of sums.py."""
    for split, queries in splits.items():
        own = {image for images in digit_images()[split].values() for image in images}
        assert {image for query in queries for image in query.metadata["image_ids"]} == own


def test_the_same_questions_every_time(splits):
    """And ids of their own."""
    assert boards("test") == splits["test"]
    assert len({query.id for queries in splits.values() for query in queries}) == 3900


def test_what_is_shown_at_first_and_what_a_crop_shows(splits, encoder):
    """A board has 8 image tokens of 64 x 64 of its pixels; a tile has one for each of its cells, none reduced."""
    for query in splits["test"][::150]:
        board = encoder.encode(query).images[0]
        assert board.size == (64, 32)
        tile = Image.open(io.BytesIO(cut_out(query, query.metadata["tile"])))
        assert tile.size == (CELLS * CELL, CELL)
        view = BoardsTeacher().view(query, random.Random(0))
        assert encoder.pixels(view)["image_grid_thw"].tolist() == [[1, 4, 8], [1, 2, 16]]


def test_a_view_tells_what_each_token_shows(splits):
    """Of the board which tokens a mark runs through, and in which quarter of them; of a tile its symbols."""
    rng, marked = random.Random(0), 0
    for query in splits["test"]:
        view = BoardsTeacher().view(query, rng)
        shows, (whole, cut) = np.array(view.metadata["shows"]), (pixels(image["bytes"]) for image in view.images)
        side = CELL * SHRUNK  # pixels of the board in a token
        blue = whole[..., 2].reshape(2, SHRUNK, CELL, 4, side).min((2, 4)) == 0  # [token row, quarter, token column]
        blue &= whole[..., 0].reshape(2, SHRUNK, CELL, 4, side).max((2, 4)) > 0
        white = (whole[..., 2].reshape(2, SHRUNK, CELL, 4, side) == 255).any((2, 4))
        quarters = (blue & ~white).transpose(0, 2, 1).reshape(8, SHRUNK)  # [tokens, quarters]
        for what, quarter in zip(shows[:8], quarters, strict=True):
            assert what == (BLANK + 1 + quarter.argmax() if quarter.any() else UNMARKED)
        symbols = "".join(SYMBOLS[what] for what in shows[8:] if what < BLANK)
        assert len(shows) == 16 and (shows[8 + len(symbols) :] == BLANK).all()
        equal = [tile for tile, other in enumerate(query.metadata["tiles"]) if other == symbols]
        (tile,) = [tile for tile in equal if (cut == pixels(cut_out(query, tile))).all()]
        marked += tile == query.metadata["tile"]
    assert 0.4 < marked / len(splits["test"]) < 0.65


def test_the_probe_learns_what_a_view_shows(splits):
    """Scores that name each token's content cost nothing; in another order they do, and so do images of other sizes."""
    teacher, rng = BoardsTeacher(), random.Random(0)
    views = [teacher.view(query, rng) for query in splits["test"][::200]]
    shown = torch.tensor([what for view in views for what in view.metadata["shows"]])
    scores = 50.0 * torch.nn.functional.one_hot(shown, teacher.classes)
    owner = torch.zeros(len(shown), dtype=torch.int64)
    loss, tokens = teacher.look_loss(scores, owner, views)
    assert loss < 1e-6 and tokens == len(shown)
    assert teacher.look_loss(scores.flip(0), owner, views)[0] > 10
    with pytest.raises(ConfigError, match="data.max_pixels=2048"):
        teacher.look_loss(scores.repeat(2, 1), owner.repeat(2), views)


def test_responses_guess_or_look(splits):
    """To every question guesses, and a look: a call for one tile's box, as the model sees the board, and the slow
    answer to what that tile shows; of guesses and of marked tiles there are as many as are meant to be."""
    teacher, rng, guessed, hits = BoardsTeacher(), random.Random(0), 0, 0
    for query in splits["train"]:
        *guesses, ((call, first_taught), (answer, second_taught)) = teacher.responses(query, rng)
        assert guesses and all(guess == [(f"\\boxed{{{query.answer}}}", True)] for guess in guesses)
        box = json.loads(call.removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))["arguments"]["bbox_2d"]
        tile = [box_of(tile) for tile in range(TILES)].index([SHRUNK * side for side in box])
        assert answer == slow_answer(query.metadata["tiles"][tile]) and first_taught and second_taught
        guessed, hits = guessed + len(guesses), hits + (tile == query.metadata["tile"])
    assert guessed / len(splits["train"]) == pytest.approx(GUESSES, abs=0.04)
    assert hits / len(splits["train"]) == pytest.approx(1 - MISSES + MISSES / TILES, abs=0.04)


def test_a_look_is_what_a_rollout_makes_of_it(splits, encoder):
    """Every tile's call shows that tile in full, between the turns; the turns are taught with their ends, the rest is
    not."""
    query, environment = splits["test"][7], dialogue_of(BoardsTeacher(), encoder)
    looks = [[(crop_call(tile), True), ("\\boxed{1}", True)] for tile in range(TILES)]
    for tile, sample in enumerate(as_bundle(query, looks, encoder, environment).samples):
        completion, (seen,) = sample.completion, sample.completion.observed
        assert (pixels(seen.images[0]["bytes"]) == pixels(cut_out(query, tile))).all()
        ids, image = completion.token_ids, encoder.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        assert (ids == image).sum() == (ids[seen.start : seen.end] == image).sum() == CELLS
        said = encoder.tokenizer.decode(ids[completion.trainable])
        assert said == f"{crop_call(tile)}<|im_end|>\\boxed{{1}}<|im_end|>"
        assert completion.text == f"{crop_call(tile)}\\boxed{{1}}" and seen.calls == 1 and not seen.failures
        assert all(text in seen.text for text in BoardsTeacher.hears)


def test_the_recipe_has_room_for_a_look(splits, tmp_path):
    """Its limits show boards and tiles as they are meant to be, and the longest look fits in a response."""
    config, teacher, rng = resolve_config("crop_cpu"), BoardsTeacher(), random.Random(0)
    asked = [query for query in splits["train"][::50] if query.category in config.data.category_weights]
    texts = [text for query in asked for parts in teacher.responses(query, rng) for text, _ in parts]
    encoder = PromptEncoder(load_processor(create_tiny(tmp_path, texts=[*teacher.hears, *texts])), config.data)
    assert (config.environment.use, encoder.shown_size(256, 128)) == (["crop"], (64, 32))
    environment, lengths = dialogue_of(teacher, encoder), []
    for query in asked:
        *_, look = as_bundle(query, teacher.responses(query, rng), encoder, environment).samples
        (seen,) = look.completion.observed
        assert encoder.shown_size(*Image.open(io.BytesIO(seen.images[0]["bytes"])).size) == (128, 16)
        lengths.append(look.completion.tokens)
    assert 80 < max(lengths) <= config.rollout.max_new_tokens and config.environment.max_turns >= 2


def test_other_data_is_not_taken_for_boards(splits):
    """Sums know nothing of tiles; boards are not taken for sums either, though they have the sums' columns. A mixture
    has neither teacher."""
    assert not any(map(BoardsTeacher().sees, sums("test")[::100]))
    assert not any(map(SumsTeacher().sees, splits["test"]))
    assert isinstance(teacher_of(splits["test"]), BoardsTeacher)
    assert isinstance(teacher_of([*splits["test"], *sums("test")[::100]]), EasyVqaTeacher)
