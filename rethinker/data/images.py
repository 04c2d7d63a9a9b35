"""Image references opened: upright RGB pixels and nothing else, and sizes without decoding, whatever the file is.

What else a file says of its pixels (EXIF, XMP, a colour profile, a transparent colour) ends here: the rollout engine
would follow it once more, and the trainer would not.

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
_SIDEWAYS = [_TURNS[orientation] for orientation in (5, 6, 7, 8)]


class UnreadableImageError(ConfigError):
    """An image that cannot be decoded; the message names the query and the file."""


def image_size(reference: Any, query_id: str, max_pixels: int = DataConfig.max_image_pixels) -> tuple[int, int]:
    """(height, width) of the image that `open_image` returns, from what stands before the pixels alone.

    Raises:
        UnreadableImageError: naming the query and the file that is no readable image.
    """
    with _opened(reference, query_id, max_pixels) as image:
        turned = image.format == "TIFF" and _ORIENTATION in image.tag_v2  # by Pillow; its size says so already
        sideways = not turned and _turn(image) in _SIDEWAYS
        return (image.width, image.height) if sideways else (image.height, image.width)


def open_image(reference: Any, query_id: str, max_pixels: int = DataConfig.max_image_pixels) -> Image.Image:
    """The decoded image as plain RGB pixels, without any metadata, the same for whoever reads them.

    They are turned upright as EXIF says, or XMP where EXIF does not; transparency is white; of an animation or a
    stereo photo they are the first frame. 16 bits become 8; deep grey by the least of the ranges [0, 1] (floats),
    [0, 255] and [0, 65535] that holds all values, else by their own, from 0 or the least if that is below. Colour
    profiles are not applied: neither transformers nor vLLM do, and models were trained without.

    Args:
        reference: a path, `{"bytes"}` or `{"path"}`.
        query_id: for messages.
        max_pixels: `data.max_image_pixels`; an image whose header says more is not decoded.

    Raises:
        UnreadableImageError: naming the query and the file that cannot be decoded.
    """
    with _opened(reference, query_id, max_pixels) as image:
        return plain_image(image)


def check_image(reference: Any, query_id: str, max_pixels: int = DataConfig.max_image_pixels) -> None:
    """Read the whole image for its faults alone, at a third of the cost of `open_image` for a JPEG photo.

    Raises:
        UnreadableImageError: as `open_image` would.
    """
    with _opened(reference, query_id, max_pixels) as image:
        if image.format in ("JPEG", "MPO"):
            image.draft(None, (1, 1))  # every bit is still read, but only an eighth of each side computed
        plain_image(image)


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


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What makes the stored pixels upright; None if nothing does, or if what would say so is damaged."""
    try:
        # Not PngImageFile's own, which decodes the pixels to look behind them.
        return _TURNS.get(Image.Image.getexif(image).get(_ORIENTATION))
    except Exception:  # parsers of metadata raise anything, too; the image is not the worse for it
        return None


def plain_image(image: Image.Image) -> Image.Image:
    """A new image that knows nothing but its pixels: see `open_image`."""
    turn = _turn(image)
    image.load()
    if image.format == "TIFF":  # Pillow has turned it by now
        turn = None
    if image.mode.startswith(("I", "F")):  # Pillow would clip these at 255
        image = _eight_bits(image)
    plain = Image.new("RGB", image.size, "white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        plain.paste(image, mask=image)
    else:
        plain.paste(image)
    return plain if turn is None else plain.transpose(turn)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Deep grey, integers or floats, by the rule of `open_image`; what is not finite becomes 0."""
    values = np.asarray(image).astype(np.float32)
    values[~np.isfinite(values)] = 0
    low, high = float(values.min(initial=0)), float(values.max(initial=0))
    tops = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    top = min((top for top in tops if high <= top), default=high) if low == 0 else high
    scale = 255 / (top - low)
    levels = np.rint(values * scale - low * scale).astype(np.uint8)
    if "transparency" in image.info:
        levels[values == image.info["transparency"]] = 255
    return Image.fromarray(levels)
