"""Qwen3-VL: DeepStack, and learned positions in the vision tower between which it interpolates."""

from __future__ import annotations

from typing import Any

import torch

from rethinker.families import HIDDEN, PATCH, tiny_text
from rethinker.families.qwen2_vl import Qwen2VL, tiny_ids, tiny_processor


class Qwen3VL(Qwen2VL):
    """See Family."""

    PROCESSOR = "Qwen3VLProcessor"

    def arrangement(self, visual: torch.nn.Module, grid: torch.Tensor) -> dict[str, Any]:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=visual.config.spatial_merge_size,
        )
        return super().arrangement(visual, grid) | {"interp_indices": indices, "interp_weights": weights}

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN) -> tuple[type, Any, Any]:
        """See Family. Its head is not tied to its embedding."""
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        config = Qwen3VLConfig(
            text_config=tiny_text(tokenizer, hidden, head_dim=32, rope_parameters=TINY_ROPE, tie_word_embeddings=False),
            vision_config={**tiny_vision(hidden), "deepstack_visual_indexes": [0, 1]},
            tie_word_embeddings=False,
            **tiny_ids(tokenizer),
        )
        return Qwen3VLForConditionalGeneration, config, tiny_qwen3_processor(tokenizer)


TINY_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}


def tiny_vision(hidden: int) -> dict[str, int]:
    """The vision_config of tiny models, for a language model of hidden size `hidden`."""
    return {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 1,
        "patch_size": PATCH,
        "out_hidden_size": hidden,
        "num_position_embeddings": 64,
    }


def tiny_qwen3_processor(tokenizer: Any) -> Any:
    """Qwen3's processor for tiny models."""
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    return tiny_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor, tokenizer)


FAMILY = Qwen3VL()
