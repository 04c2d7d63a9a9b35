"""The tool `crop`: a box of an image, cut from the image in full and so shown larger than before.

Boxes of a crop are boxes of the image that it was cut from: nothing is cut from what was reduced.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from rethinker.environments.calls import Call, CallError, takes
from rethinker.environments.images import as_png, check_shape
from rethinker.samples import Query

BOX_NAMES = ("bbox_2d", "box", "bbox")
LEAST_SIDE = 16
"""Pixels of the full image: a smaller cut would be about a patch, or less."""
_NUMBER = r"\s*(-?\d{1,30}(?:\.\d{1,30})?)\s*"
_POINTS = re.compile(
    rf"\s*(?:<\|box_start\|>)?\s*\({_NUMBER},{_NUMBER}\)\s*,?\s*\({_NUMBER},{_NUMBER}\)\s*(?:<\|box_end\|>)?\s*"
)

Box = tuple[float, float, float, float]
ShownSize = Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True)
class View:
    """What a crop shows: a box (left, top, right, bottom; pixels) of the query's image number `source`, from 0; the
    model sees it in the size `seen` (width, height)."""

    source: int
    box: tuple[int, int, int, int]
    seen: tuple[int, int]


@dataclass(frozen=True)
class Seen:
    """The state of a response with tools: its query, and the crops that it was shown, in order."""

    query: Query
    crops: tuple[View, ...] = ()

    @property
    def images(self) -> int:
        """How many images it has been shown, the question's included: the number of the latest, counted from 1."""
        return len(self.query.images) + len(self.crops)


def describe(boxes: Literal["pixels", "thousandths"]) -> dict:
    """The tool's JSON schema; `boxes`: environment.boxes."""
    unit = {"pixels": "in pixels", "thousandths": "each from 0 to 1000 (thousandths of the image's sides)"}
    box = {
        "type": "array",
        "items": {"type": "number"},
        "minItems": 4,
        "maxItems": 4,
        "description": f"The box as [x1, y1, x2, y2], {unit[boxes]}, from the upper left corner.",
    }
    number = {"type": "integer", "description": "Which image, counted from 1 in the order in which they came."}
    return {
        "name": "crop",
        "description": "Zoom in: shows a box of an image, enlarged, as a further image.",
        "parameters": {
            "type": "object",
            "properties": {"bbox_2d": box, "image": number | {"default": 1}},
            "required": ["bbox_2d"],
        },
    }


@dataclass(frozen=True)
class Cropper:
    """Cuts boxes out of a query's images.

    Args:
        boxes: `environment.boxes`.
        open_image: (reference, query id) to the image in full.
        shown_size: (width, height) to the same as the model sees it; what is cut has no more pixels than that.
    """

    boxes: Literal["pixels", "thousandths"]
    open_image: Callable[[Any, str], Image.Image]
    shown_size: ShownSize

    def cut(self, call: Call, seen: Seen) -> tuple[bytes, View]:
        """What a call of the tool shows: a PNG file, and what of the query's images that is.

        Raises:
            CallError: `arguments`, `image` (there is none of that number), or `box`.
        """
        given = takes(call, (), (*BOX_NAMES, "image"))
        named = [name for name in BOX_NAMES if name in given]
        if len(named) != 1:
            raise CallError("arguments", "crop needs one box, as bbox_2d")
        box, number = _box(given[named[0]]), _number(given.get("image", 1), seen.images)
        if number <= len(seen.query.images):
            source = number - 1
            image = self.open_image(seen.query.images[source], seen.query.id)
            area, size = (0, 0, *image.size), self.shown_size(*image.size)
        else:
            view = seen.crops[number - 1 - len(seen.query.images)]
            source, area, size = view.source, view.box, view.seen
            image = self.open_image(seen.query.images[source], seen.query.id)
        left, right = _side(box[0], box[2], size[0] if self.boxes == "pixels" else 1000, area[0], area[2], "x")
        top, bottom = _side(box[1], box[3], size[1] if self.boxes == "pixels" else 1000, area[1], area[3], "y")
        check_shape(right - left, bottom - top, "box")
        most_pixels = math.prod(self.shown_size(right - left, bottom - top))
        png, cut_size = as_png(image.crop((left, top, right, bottom)), most_pixels)
        return png, View(source, (left, top, right, bottom), self.shown_size(*cut_size))


def _box(given: Any) -> Box:
    """Four numbers, from a list or from text as Qwen writes boxes.

    Raises:
        CallError: it is something else.
    """
    numbers = given
    if isinstance(given, str) and len(given) <= 200:
        try:
            points = _POINTS.fullmatch(given)
            numbers = [float(number) for number in points.groups()] if points else json.loads(given)
        except (ValueError, RecursionError):
            numbers = None
    plain = isinstance(numbers, Sequence) and len(numbers) == 4 and all(type(n) in (int, float) for n in numbers)
    if not plain or any(number != number for number in numbers):
        raise CallError("box", f"the box is no list of four numbers [x1, y1, x2, y2]: {reprlib.repr(given)[:80]}")
    return tuple(numbers)


def _number(given: Any, images: int) -> int:
    if isinstance(given, str) and given.isdecimal() and len(given) < 10:
        given = int(given)
    if type(given) is not int:
        raise CallError("arguments", f"image must be a number, not {reprlib.repr(given)[:40]}")
    if not 1 <= given <= images:
        raise CallError("image", f"there is no image {given!s:.20}; there are {images}, counted from 1")
    return given


def _side(first: float, second: float, unit: int, start: int, end: int, axis: str) -> tuple[int, int]:
    """The pixels [low, high) of the full image that a side of a box covers, in whole pixels outwards.

    `unit` is the length of the image's side in the box's coordinates; that side is [start, end) of the full image.
    """
    low, high = sorted(min(max(value, 0), unit) for value in (first, second))
    if low == high:
        where = "has no area" if first == second else f"lies outside the image, whose {axis} goes from 0 to {unit}"
        raise CallError("box", f"the box {where}")
    length = end - start
    low, high = start + math.floor(low * length / unit), start + math.ceil(high * length / unit)
    missing = LEAST_SIDE - (high - low)
    if missing > 0:  # grows around its centre, and stays within the image
        low = max(start, min(low - missing // 2, end - LEAST_SIDE))
        high = min(end, low + LEAST_SIDE)
    return low, high
