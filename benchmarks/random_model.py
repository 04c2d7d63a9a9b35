"""A Qwen2.5-VL of its real sizes with random weights, as a Hugging Face folder: for whole runs without a download.

Its responses are noise: they end at their limit almost surely, and their rewards are a coin's (`coin`), so that a step
has as much to learn from as one of a real model.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from benchmarks.train_step_workload import SIZES, build_model, model_config
from rethinker.samples import Query


def write_model(folder: Path, size: str, layers: int | None, image_tokens: int) -> Path:
    """Write the model of `size` ("3B", ...) with `layers` decoder layers (None: all) to a new folder, in bfloat16 on a
    GPU and float32 elsewhere; every image has `image_tokens` tokens. Returns the folder."""
    from transformers import GenerationConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    from rethinker.embedded.tokenizer import train_tokenizer

    tokenizer = train_tokenizer((), merges=768)
    config = model_config(SIZES[size], layers)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("endoftext", "im_end", "image_pad")}
    ids |= {n: tokenizer.convert_tokens_to_ids(f"<|{n}|>") for n in ("vision_start", "vision_end", "video_pad")}
    config.text_config.vocab_size = max(config.text_config.vocab_size, len(tokenizer))
    config.image_token_id, config.video_token_id = ids["image_pad"], ids["video_pad"]
    config.vision_start_token_id, config.vision_end_token_id = ids["vision_start"], ids["vision_end"]
    config.text_config.eos_token_id, config.text_config.pad_token_id = ids["im_end"], ids["endoftext"]
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = build_model(config, device, dtype)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["im_end"], ids["endoftext"]], pad_token_id=ids["endoftext"], do_sample=True
    )
    model.save_pretrained(folder)
    pixels = image_tokens * (2 * SIZES[size].patch) ** 2
    limits = {"patch_size": SIZES[size].patch, "temporal_patch_size": 2, "merge_size": 2}
    limits |= {"min_pixels": pixels, "max_pixels": pixels}
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**limits),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**limits),
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)
    return folder


def coin(response: str, answer: str, query: Query) -> float:
    """A reward that depends on the response alone, and is 1 for half of them.

    The tokenizer knows about 1,000 of the model's tokens, the others decode to nothing: of 512 random tokens of Qwen's
    151,936 some are known almost surely, of 16 hardly any, and then the reward is 0.
    """
    return float(zlib.crc32(response.encode()) % 2)
