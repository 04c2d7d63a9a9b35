"""Images that an environment shows: plain RGB as PNG, not much larger than the model could see."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from rethinker.config import DataConfig
from rethinker.data.images import UnreadableImageError, image_size, open_image, plain_image
from rethinker.environments.calls import CallError

MOST_RATIO = 200
"""Longer side over shorter: Qwen's image processors take nothing beyond it."""
MOST_PIXELS = DataConfig.max_image_pixels


def as_png(image: Image.Image, most_pixels: int) -> tuple[bytes, tuple[int, int]]:
    """An RGB image as a PNG file of about `most_pixels`, reduced if it has more, and its (width, height)."""
    scale = math.sqrt(most_pixels / (image.width * image.height))
    if scale < 1:
        sides = [side * scale for side in image.size]
        # The shorter side is rounded up, so that the shape does not become narrower; 499.9999999 is 500.
        rounded = [math.ceil(n - 1e-6) if n < max(image.size) * scale else int(n + 1e-6) for n in sides]
        image = image.resize(rounded, Image.Resampling.BICUBIC)
    with io.BytesIO() as file:
        image.save(file, "PNG", compress_level=1)
        return file.getvalue(), image.size


def png_of(given: Any, most_pixels: int) -> bytes:
    """What an environment gave as an image (a PIL image, a file's bytes, a path, or a reference as in `Query.images`).

    Raises:
        CallError: it is none (reason `image`), or has too many pixels or too narrow a shape (`size`).
    """
    try:
        if isinstance(given, Image.Image):
            _check_size(*given.size)
            return as_png(plain_image(given), most_pixels)[0]
        reference = {"bytes": given} if isinstance(given, bytes) else given
        if not isinstance(reference, str | os.PathLike | Mapping):
            raise CallError("image", f"a {type(given).__name__} is no image: give a PIL image, bytes or a path")
        height, width = image_size(reference, "of an environment", max_pixels=10**12)  # from its header
        _check_size(width, height)
        return as_png(open_image(reference, "of an environment"), most_pixels)[0]
    except UnreadableImageError as error:
        cause = type(error.__cause__).__name__
        raise CallError("image", f"what was given as an image cannot be read ({cause})") from None


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise CallError("size", f"an image of {width} x {height} pixels; there may be {MOST_PIXELS:,}")
    check_shape(width, height, "size")


def check_shape(width: int, height: int, reason: str) -> None:
    """
    Raises:
        CallError: one side is too long for the other, or 0.
    """
    if max(width, height) > MOST_RATIO * min(width, height):
        raise CallError(reason, f"{width} x {height} pixels: one side may be at most {MOST_RATIO} times the other")
