"""Every image is marked once, or none is, whatever the benchmark's marks."""

from __future__ import annotations

import pytest

from rethinker.evaluation.benchmark_rows import NotCoveredError, images_of, mark_images


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


def test_references():
    """Every way of storing an image, absent ones kept as None so that numbers stay right."""
    assert images_of({"bytes": b"1", "path": "q.png"}) == images_of(b"1") == [b"1"]
    assert images_of({"bytes": None, "path": "a.png"}) == ["a.png"]
    assert images_of('["./a.png", "a.png"]') == images_of("['./a.png', 'a.png']") == ["./a.png", "a.png"]
    assert images_of([b"1", None]) == [b"1", None]
    assert images_of(None) == images_of("") == [None]
    assert images_of([]) == images_of("[]") == []
    with pytest.raises(NotCoveredError):
        images_of(["clip.mp4"])
