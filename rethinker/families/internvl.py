"""InternVL3 and 3.5 in transformers' own format (`*-hf`): square tiles of one size, and plain positions.

An image is cut into as many tiles as its size and `data.max_pixels` call for, plus one of the whole when it is cut.
"""

from __future__ import annotations

from typing import Any

import torch

from rethinker.families import HIDDEN, PATCH, SIDE, Family, tiny_template, tiny_text, tiny_tokenizer, tiny_tower
from rethinker.families.qwen3_vl_moe import tiny_experts


class InternVL(Family):
    """See Family. pixel_values are [tiles, channels, side, side].

    Tiles and the view of the whole are resized from the image itself, so no image is reduced before.
    """

    PROCESSOR = "InternVLProcessor"
    TINY = ("qwen2", "qwen3", "qwen3_moe")
    PLACEHOLDERS = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<|im_start|>")

    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """See Family. The tile of the whole image is not counted."""
        tile = image_processor.size["height"] * image_processor.size["width"]
        most = max(1, max_pixels // tile)
        return {"crop_to_patches": True, "min_patches": min(most, max(1, min_pixels // tile)), "max_patches": most}

    def image_ids(self, processor: Any, height: int, width: int) -> list[int]:
        tiles = processor.image_processor.get_number_of_image_patches(height, width)
        tokens = [processor.image_token_id] * (tiles * processor.image_seq_length)
        return [processor.start_image_token_id, *tokens, processor.end_image_token_id]

    def features(self, model: torch.nn.Module, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [model.model.get_image_features(image_inputs["pixel_values"]).pooler_output.flatten(0, 1)]

    def image_tokens(self, config: Any, pixels: int) -> int:
        """See Family: of its tiles and, if there are several, one of the whole."""
        height, width = config.vision_config.image_size
        tiles = max(1, pixels // (height * width))
        return (tiles + (tiles > 1)) * config.image_seq_length

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN, kind: str = "qwen2") -> tuple[type, Any, Any]:
        """See Family. InternVL3's language model is Qwen2, InternVL3.5's is Qwen3 or Qwen3-MoE."""
        from transformers import (
            GotOcr2ImageProcessor,
            InternVLConfig,
            InternVLForConditionalGeneration,
            InternVLProcessor,
            InternVLVideoProcessor,
        )

        names = {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }
        tokenizer = tiny_tokenizer(tokenizer, names)
        side = SIDE // 2
        size, tokens = {"height": side, "width": side}, (side // PATCH) ** 2 // 4
        text = tiny_text(tokenizer, hidden, model_type=kind, head_dim=hidden // 2, tie_word_embeddings=False)
        if kind == "qwen3_moe":
            text |= tiny_experts(hidden) | {"norm_topk_prob": False}
        config = InternVLConfig(
            text_config=text,
            vision_config=tiny_tower(image_size=[side, side], patch_size=[PATCH, PATCH]),
            image_seq_length=tokens,
            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
            tie_word_embeddings=False,
        )
        processor = InternVLProcessor(
            image_processor=GotOcr2ImageProcessor(size=size),
            tokenizer=tokenizer,
            video_processor=InternVLVideoProcessor(size=size),
            image_seq_length=tokens,
            chat_template=tiny_template("<IMG_CONTEXT>\n"),
        )
        return InternVLForConditionalGeneration, config, processor


FAMILY = InternVL()
