"""No image file can stop, fill or run anything."""

from __future__ import annotations

import io
import os
import socket
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from rethinker.data.images import UnreadableImageError, check_image, image_size, open_image
from tests.data import image_kinds
from tests.data.image_kinds import (
    KINDS,
    ORIENTATIONS,
    ORIENTED,
    behind_the_pixels,
    damaged_exif,
    oriented,
    oriented_by_xmp,
    photo,
)


def saved(image: Image.Image, kind: str, **options) -> dict[str, bytes]:
    return {"bytes": image_kinds.saved(image, kind, **options)}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["pipe", "/dev/zero", "/dev/random", "socket", "folder", "loop", "gone.png", "a\0b"])
def test_only_regular_files_are_opened(tmp_path, name):
    """A named pipe would wait for ever and /dev/zero never ends; both are refused at once, with their names."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for read in (open_image, image_size, check_image):
            with pytest.raises(UnreadableImageError, match="query q: cannot read the image"):
                read(str(tmp_path / name), "q")
    with pytest.raises(UnreadableImageError):
        open_image({"path": str(tmp_path / name)}, "q")


def test_links_to_images_are_images(tmp_path):
    """Data sets are full of links; what they lead to counts."""
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    (tmp_path / "link").symlink_to("a.png")
    assert open_image(str(tmp_path / "link"), "q").size == (8, 6)


def test_no_program_is_started(tmp_path, monkeypatch):
    """Pillow would give an EPS file to Ghostscript, which runs what is in it; it is not opened, nor is PDF or WMF."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # looked up again
    eps = saved(Image.new("RGB", (8, 6)), "EPS")
    for read in (open_image, image_size, check_image):
        with pytest.raises(UnreadableImageError):
            read(eps, "q")
    assert not (tmp_path / "ran").exists()
    with Image.open(io.BytesIO(eps["bytes"])) as image, pytest.raises(OSError):
        image.load()
    assert (tmp_path / "ran").exists()  # so it would have


def test_sizes_beyond_the_limit_are_not_decoded(tmp_path):
    """A header may claim any size: nothing is decoded beyond data.max_image_pixels, and no memory taken for it."""
    bomb = {"bytes": b"P6 60000 60000 255 x"}
    for reference in (bomb, {"bytes": b"P6 9435 9434 255 x"}):
        with pytest.raises(UnreadableImageError, match="pixels"):
            open_image(reference, "q")
    with pytest.raises(UnreadableImageError, match=r"100 x 50 pixels are more than data\.max_image_pixels=4999"):
        open_image(saved(Image.new("L", (100, 50)), "PNG"), "q", 4999)
    assert open_image(saved(Image.new("L", (100, 50)), "PNG"), "q", 5000).size == (100, 50)
    with (tmp_path / "large.webp").open("wb") as file:  # WebP is read whole before its header is looked at
        file.write(saved(Image.new("L", (10, 10)), "WEBP")["bytes"])
        file.truncate(2**40)
    with pytest.raises(UnreadableImageError, match="1099511627776 bytes are too many"):
        open_image(str(tmp_path / "large.webp"), "q")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_of_an_animation_the_first_frame(kind):
    """Frames after the first are not looked at, not even if they are cut off."""
    frames = [Image.new("RGB", (40, 24), color) for color in ("red", "lime", "blue")]
    reference = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    image = open_image(reference, "q")
    red, green, blue = image.getpixel((5, 5))
    assert image.size == (40, 24) and red > 240 and green < 16 and blue < 16


def test_odd_exif_does_not_cost_the_image():
    """Cameras write tags of types that Pillow cannot write again; the orientation beside them is applied."""
    exif = bytes.fromhex(
        "457869660000 4d4d002a00000008 0003"
        "010e 0002 00000005 00000032"  # a description
        "0112 0003 00000001 00060000"  # to be turned by 90 degrees
        "0141 0005 00000001 0000003a"  # a rational where an integer belongs
        "00000000 6465736300000000 0000004800000001"
    )
    reference = saved(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif)
    with Image.open(io.BytesIO(reference["bytes"])) as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    assert open_image(reference, "q").size == (20, 40)


