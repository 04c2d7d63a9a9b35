"""Image references opened: upright RGB pixels, and sizes without decoding."""

from __future__ import annotations

import io
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from rethinker.config import ConfigError
from rethinker.samples import Query


def image_size(reference: Any, query_id: str) -> tuple[int, int]:
    """(height, width) as stored, from the file's header alone. EXIF rotation may swap the two.

    Raises:
        ConfigError: naming the query and the file that is no readable image.
    """
    if isinstance(reference, Image.Image):
        return reference.height, reference.width
    try:
        with Image.open(_file(reference)) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(reference, query_id, error) from error


def open_image(reference: Any, query_id: str) -> Image.Image:
    """The decoded image: upright by its EXIF orientation, RGB, transparency on white, 16 bits per channel scaled to 8.

    Raises:
        ConfigError: naming the query and the file that cannot be decoded.
    """
    try:
        if isinstance(reference, Image.Image):
            return _rgb(ImageOps.exif_transpose(reference))
        with Image.open(_file(reference)) as image:
            return _rgb(ImageOps.exif_transpose(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(reference, query_id, error) from error


def check_images(queries: Iterable[Query], budget_s: float = 5.0) -> None:
    """Decode the queries' images, each once and in order, for at most `budget_s` seconds.

    A small data set is checked whole before a model is loaded; of a large one the beginning, and the rest when drawn.

    Raises:
        ConfigError: naming the query and the file that cannot be decoded.
    """
    end = time.monotonic() + budget_s
    checked = set()
    for query in queries:
        for reference in query.images:
            key = image_key(reference)
            if key not in checked:
                open_image(reference, query.id)
                checked.add(key)
        if time.monotonic() > end:
            return


def image_key(reference: Any) -> Any:
    """What identifies an image in a cache: its path, its bytes, or the object."""
    if isinstance(reference, Mapping):
        return reference.get("bytes") or reference["path"]
    return _Identity(reference) if isinstance(reference, Image.Image) else str(reference)


class _Identity:
    """A key for an object as itself, which stays alive as long as the key."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def _file(reference: Any) -> Any:
    if isinstance(reference, Mapping):
        return io.BytesIO(reference["bytes"]) if reference.get("bytes") else reference["path"]
    return reference


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip these at 255
        values = np.asarray(image)
        image = Image.fromarray((values >> 8 if values.max(initial=0) > 255 else values).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _unreadable(reference: Any, query_id: str, error: Exception) -> ConfigError:
    name = "its bytes" if isinstance(reference, Mapping) and reference.get("bytes") else str(_file(reference))
    return ConfigError(
        f"data: query {query_id}: cannot read the image {name} ({type(error).__name__}: {error}); repair or remove it"
    )
