"""`crop` cuts what the model pointed at out of the full image, whatever it writes as a box."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from rethinker.config import EnvironmentConfig
from rethinker.environments.runner import Runner
from rethinker.environments.tools import schemas
from tests.environments.helpers import HEIGHT, IMAGE, QUERY, SHOWN, WIDTH, call, open_image, pixels, shown_size

FULL = np.asarray(IMAGE)


def runner(**settings) -> Runner:
    return Runner(EnvironmentConfig(use=["crop"], **settings), open_image, shown_size)


def answered(text: str, query=QUERY, **settings):
    of = runner(**settings)
    return of.step(of.reset(query).result(), text).result()[1]


def cut(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    return FULL[top:bottom, left:right]


WORKS = [  # boxes in the shown image, 500 x 300; what is cut of the full one, 2000 x 1200
    ([10, 20, 60, 80], (40, 80, 240, 320)),
    ([60, 80, 10, 20], (40, 80, 240, 320)),  # swapped corners
    ([10.5, 20, 60.25, 80], (42, 80, 241, 320)),
    ([10.1, 20, 60.1, 80], (40, 80, 241, 320)),  # whole pixels outwards
    ([-50, -50, 60, 80], (0, 0, 240, 320)),  # partly outside
    ([450, 250, 9e9, float("inf")], (1800, 1000, 2000, 1200)),
    ([450, 250, 10**400, 10**400], (1800, 1000, 2000, 1200)),
    ([0, 0, 500, 300], (0, 0, 2000, 1200)),
    ([100, 100, 100.1, 100.1], (393, 393, 409, 409)),  # less than a pixel: grows to a patch around it
    ([0, 0, 1, 1], (0, 0, 16, 16)),
    ([499, 299, 500, 300], (1984, 1184, 2000, 1200)),
    ("(10,20),(60,80)", (40, 80, 240, 320)),
    ("<|box_start|>(10,20),(60,80)<|box_end|>", (40, 80, 240, 320)),
    ("[10, 20, 60, 80]", (40, 80, 240, 320)),
]


@pytest.mark.parametrize(("box", "expected"), WORKS, ids=range(len(WORKS)))
def test_boxes_that_work(box, expected):
    """The crop holds the full image's own pixels, of which the model saw a sixteenth."""
    assert shown_size(WIDTH, HEIGHT) == SHOWN
    answer = answered(call("crop", bbox_2d=box))
    assert (answer.text, answer.failures, answer.calls) == (
        "<tool_response>\nimage 2: <image>\n</tool_response>",
        (),
        1,
    )
    if np.prod(cut(*expected).shape[:2]) <= 150_000:
        assert np.array_equal(pixels(answer.images[0]), cut(*expected))
    else:
        assert Image.open(io.BytesIO(answer.images[0])).size == SHOWN


FAILS = [
    ([600, 20, 700, 80], "box"),  # wholly outside
    ([10, -80, 60, -20], "box"),
    ([10, 20, 10, 80], "box"),  # no area
    ([0, 0, 0, 0], "box"),
    ([float("nan"), 0, 10, 10], "box"),
    ([0, 0, 500, 1], "ok"),  # 2000 x 16
    (["10", "20", "60", "80"], "box"),
    ([10, 20, 60], "box"),
    ([10, 20, 60, 80, 90], "box"),
    ([[10, 20], [60, 80]], "box"),
    ([True, 20, 60, 80], "box"),
    ([None] * 4, "box"),
    ({"x1": 10}, "box"),
    (None, "box"),
    ("here", "box"),
    ("1234", "box"),
    ('"abcd"', "box"),
    ("(10,20)", "box"),
    ("(" * 100_000, "box"),
    ("9" * 190, "box"),
    ("<image>", "box"),
]


@pytest.mark.parametrize(("box", "reason"), FAILS, ids=range(len(FAILS)))
def test_boxes_that_are_none(box, reason):
    """The model reads what is wrong, sees no image, and the reason is counted."""
    answer = answered(call("crop", bbox_2d=box))
    if reason == "ok":
        assert pixels(answer.images[0]).shape[:2] == (16, 2000)
        return
    assert answer.failures == (reason,) and not answer.images and not answer.done
    assert "error: the box" in answer.text and "<image>" not in answer.text and len(answer.text) < 300


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "arguments"),
        ({"bbox_2d": [1, 2, 90, 90], "box": [1, 2, 90, 90]}, "arguments"),
        ({"bbox_2d": [1, 2, 90, 90], "label": "a cat"}, "arguments"),
        ({"bbox_2d": [1, 2, 90, 90], "image": 0}, "image"),
        ({"bbox_2d": [1, 2, 90, 90], "image": 2}, "image"),
        ({"bbox_2d": [1, 2, 90, 90], "image": -1}, "image"),
        ({"bbox_2d": [1, 2, 90, 90], "image": 10**300}, "image"),
        ({"bbox_2d": [1, 2, 90, 90], "image": 1.0}, "arguments"),
        ({"bbox_2d": [1, 2, 90, 90], "image": True}, "arguments"),
        ({"bbox_2d": [1, 2, 90, 90], "image": [1]}, "arguments"),
        ({"bbox_2d": [1, 2, 90, 90], "image": "1"}, None),
        ({"box": [1, 2, 90, 90]}, None),
        ({"bbox": [1, 2, 90, 90], "image": 1}, None),
    ],
)
def test_arguments(arguments, reason):
    """One box by any of its names, and the number of an image that the model has seen."""
    assert answered(call("crop", **arguments)).failures == ((reason,) if reason else ())