@pytest.mark.parametrize("kind", ["AVIF", "WEBP", "PNG", "JPEG", "TIFF", "GIF"])
def test_whatever_a_decoder_raises_is_the_images_fault(kind):
    """Decoders raise RuntimeError, struct.error and worse on damaged pixels; the query and the file are named."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    content = saved(noise, kind)["bytes"]
    refusals = 0
    for length in range(60, len(content), max(1, len(content) // 40)):
        for damaged in (content[:length], content[:length] + bytes(len(content) - length)):
            try:
                assert open_image({"bytes": damaged}, "row 7").size == (64, 64)
            except UnreadableImageError as error:
                refusals += 1
                assert str(error).startswith("data: query row 7: cannot read the image its bytes (")
    assert refusals > 5


@pytest.mark.parametrize("kind", ORIENTED)
@pytest.mark.parametrize("turn", ORIENTATIONS)
@pytest.mark.parametrize("by", ["EXIF", "XMP"])
def test_every_orientation(by, turn, kind):
    """Turned once as EXIF says, or XMP where EXIF says nothing, in every format; the header alone tells the size."""
    reference = {"bytes": oriented(turn, kind) if by == "EXIF" else oriented_by_xmp(turn, kind)}
    tag = Image.Exif()
    tag[0x0112] = turn
    with Image.open(io.BytesIO(saved(photo(), "PNG", exif=tag)["bytes"])) as image:
        expected = np.asarray(ImageOps.exif_transpose(image), np.int16)
    made = open_image(reference, "q")
    assert image_size(reference, "q") == expected.shape[:2] == made.size[::-1]
    assert np.abs(np.asarray(made) - expected).max() <= (20 if kind in ("JPEG", "MPO", "AVIF") else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_becomes_its_pixels_alone(kind):
    """Plain RGB, of the size that the header says: nothing that anybody could turn, blend or correct it by again."""
    reference = {"bytes": KINDS[kind]()}
    made = open_image(reference, "q")
    check_image(reference, "q")
    assert type(made) is Image.Image and made.mode == "RGB" and made.palette is None
    assert not made.info and not made.getexif()
    assert image_size(reference, "q") == made.size[::-1]


def test_a_size_is_read_without_pixels():
    """Of a PNG too, although Pillow decodes it to look for EXIF behind its pixels; what stands there turns nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    late = behind_the_pixels(saved(photo(), "PNG")["bytes"], b"eXIf", exif.tobytes()[6:])
    with Image.open(io.BytesIO(late)) as image:
        assert image.getexif()[0x0112] == 6  # so it is one
    assert image_size({"bytes": late}, "q") == (30, 75)
    assert open_image({"bytes": late}, "q").tobytes() == photo().tobytes()
    cut = saved(Image.effect_noise((200, 100), 90), "PNG")["bytes"][:300]
    assert image_size({"bytes": cut}, "q") == (100, 200)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_does_not_cost_the_image(kind):
    """An EXIF block without a header that can be read says nothing, and nothing is lost by it."""
    reference = {"bytes": damaged_exif(kind)}
    assert open_image(reference, "q").size == (75, 30) and image_size(reference, "q") == (30, 75)
    check_image(reference, "q")


@pytest.mark.parametrize(
    ("dtype", "values", "seen"),
    [
        (np.uint16, [0, 257, 32896, 65535], [0, 1, 128, 255]),
        (np.uint16, [0, 1, 128, 255], [0, 1, 128, 255]),
        (np.int32, [0, 257, 32896, 65535], [0, 1, 128, 255]),
        (np.int32, [0, 2**23, 2**30, 2**31 - 1], [0, 1, 128, 255]),
        (np.int32, [-100, 0, 0, 100], [0, 128, 128, 255]),
        (np.float32, [0, 0.25, 0.5, 1], [0, 64, 128, 255]),
        (np.float32, [0, 1, 128, 254.6], [0, 1, 128, 255]),
        (np.float32, [0, 257, 32896, 65535], [0, 1, 128, 255]),
        (np.float32, [-1, 0, 0.5, 1], [0, 128, 191, 255]),
        (np.float32, [0, 1e38, 2e38, 3e38], [0, 85, 170, 255]),
        (np.float32, [np.nan, np.inf, -np.inf, 1], [0, 0, 0, 255]),
    ],
)
def test_deep_grey_is_scaled(dtype, values, seen):
    """By the least of [0, 1] (floats), [0, 255] and [0, 65535] that holds all values, otherwise by their own range."""
    reference = saved(Image.fromarray(np.array([values], dtype)), "TIFF")
    assert [level for level, *_ in np.asarray(open_image(reference, "q"))[0].tolist()] == seen


def test_deep_pixels_are_scaled():
    """32-bit integers beyond 16 bits become white instead of wrapping round to black."""
    image = Image.new("I", (4, 4), 2**20)
    assert open_image(saved(image, "TIFF"), "q").getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "I;16", "RGB"])
def test_transparency_becomes_white(mode):
    """By an alpha channel, a palette, or a colour that is named transparent."""
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0)).convert("L" if mode == "I;16" else mode).convert(mode)
    options = {} if mode in ("RGBA", "LA") else {"transparency": (0, 0, 0) if mode == "RGB" else 0}
    assert open_image(saved(clear, "PNG", **options), "q").getpixel((0, 0)) == (255, 255, 255)
