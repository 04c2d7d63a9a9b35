"""Handwritten sums: right by construction, splits that share no digit's image, responses that parse."""

from __future__ import annotations

import io
import random
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from rethinker.algorithm.rethinking import rethinks
from rethinker.config import ConfigError
from rethinker.embedded.sums import CELL, OF_ITS_OWN, SLIPS, SPLITS, THOUGHT_OVER, SumsTeacher, sums, with_slip
from rethinker.rewards.functions import boxed_reward
from rethinker.samples import Query


@pytest.fixture(scope="module")
def splits():
    return {split: sums(split) for split in SPLITS}


@pytest.fixture(scope="module")
def test_split(splits):
    return splits["test"]


def counted(symbols: str) -> list[tuple[str, int, int]]:
    """A slow solver: every step by counting one by one, (sign, digit, total)."""
    total, done = 0, []
    for sign, digit in re.findall(r"([+-]?)(\d)", symbols):
        for _ in range(int(digit)):
            total = total - 1 if sign == "-" else total + 1
        done.append((sign, int(digit), total))
    return done


def test_answers_and_steps_are_what_a_slow_solver_counts(splits):
    """All 15,600 questions: the answer, every step, and a running total that is never below 0."""
    for query in (query for queries in splits.values() for query in queries):
        first, *rest = counted(query.metadata["symbols"])
        total, steps = first[2], []
        for sign, digit, after in rest:
            steps.append(f"{total}{sign}{digit}={after}")
            total = after
            assert after >= 0
        assert query.metadata["steps"] == steps and query.answer == str(total)
        assert query.metadata["category"] == f"{len(steps) + 1} terms"
    assert [len(queries) for queries in splits.values()] == [12000, 1800, 1800]


def test_the_image_shows_the_sum(splits):
    """Every cell is the digit's own image or the printed sign, in the order of the sum, in every split."""
    digits = load_digits()
    signs: dict[str, set[bytes]] = {"+": set(), "-": set()}
    for query in (query for queries in splits.values() for query in queries[::37]):
        grey = np.asarray(Image.open(io.BytesIO(query.images[0]["bytes"])))  # [CELL, CELL * symbols]
        symbols, images = query.metadata["symbols"], iter(query.metadata["image_ids"])
        assert grey.shape == (CELL, CELL * len(symbols))
        for place, symbol in enumerate(symbols):
            cell = grey[:, place * CELL : (place + 1) * CELL]
            if symbol in signs:
                signs[symbol].add(cell.tobytes())
                continue
            image = next(images)
            assert digits.target[image] == int(symbol)
            ink = 16 * (1 - cell.reshape(8, 2, 8, 2).mean((1, 3)) / 255)  # [8, 8], as the original
            assert np.corrcoef(ink.ravel(), digits.images[image].ravel())[0, 1] > 0.95
    assert len(signs["+"]) == len(signs["-"]) == 1 and signs["+"] != signs["-"]


def test_no_digit_is_in_two_splits(splits):
    """By the images' numbers, and by their pixels too: scikit-learn has no image twice across the splits."""
    used = {split: {i for q in queries for i in q.metadata["image_ids"]} for split, queries in splits.items()}
    assert [len(used[split]) for split in SPLITS] == [1197, 300, 300]
    pixels = load_digits().images
    seen = {split: {pixels[i].tobytes() for i in ids} for split, ids in used.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not used[one] & used[other] and not seen[one] & seen[other]


def is_correct(text: str, query: Query) -> bool:
    return boxed_reward(text, query.answer, query) >= 1.0


def test_the_same_questions_every_time(test_split):
    """And ids of their own."""
    assert sums("test") == test_split
    assert len({query.id for query in test_split}) == len(test_split)


def test_responses_parse_and_end_right(test_split):
    """To every question one at once and one with steps, some of these thought over; what is not taught comes first."""
    teacher, rng = SumsTeacher(), random.Random(0)
    kinds: Counter[str] = Counter()
    for query in test_split:
        fast, with_steps = teacher.responses(query, rng)
        assert fast == [(f"\\boxed{{{query.answer}}}", True)]
        slow = "\n".join([*query.metadata["steps"], fast[0][0]])
        texts = [text for text, _ in with_steps]
        assert is_correct("".join(texts), query) and with_steps[-1][1]
        if len(texts) == 1:
            assert texts == [slow] and not rethinks(slow)
            continue
        assert texts[2] == "\n" + slow and rethinks(texts[1]) and not rethinks(texts[0])
        (_, first_taught), (_, own), _ = with_steps
        assert is_correct(texts[0], query) == (texts[0] == slow) and first_taught == (texts[0] == slow and own)
        kinds["thought over"] += 1
        kinds["slip"] += texts[0] != slow
        kinds["own"] += own
    assert kinds["thought over"] / len(test_split) == pytest.approx(THOUGHT_OVER, abs=0.03)
    assert kinds["slip"] / kinds["thought over"] == pytest.approx(SLIPS, abs=0.1)
    assert kinds["own"] / kinds["thought over"] == pytest.approx(OF_ITS_OWN, abs=0.1)


def test_a_slip_is_one_digit_misread():
    """The steps are those of the sum with that digit, counted by the slow solver; every place slips."""
    rng, places = random.Random(0), set()
    for _ in range(200):
        lines = with_slip("6-0+8", rng).split("\n")
        misread = lines[0].split("=")[0][:3] + re.search(r"[+-]\d=", lines[1])[0][:-1]
        changed = [i for i, (a, b) in enumerate(zip("6-0+8", misread, strict=True)) if a != b]
        assert len(changed) == 1 and lines[-1] == f"\\boxed{{{counted(misread)[-1][2]}}}"
        places.add(changed[0])
    assert places == {0, 2, 4}


def test_the_probe_learns_the_symbols_in_their_order(test_split):
    """Scores that name each image's symbols from left to right cost nothing; in another order they do."""
    teacher, queries = SumsTeacher(), test_split[::500]
    shown = torch.tensor(["0123456789+-".index(symbol) for query in queries for symbol in query.metadata["symbols"]])
    scores = 50.0 * torch.nn.functional.one_hot(shown, teacher.classes)
    owner = torch.zeros(len(shown), dtype=torch.int64)
    loss, symbols = teacher.look_loss(scores, owner, queries)
    assert loss < 1e-6 and symbols == len(scores)
    assert teacher.look_loss(scores.flip(0), owner, queries)[0] > 10
    with pytest.raises(ConfigError, match="data.min_pixels=256"):  # enlarged images: more tokens than symbols
        teacher.look_loss(scores.repeat(2, 1), owner.repeat(2), queries)


@pytest.mark.parametrize(
    "metadata", [{}, *({"symbols": other} for other in ("H2O", None, "", "7", "++", "1+", "12", "1+1\n", 11))]
)
def test_other_data_is_not_taken_for_sums(metadata):
    """Its columns may have the same names."""
    assert not SumsTeacher().sees(Query("q", "?", "!", metadata=metadata))
