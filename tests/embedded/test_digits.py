"""The digits: right answers to questions of three kinds about one or two images, split by image, always the same."""

from __future__ import annotations

import hashlib
import io
from collections import Counter

import pytest
from PIL import Image
from sklearn.datasets import load_digits

from rethinker.embedded.digits import SIDE, digits
from rethinker.samples import IMAGE_MARK


@pytest.fixture(scope="module")
def splits():
    return {split: digits(split) for split in ("train", "test")}


def test_answers_follow_from_the_images(splits):
    """Every answer is what scikit-learn's labels say; pairs are never equal where they are compared."""
    labels = load_digits().target
    for query in [q for queries in splits.values() for q in queries]:
        values = [int(labels[i]) for i in query.metadata["image_ids"]]
        category = query.metadata["category"]
        if category == "read":
            expected = str(values[0])
        elif category == "add":
            expected = str(sum(values))
        else:
            assert values[0] != values[1]
            wanted = max(values) if "larger" in query.question else min(values)
            expected = "first" if values[0] == wanted else "second"
        assert query.answer == expected
        assert len(query.images) == len(values) and query.question.count(IMAGE_MARK) in (0, len(values))


def test_splits_share_no_image(splits):
    """Split by image: 1,437 and 360, no image in both, and ids that are unique."""
    ids = {s: {i for q in queries for i in q.metadata["image_ids"]} for s, queries in splits.items()}
    assert (len(ids["train"]), len(ids["test"])) == (1437, 360) and not ids["train"] & ids["test"]
    assert (len(splits["train"]), len(splits["test"])) == (10059, 2520)
    assert len({q.id for queries in splits.values() for q in queries}) == 12579


def test_no_answer_is_a_safe_guess(splits):
    """Digits, sides and question kinds are balanced: no fixed answer gets far."""
    for queries in splits.values():
        answers: dict[str, Counter[str]] = {}
        for query in queries:
            answers.setdefault(query.metadata["category"], Counter())[query.answer] += 1
        shares = {name: max(c.values()) / c.total() for name, c in answers.items()}
        assert shares["read"] < 0.14 and shares["add"] < 0.14 and shares["compare"] < 0.55


def test_images(splits):
    """PNGs of 64 pixels that show the ink of their digit, dark on white."""
    data = load_digits().images
    for query in splits["test"][::97]:
        for reference, number in zip(query.images, query.metadata["image_ids"], strict=True):
            image = Image.open(io.BytesIO(reference["bytes"]))
            assert image.size == (SIDE, SIDE) and image.mode == "RGB"
            shrunk = image.convert("L").resize((8, 8), Image.Resampling.BOX)
            for y, x in ((0, 0), (4, 3), (3, 5)):
                assert abs(shrunk.getpixel((x, y)) - 255 * (1 - data[number][y, x] / 16)) < 60


def test_the_same_every_time(splits):
    """Questions and pairs do not depend on the process: they are compared with a digest taken once."""
    text = "\n".join(f"{q.id} {q.question} {q.answer} {q.metadata}" for q in splits["train"] + splits["test"])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "8e9cb268dc489cae"
