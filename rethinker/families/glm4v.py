"""GLM-4.1V, and GLM-4.6V-Flash with its own processor: Qwen2-VL's positions and extents, and limits on pixels that
count both copies of an image which its patches hold (they are two frames long)."""

from __future__ import annotations

from typing import Any

import torch

from rethinker.families import HIDDEN, PATCH, SIDE, tiny_template, tiny_text
from rethinker.families.qwen2_vl import Qwen2VL


class GLM4V(Qwen2VL):
    """See Family."""

    PROCESSOR = ("Glm4vProcessor", "Glm46VProcessor")
    PLACEHOLDERS = (
        "<|image|>",
        "<|video|>",
        "<|begin_of_image|>",
        "<|end_of_image|>",
        "<|begin_of_video|>",
        "<|end_of_video|>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    )
    TINY = ("", "glm46v")

    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        frames = image_processor.temporal_patch_size
        return {"size": {"shortest_edge": frames * min_pixels, "longest_edge": frames * max_pixels}}

    def resized(self, image_processor: Any, pixels: torch.Tensor) -> torch.Tensor:
        factor = image_processor.patch_size * image_processor.merge_size
        frames = image_processor.temporal_patch_size
        return image_processor.resize(pixels, image_processor.size, image_processor.resample, factor, frames)

    def copies(self, image_processor: Any) -> int:
        return image_processor.temporal_patch_size

    def arrangement(self, visual: torch.nn.Module, grid: torch.Tensor) -> dict[str, Any]:
        """See Qwen2VL. The tower looks the extents up on the device, but asks for none of them."""
        return super().arrangement(visual, grid) | {"grid_thw": grid}

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN, kind: str = "") -> tuple[type, Any, Any]:
        """See Family. Half of a head turns; the one head is so wide that vLLM's kernel takes that half."""
        import transformers
        from transformers import Glm4vConfig, Glm4vForConditionalGeneration

        tokenizer.add_special_tokens({"extra_special_tokens": list(self.PLACEHOLDERS)})
        to_id = tokenizer.convert_tokens_to_ids
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        rope["mrope_section"] = [hidden // 16, 3 * hidden // 32, 3 * hidden // 32]
        config = Glm4vConfig(
            text_config=tiny_text(
                tokenizer,
                hidden,
                num_attention_heads=1,
                attention_bias=True,  # of vLLM's model; transformers' always has biases
                rope_parameters=rope,
                tie_word_embeddings=False,
            ),
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 1,
                "image_size": SIDE,
                "patch_size": PATCH,
                "out_hidden_size": hidden,
            },
            tie_word_embeddings=False,
            image_token_id=to_id("<|image|>"),
            video_token_id=to_id("<|video|>"),
            image_start_token_id=to_id("<|begin_of_image|>"),
            image_end_token_id=to_id("<|end_of_image|>"),
            video_start_token_id=to_id("<|begin_of_video|>"),
            video_end_token_id=to_id("<|end_of_video|>"),
        )
        name = "Glm46V" if kind == "glm46v" else "Glm4v"
        pixels = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
        pixels["size"] = {"shortest_edge": 2 * SIDE**2, "longest_edge": 2 * SIDE**2}
        processor = getattr(transformers, f"{name}Processor")(
            image_processor=getattr(transformers, f"{name}ImageProcessor")(**pixels),
            tokenizer=tokenizer,
            video_processor=getattr(transformers, f"{name}VideoProcessor")(**pixels),
            chat_template=tiny_template("<|begin_of_image|><|image|><|end_of_image|>"),
        )
        return Glm4vForConditionalGeneration, config, processor


FAMILY = GLM4V()
