"""An encoder of the tiny model's prompts, pictures for it, and what the processor itself makes of a query."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from rethinker.data.prompts import PromptEncoder
from rethinker.samples import Query

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
LIMITS = {"min_pixels": 32 * 32, "max_pixels": 128 * 128}
QUESTIONS = [
    ("What color is it?", 1),
    ("Look: <image> and <image>\nWhich is larger?", 2),
    ("<image>What is this?", 1),
    ("Compare them.<image><image>", 2),
    ("2 + 2?", 0),
    ("\n leading space, trailing \n", 0),
    ("Größe 北京 🙂 \u00e9 e\u0301", 1),
    ("call <tool_call> here", 0),
    ("three", 3),
]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def as_bytes(image: Image.Image, kind: str = "PNG", **options) -> dict[str, bytes]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue()}


def reference(encoder: PromptEncoder, query: Query, images: list[Image.Image], system: str | None = None, **choices):
    """What the processor itself makes of the same conversation."""
    text = encoder.config.prompt.replace("{question}", query.question)
    content, left = [], list(images)
    if "<image>" not in text:
        content = [{"type": "image", "image": left.pop(0)} for _ in images]
    for n, part in enumerate(text.split("<image>")):
        content += [{"type": "image", "image": left.pop(0)}] if n else []
        content += [{"type": "text", "text": part}] if part else []
    messages = [{"role": "system", "content": [{"type": "text", "text": system}]}] if system is not None else []
    messages.append({"role": "user", "content": content})
    return encoder.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **choices
    )
