"""The embedded default's model: a tiny Qwen2.5-VL with random weights, in the ordinary Hugging Face format.

The architecture is Qwen2.5-VL's own, only small: transformers, its processor and vLLM load the folder as it is. Patches
of 8 pixels are merged 2 by 2: an image token is a cell of 16 x 16 pixels, and an image of 64 x 64 has 16 of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rethinker.runtime.torchvision_cpu import make_importable

make_importable()  # the processors below import torchvision

from transformers import (  # noqa: E402
    GenerationConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from rethinker.embedded.tokenizer import train_tokenizer  # noqa: E402
from rethinker.families import Family, family_of  # noqa: E402


@dataclass(frozen=True)
class TinySize:
    """Sizes of the tiny model. Attention heads have 32 dimensions, the least that vLLM's CPU kernel takes."""

    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vision_hidden: int = 64
    vision_intermediate: int = 192
    vision_layers: int = 3
    vision_heads: int = 2
    patch: int = 8
    image_side: int = 64
    merges: int = 768
    max_positions: int = 4096


DEFAULT_SIZE = TinySize()


def create_tiny(
    folder: str | Path,
    seed: int = 0,
    *,
    tie_word_embeddings: bool = True,
    texts: Iterable[str] | None = None,
    size: TinySize = DEFAULT_SIZE,
) -> Path:
    """Write a tiny Qwen2.5-VL with random weights and its processor to a folder, and return it.

    Args:
        folder: made if it is missing.
        seed: of the weights; the same arguments write the same bytes.
        tie_word_embeddings: whether the LM head shares the embedding matrix.
        texts: what the tokenizer learns its merges from, besides its own common texts.
        size: the model's sizes.
    """
    tokenizer = train_tokenizer(texts or (), merges=size.merges)
    config = _config(size, tokenizer, tie_word_embeddings)
    return write_random(folder, Qwen2_5_VLForConditionalGeneration, config, _processor(size, tokenizer), seed)


def write_random(folder: str | Path, model_class: type, config: PreTrainedConfig, processor: Any, seed: int) -> Path:
    """Write a model of any family with random weights, and its processor, to `folder`, which is made if missing."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    family = family_of(config.model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        _widen(model, family)
    to_id = processor.tokenizer.convert_tokens_to_ids
    model.generation_config = GenerationConfig(
        bos_token_id=to_id("<|endoftext|>"),
        eos_token_id=[to_id(token) for token in ("<|im_end|>", "<|endoftext|>")],
        pad_token_id=to_id("<|endoftext|>"),
        do_sample=True,
    )
    weights = {family.served(name): tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=weights)
    processor.save_pretrained(folder)
    return folder


@torch.no_grad()
def _widen(model: torch.nn.Module, family: Family) -> None:
    """Draw every matrix with variance 1 / inputs. Qwen's 0.02 suits widths in the thousands; here it learns slowly.

    Vectors, and buffers of the checkpoint, are the family's to draw.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = 0.06 if "embed_tokens" in name else parameter[0].numel() ** -0.5
            torch.nn.init.normal_(parameter, std=std)
        else:
            family.draw(name, parameter)
    kept = model.state_dict().keys()
    for name, buffer in sorted(model.named_buffers()):
        if name in kept:
            family.draw(name, buffer)


def _config(size: TinySize, tokenizer, tie_word_embeddings: bool) -> Qwen2_5_VLConfig:
    ids = {
        name: tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        for name in ("endoftext", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    }
    head_dim = size.hidden // size.heads
    # Frequencies (half of the head's dimensions) given to the temporal, height and width positions, as 16:24:24 of 64.
    temporal = head_dim // 8
    spatial = (head_dim // 2 - temporal) // 2
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": size.hidden,
            "intermediate_size": size.intermediate,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "max_position_embeddings": size.max_positions,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [head_dim // 2 - 2 * spatial, spatial, spatial],
            },
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "pad_token_id": ids["endoftext"],
            "tie_word_embeddings": tie_word_embeddings,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_intermediate,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.hidden,
            "patch_size": size.patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "spatial_patch_size": size.patch,
            # One window is one image of the expected side; larger images get several.
            "window_size": size.image_side,
            "fullatt_block_indexes": [size.vision_layers - 1],
            "tokens_per_second": 2,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=tie_word_embeddings,
        architectures=["Qwen2_5_VLForConditionalGeneration"],
        dtype="float32",
    )


def _processor(size: TinySize, tokenizer) -> Qwen2_5_VLProcessor:
    pixels = {
        "patch_size": size.patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": size.image_side**2,
        "max_pixels": size.image_side**2,
    }
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(**pixels),
        chat_template=tokenizer.chat_template,
    )
