"""A tiny random model of each family, as a folder: the family's own architecture and processor, only small.

Qwen2-VL's head is tied to its embedding, the others' are not.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import (
    AutoTokenizer,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

import rethinker.families
from rethinker.embedded.tiny import write_random
from rethinker.embedded.tokenizer import train_tokenizer

# All but the default family, which the other tests hold to the same laws.
FAMILIES = [name for name in rethinker.families.FAMILIES if name != "qwen2_5_vl"]

HIDDEN, PATCH, SIDE = 64, 8, 64

# As InternVL3's own: a line break after every image.
INTERNVL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def create(family: str, folder: str | Path, seed: int = 0) -> Path:
    """Write a tiny model of the family (a config's `model_type`) to `folder`."""
    build = {"qwen2_vl": _qwen2_vl, "qwen3_vl": _qwen3_vl, "internvl": _internvl}[family]
    model_class, config, processor = build()
    return write_random(folder, model_class, config, processor, seed)


def _text(tokenizer, layers: int, **others: Any) -> dict[str, Any]:
    to_id = tokenizer.convert_tokens_to_ids
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "bos_token_id": to_id("<|endoftext|>"),
        "eos_token_id": to_id("<|im_end|>"),
        "pad_token_id": to_id("<|endoftext|>"),
        **others,
    }


def _qwen_ids(tokenizer) -> dict[str, int]:
    to_id = tokenizer.convert_tokens_to_ids
    return {
        "image_token_id": to_id("<|image_pad|>"),
        "video_token_id": to_id("<|video_pad|>"),
        "vision_start_token_id": to_id("<|vision_start|>"),
        "vision_end_token_id": to_id("<|vision_end|>"),
    }


def _qwen_pixels() -> dict[str, Any]:
    limits = {"min_pixels": SIDE**2, "max_pixels": SIDE**2}
    return {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, **limits}


def _qwen2_vl():
    tokenizer = train_tokenizer(())
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    config = Qwen2VLConfig(
        text_config=_text(tokenizer, 3, rope_parameters=rope, tie_word_embeddings=True),
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "num_heads": 1, "patch_size": PATCH},
        tie_word_embeddings=True,
        architectures=["Qwen2VLForConditionalGeneration"],
        dtype="float32",
        **_qwen_ids(tokenizer),
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_qwen_pixels()),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**_qwen_pixels()),
        chat_template=tokenizer.chat_template,
    )
    return Qwen2VLForConditionalGeneration, config, processor


def _qwen3_vl():
    tokenizer = train_tokenizer(())
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config=_text(tokenizer, 3, head_dim=32, rope_parameters=rope, tie_word_embeddings=False),
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 1,
            "patch_size": PATCH,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=False,
        architectures=["Qwen3VLForConditionalGeneration"],
        dtype="float32",
        **_qwen_ids(tokenizer),
    )
    processor = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**_qwen_pixels()),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**_qwen_pixels()),
        chat_template=tokenizer.chat_template,
    )
    return Qwen3VLForConditionalGeneration, config, processor


def _internvl():
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    with tempfile.TemporaryDirectory() as folder:  # only loading gives tokens their names
        train_tokenizer(()).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, extra_special_tokens=names)
    tokenizer.chat_template = INTERNVL_TEMPLATE
    tile = SIDE // 2
    tokens = (tile // PATCH) ** 2 // 4
    config = InternVLConfig(
        text_config=_text(tokenizer, 3, model_type="qwen2", tie_word_embeddings=False),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "image_size": [tile, tile],
            "patch_size": [PATCH, PATCH],
        },
        image_seq_length=tokens,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
        dtype="float32",
    )
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": tile, "width": tile}),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size={"height": tile, "width": tile}),
        image_seq_length=tokens,
        chat_template=INTERNVL_TEMPLATE,
    )
    return InternVLForConditionalGeneration, config, processor