def test_a_cut_too_narrow_for_any_model_is_refused():
    """Qwen's image processors refuse sides of more than 200 to 1; rounding does not make a shape narrower than that."""

    def qwens(width: int, height: int) -> tuple[int, int]:
        if width > 200 * height:
            raise ValueError(f"absolute aspect ratio must be smaller than 200, got {width / height}")
        return shown_size(width, height)

    wide = Image.new("RGB", (6000, 40))
    of = Runner(EnvironmentConfig(use=["crop"], boxes="thousandths"), lambda *_: wide, qwens)
    state = of.reset(QUERY).result()
    assert of.step(state, call("crop", bbox_2d=[0, 0, 1000, 700])).result()[1].failures == ("box",)
    for width in range(900, 934):
        assert of.step(state, call("crop", bbox_2d=[0, 0, width, 700])).result()[1].failures == ()


def test_thousandths():
    """The same box in thousandths of the image's sides."""
    answer = answered(call("crop", bbox_2d=[20, 100, 120, 300]), boxes="thousandths")
    assert np.array_equal(pixels(answer.images[0]), cut(40, 120, 240, 360))


def test_a_crop_of_a_crop_is_cut_from_the_full_image():
    """Coordinates are those of the image that was shown; pixels are the question's, though the crop was reduced."""
    of = runner()
    state, first = of.step(of.reset(QUERY).result(), call("crop", bbox_2d=[100, 0, 400, 300])).result()
    left, right, width, height = 400, 1600, *pixels(first.images[0]).shape[1::-1]
    assert width * height <= 150_000 < 1200 * 1200  # reduced: 387 x 387
    assert state.crops[0].seen == (width, height)
    box = [width / 2, 0, width / 2 + 20, 20]
    _, second = of.step(state, call("crop", bbox_2d=box, image=2)).result()
    middle, side = (left + right) // 2, -(-20 * 1200 // width)
    assert np.array_equal(pixels(second.images[0]), cut(middle, 0, middle + side, side))
    assert "image 3" in second.text


def test_images_are_bounded_and_counted():
    """Beyond max_images, those of earlier turns included, the model reads that it is shown no more. An image of the
    same turn is not seen yet."""
    of = runner(max_images=2)
    box = call("crop", bbox_2d=[10, 20, 60, 80])
    state, first = of.step(of.reset(QUERY).result(), box).result()
    later, second = of.step(state, box + box + call("crop", bbox_2d=[1, 1, 50, 50], image=3)).result()
    assert (len(second.images), second.text.count("<image>"), second.calls) == (1, 1, 3)
    assert second.failures == ("images", "images")
    assert of.step(later, box).result()[1].failures == ("images",)
    _, third = of.step(state, box).result()  # a state is not changed by the steps from it
    assert not third.failures and third.images == first.images
    _, fourth = runner().step(state, box + call("crop", bbox_2d=[1, 1, 50, 50], image=3)).result()
    assert fourth.failures == ("image",) and "there are 2" in fourth.text


def test_a_question_without_images_has_nothing_to_crop():
    answer = answered(call("crop", bbox_2d=[1, 2, 3, 4]), replace(QUERY, images=()))
    assert answer.failures == ("image",) and "there are 0" in answer.text


def test_it_is_repeatable_and_at_once():
    """In the caller's thread: futures are done, and equal calls give equal bytes."""
    of, answers = runner(), []
    assert of.inline
    for _ in range(2):
        reset = of.reset(QUERY)
        assert reset.done()
        step = of.step(reset.result(), call("crop", bbox_2d=[10, 20, 460, 280]))
        assert step.done()
        answers.append(step.result())
    assert answers[0] == answers[1]


def test_the_description_says_what_coordinates_count():
    (schema,) = schemas(EnvironmentConfig(use=["crop"]))
    assert schema["type"] == "function" and schema["function"]["name"] == "crop"
    assert "pixels" in str(schema) and "thousandths" in str(
        schemas(EnvironmentConfig(use=["crop"], boxes="thousandths"))
    )
