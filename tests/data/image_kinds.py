"""A file of every kind that an image may come as, for the laws that hold whatever it is."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin

from rethinker.samples import Prompt

ORIENTATIONS = range(1, 9)
# What Pillow writes an orientation to, each without its own loss where it can be.
ORIENTED: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {"quality": 100, "subsampling": 0},
    "MPO": {"quality": 100, "subsampling": 0, "save_all": True},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 100},
}


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """[H, W, C] of 8 bits, no two corners alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def photo(width: int = 75, height: int = 30) -> Image.Image:
    """Smooth as photos are, so that a lossy format keeps it, with four corners of their own."""
    return Image.fromarray(noise(5, 2)).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image's file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def oriented(orientation: int, kind: str = "JPEG", image: Image.Image | None = None) -> bytes:
    """An image whose EXIF asks for it to be turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(ORIENTED[kind])
    if kind == "MPO":
        options["append_images"] = [photo(10, 10)]
    return saved(image or photo(), kind, exif=exif, **options)


def tagged(prompt: Prompt, orientation: int = 6) -> Prompt:
    """A prompt as it must not be handed to an engine: its upright images still ask to be turned."""
    images = [image.copy() for image in prompt.images]
    for image in images:
        image.getexif()[0x0112] = orientation
    return replace(prompt, images=images)


def oriented_by_xmp(orientation: int, kind: str = "JPEG") -> bytes:
    """An image whose XMP alone asks for it."""
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/>'
        "</rdf:RDF></x:xmpmeta>"
    )
    options: dict[str, Any] = {"xmp": xmp.encode()}
    if kind == "PNG":
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp)
        options = {"pnginfo": text}
    elif kind == "TIFF":
        options = {"tiffinfo": {700: xmp.encode()}}
    elif kind == "MPO":
        options["append_images"] = [photo(10, 10)]
    return saved(photo(), kind, **ORIENTED[kind], **options)


def behind_the_pixels(png: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk, before its end."""
    chunk = struct.pack(">I", len(content)) + kind + content
    return png[:-12] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + png[-12:]


def damaged_exif(kind: str) -> bytes:
    """An image whose EXIF is no EXIF."""
    return saved(photo(), kind, exif=b"Exif\0\0" + b"no header of a TIFF file")


def _see_through(mode: str) -> Image.Image:
    return Image.fromarray(noise(75, 30, 4)).convert(mode)


def _palette() -> Image.Image:
    return photo().convert("P", palette=Image.Palette.ADAPTIVE)


def _animated(kind: str) -> bytes:
    frames = [Image.fromarray(noise(75, 30, seed=seed)) for seed in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)


def _grey(dtype: type, top: float) -> Image.Image:
    return Image.fromarray((noise(75, 30, 1)[..., 0] / 255 * top).astype(dtype))


KINDS: dict[str, Callable[[], bytes]] = {
    **{f"EXIF {n}": lambda n=n: oriented(n) for n in ORIENTATIONS},
    **{f"EXIF 6, {kind}": lambda kind=kind: oriented(6, kind) for kind in ORIENTED if kind != "JPEG"},
    **{f"XMP 6, {kind}": lambda kind=kind: oriented_by_xmp(6, kind) for kind in ORIENTED},
    **{f"damaged EXIF, {kind}": lambda kind=kind: damaged_exif(kind) for kind in ("JPEG", "PNG", "WEBP")},
    "palette": lambda: saved(_palette()),
    "palette, transparent": lambda: saved(_palette(), transparency=3),
    "palette, alpha": lambda: saved(_palette(), transparency=bytes(range(256))),
    "colour, transparent": lambda: saved(photo(), transparency=photo().getpixel((0, 0))),
    "grey, transparent": lambda: saved(photo().convert("L"), transparency=128),
    "alpha": lambda: saved(_see_through("RGBA")),
    "alpha, WebP": lambda: saved(_see_through("RGBA"), "WEBP"),
    "grey": lambda: saved(photo().convert("L"), "JPEG"),
    "grey with alpha": lambda: saved(_see_through("LA")),
    "black and white": lambda: saved(photo().convert("1")),
    "16 bits": lambda: saved(_grey(np.uint16, 65535)),
    "16 bits, transparent": lambda: saved(_grey(np.uint16, 65535), transparency=257),
    "16 bits, TIFF": lambda: saved(_grey(np.uint16, 65535), "TIFF"),
    "32 bits": lambda: saved(_grey(np.int32, 2**31 - 1), "TIFF"),
    "float": lambda: saved(_grey(np.float32, 1), "TIFF"),
    "CMYK": lambda: saved(photo().convert("CMYK"), "JPEG"),
    "CMYK, TIFF": lambda: saved(photo().convert("CMYK"), "TIFF"),
    "YCbCr": lambda: saved(photo().convert("YCbCr"), "TIFF"),
    "colour profile": lambda: saved(
        photo(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    ),
    **{f"animated {kind}": lambda kind=kind: _animated(kind) for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF")},
    "AVIF": lambda: saved(photo(), "AVIF"),
    "BMP": lambda: saved(photo(), "BMP"),
    "PPM": lambda: saved(photo(), "PPM"),
    "huge, EXIF 8": lambda: oriented(8, image=photo(1500, 1100)),
    **{
        f"{width} x {height}": lambda width=width, height=height: saved(Image.fromarray(noise(width, height)))
        for width, height in ((1, 1), (190, 1), (1, 190), (400, 1), (1, 400), (3, 50), (50, 3), (3, 3))
    },
}
"""The bytes of an image of each kind, made when they are asked for."""
