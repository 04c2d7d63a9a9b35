"""Images whose pixels say where they are, and calls as a model writes them."""

from __future__ import annotations

import io
import json
import math

import numpy as np
from PIL import Image

from rethinker.samples import Query

WIDTH, HEIGHT = 2000, 1200
SHOWN = 500, 300  # a quarter of it


def located_image() -> Image.Image:
    """Red and green say the column, blue says the row to 8 pixels."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    return Image.fromarray(np.stack([x // 8, x % 8, y // 8], axis=-1).astype(np.uint8))


IMAGE = located_image()
QUERY = Query(id="q7", question="2 + 2?", answer="4", images=("the image",), metadata={"level": 3})


def open_image(reference: str, query_id: str) -> Image.Image:
    assert (reference, query_id) == ("the image", "q7")
    return IMAGE


def shown_size(width: int, height: int) -> tuple[int, int]:
    """At most 150,000 pixels, as a model sees an image."""
    scale = min(1.0, math.sqrt(150_000 / (width * height)))
    return max(1, round(width * scale)), max(1, round(height * scale))


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
