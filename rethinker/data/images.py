"""Image references opened: upright RGB pixels, and sizes without decoding, whatever the file turns out to be.

A data set names files and holds bytes from anywhere, so only regular files are opened (a pipe would never end), only by
decoders that decode (Pillow's EPS would start Ghostscript), and only up to a number of pixels.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from rethinker.config import ConfigError, DataConfig, one_line
from rethinker.data.archives import open_member, split_archive

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF")

# No format needs more bytes per pixel: 16 bits for each of four channels, uncompressed.
MOST_BYTES_PER_PIXEL = 8

_ORIENTATION = 0x0112  # EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(ConfigError):
    """An image that cannot be decoded; the message names the query and the file."""


def image_size(reference: Any, query_id: str, max_pixels: int = DataConfig.max_image_pixels) -> tuple[int, int]:
    """(height, width) as stored, from the file's header alone. EXIF rotation may swap the two.

    Raises:
        UnreadableImageError: naming the query and the file that is no readable image.
    """
    with _opened(reference, query_id, max_pixels) as image:
        return image.height, image.width


def open_image(reference: Any, query_id: str, max_pixels: int = DataConfig.max_image_pixels) -> Image.Image:
    """The decoded image: upright by its EXIF orientation, RGB, transparency on white, 16 bits per channel scaled to 8.

    Of an animation it is the first frame.

    Args:
        reference: a path, `{"bytes"}` or `{"path"}`.
        query_id: for messages.
        max_pixels: `data.max_image_pixels`; an image whose header says more is not decoded.

    Raises:
        UnreadableImageError: naming the query and the file that cannot be decoded.
    """
    with _opened(reference, query_id, max_pixels) as image:
        return _rgb(_upright(image))


def check_image(reference: Any, query_id: str, max_pixels: int = DataConfig.max_image_pixels) -> None:
    """Read the whole image for its faults alone, at a third of the cost of `open_image` for a JPEG photo.

    Raises:
        UnreadableImageError: as `open_image` would.
    """
    with _opened(reference, query_id, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (1, 1))  # every bit is still read, but only an eighth of each side computed
        _rgb(_upright(image))


def image_key(reference: Any) -> Hashable:
    """What identifies an image in a cache: its path, or its bytes or their name."""
    if isinstance(reference, Mapping):
        return reference.get("name") or reference.get("bytes") or reference["path"]
    return str(reference)


@contextmanager
def _opened(reference: Any, query_id: str, max_pixels: int) -> Iterator[Image.Image]:
    """The image, its pixels not yet decoded; whatever goes wrong in the body too is the image's fault."""
    content, path = None, reference
    if isinstance(reference, Mapping):
        content, path = reference.get("bytes"), reference.get("path")
    try:
        with io.BytesIO(content) if content else _file(path, max_pixels) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on odd metadata, and on sizes, which are judged here
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > max_pixels:
                    raise ValueError(
                        f"{image.width} x {image.height} pixels are more than data.max_image_pixels={max_pixels}"
                    )
                yield image
    except Exception as error:  # decoders raise anything on damaged bytes, from struct.error to MemoryError
        name = "its bytes" if content else path
        raise UnreadableImageError(
            f"data: query {query_id}: cannot read the image {name} ({one_line(error)}); repair or remove it"
        ) from error


def _file(path: str | os.PathLike[str], max_pixels: int) -> BinaryIO:
    longest = MOST_BYTES_PER_PIXEL * max_pixels + 2**20
    if archived := split_archive(os.fspath(path)):
        return open_member(*archived, longest)
    # Not blocking: to open a named pipe would wait for its writer.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    status = os.fstat(number)
    if stat.S_ISREG(status.st_mode) and status.st_size <= longest:
        return os.fdopen(number, "rb")
    os.close(number)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file")
    raise ValueError(f"{status.st_size} bytes are too many for data.max_image_pixels={max_pixels}")


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says. Pillow's exif_transpose also writes the other tags anew, and fails on odd ones."""
    turn = _TURNS.get(image.getexif().get(_ORIENTATION))
    return image if turn is None else image.transpose(turn)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow would clip these at 255
        values = np.asarray(image)
        values = values >> 8 if values.max(initial=0) > 255 else values
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")
