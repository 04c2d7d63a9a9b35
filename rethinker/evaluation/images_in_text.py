"""The images of a benchmark's row: references that can be opened, and their places marked in the question.

Benchmarks number their marks (`<image 1>`, `<image1>`, `<image_1>`) and may mention an image twice, in the choices, or
not at all; a query marks every image once with `<image>`, in order of appearance, or none.
"""

from __future__ import annotations

import ast
import json
import mimetypes
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError
from rethinker.data.datasets import IMAGE_MARK

_NUMBERED = re.compile(r"<image[ _]?(\d+)>")


class NotAnImageError(Exception):
    """A medium that is no image, such as a video."""


def image_references(value: Any, folder: Path, where: str) -> list[Any]:
    """What a column holds: `[None]` for an image that is absent, else a reference for each image.

    Args:
        value: bytes, `{"bytes", "path"}`, a path from `folder`, a list of these (also spelled as text), or nothing.
        folder: where relative paths start.
        where: benchmark and question, for messages.

    Raises:
        NotAnImageError: for a video.
        ConfigError: a path that does not exist.
    """
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                raise ConfigError(f"{where}: no list of images: {value[:80]!r}") from None
    if isinstance(value, (list, tuple)):
        return [reference for item in value for reference in image_references(item, folder, where)]
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if not value:
        return [None]
    if isinstance(value, (bytes, bytearray)):
        return [{"bytes": bytes(value)}]
    kind = mimetypes.guess_type(str(value))[0] or ""
    if kind.startswith("video"):
        raise NotAnImageError("a video")
    path = folder / str(value)
    if not os.path.isfile(path):  # nor a pipe or a device
        raise ConfigError(f"{where}: no image file {path}; unpack the data set's images in {folder}")
    return [str(path)]


def mark_images(text: str, images: list[Any]) -> tuple[str, tuple[Any, ...]]:
    """Mark the place of every image once.

    Args:
        text: with numbered marks, with plain `<image>` marks, or with none.
        images: number i is `images[i - 1]`; None where there is none.

    Returns:
        The text and the images in order of appearance. Images without a place come first; a second mention becomes
        "image 2", as does the mark of an image that is absent. Plain marks stay if they are as many as the images.
    """
    present = [i for i, image in enumerate(images) if image is not None]
    mentioned = [int(number) - 1 for number in _NUMBERED.findall(text)]
    if not mentioned:
        if text.count(IMAGE_MARK) != len(present):
            text = text.replace(IMAGE_MARK, "image")
        return text, tuple(images[i] for i in present)
    text = text.replace(IMAGE_MARK, "image")
    unplaced = [i for i in present if i not in mentioned]
    order = [*unplaced, *(i for i in dict.fromkeys(mentioned) if i in present)]
    marked: set[int] = set()

    def replace(match: re.Match[str]) -> str:
        i = int(match[1]) - 1
        if i in order and i not in marked:
            marked.add(i)
            return IMAGE_MARK
        return f"image {order.index(i) + 1}" if i in order else f"image {match[1]}"

    return IMAGE_MARK * len(unplaced) + _NUMBERED.sub(replace, text), tuple(images[i] for i in order)
