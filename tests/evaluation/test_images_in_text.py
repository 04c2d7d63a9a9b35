"""Every image is marked once, or none is, whatever the benchmark's marks."""

from __future__ import annotations

import pytest

from rethinker.config import ConfigError
from rethinker.evaluation.benchmark_rows import NotCoveredError, image_references, mark_images


@pytest.mark.parametrize(
    ("text", "images", "marked", "order"),
    [
        ("What?", ["a", "b"], "What?", ("a", "b")),
        ("<image1> and <image_2> and <image 3>", ["a", "b", "c"], "<image> and <image> and <image>", ("a", "b", "c")),
        ("<image 2>, then <image 1>", ["a", "b"], "<image>, then <image>", ("b", "a")),
        ("<image 1>? <image 1>!", ["a"], "<image>? image 1!", ("a",)),
        ("see <image 2>; <image 2>", ["a", "b"], "<image>see <image>; image 2", ("a", "b")),
        ("<image 1> <image 4>", ["a"], "<image> image 4", ("a",)),
        ("<image 1>", [None, "b"], "<image>image 1", ("b",)),
        ("<image> or <image>", ["a", None, "b"], "<image> or <image>", ("a", "b")),
        ("<image> or <image>", ["a"], "image or image", ("a",)),
        ("the <image> tag, <image 1>", ["a"], "the image tag, <image>", ("a",)),
        ("text", [None], "text", ()),
    ],
)
def test_marks(text, images, marked, order):
    """As many marks as images or none; images in order of appearance, those without a place first."""
    assert mark_images(text, images) == (marked, order)
    assert marked.count("<image>") in (0, len(order))


def test_references(tmp_path):
    """Every way of storing an image, absent ones kept as None so that numbers stay right."""
    (tmp_path / "a.png").write_bytes(b"x")
    path = str(tmp_path / "a.png")
    assert image_references({"bytes": b"1", "path": "q.png"}, tmp_path, "") == [{"bytes": b"1"}]
    assert image_references(b"1", tmp_path, "") == [{"bytes": b"1"}]
    assert image_references({"bytes": None, "path": "a.png"}, tmp_path, "") == [path]
    assert image_references('["./a.png", "a.png"]', tmp_path, "") == [path, path]
    assert image_references("['./a.png']", tmp_path, "") == [path]
    assert image_references([b"1", None], tmp_path, "") == [{"bytes": b"1"}, None]
    assert image_references(None, tmp_path, "") == image_references("", tmp_path, "") == [None]
    assert image_references([], tmp_path, "") == image_references("[]", tmp_path, "") == []
    with pytest.raises(NotCoveredError):
        image_references(["clip.mp4"], tmp_path, "")
    with pytest.raises(ConfigError, match=r"here: no image file .*b.png"):
        image_references("b.png", tmp_path, "here")
