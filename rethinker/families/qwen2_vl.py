"""Qwen2-VL: images of any size, and M-RoPE. The later Qwen families are made from this one."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from rethinker.families import HIDDEN, PATCH, SIDE, STRIP, Family, tiny_text
from rethinker_kernels.devices import to_device

LONGEST_STRIP = 200  # times as long as wide: what transformers' smart_resize takes


class Qwen2VL(Family):
    """See Family. An image that is more than LONGEST_STRIP times as long as wide raises ValueError."""

    PROCESSOR = "Qwen2VLProcessor"
    PLACEHOLDERS = (
        "<|image_pad|>",
        "<|video_pad|>",
        "<|vision_pad|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|im_start|>",
    )
    IMAGE_INPUTS = ("pixel_values", "image_grid_thw")  # [patches, channels * patch area], [images, 3]
    MROPE = True
    TOKEN_TYPES = "mm_token_type_ids"

    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        return {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}

    def image_ids(self, processor: Any, height: int, width: int) -> list[int]:
        images = processor.image_processor
        patches = images.get_number_of_image_patches(height, width)
        return [processor.image_token_id] * (patches // images.merge_size**2)

    def reduced(self, image_processor: Any, image: Image.Image) -> Image.Image:
        """See Family. The processor resizes 8-bit pixels first, and by the same function: equal to the bit."""
        limits, copies = image_processor.size, self.copies(image_processor)
        if copies * image.width * image.height <= limits.longest_edge:
            return image
        small = self.resized(image_processor, image_processor.process_image(image)[None])[0]
        # Only if the processor will leave the reduced image alone; it may not where the limits are close together, and
        # it refuses a strip that rounding to whole patches has made too long.
        short, long = sorted(small.shape[1:])
        if not limits.shortest_edge <= copies * short * long <= limits.longest_edge or long > LONGEST_STRIP * short:
            return image
        return Image.fromarray(small.permute(1, 2, 0).contiguous().numpy())

    def resized(self, image_processor: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [1, channels, height, width] in the size that the processor gives them."""
        factor = image_processor.patch_size * image_processor.merge_size
        return image_processor.resize(pixels, image_processor.size, image_processor.resample, factor)

    def shown(self, image_processor: Any, height: int, width: int) -> tuple[int, int]:
        pixels = torch.empty((1, 3, height, width), dtype=torch.uint8, device="meta")
        return tuple(self.resized(image_processor, pixels).shape[-2:])

    def copies(self, image_processor: Any) -> int:
        """Of an image, which the processor's limits on pixels count."""
        return 1

    def vision_modules(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        return [model.model.visual]

    def positions(self, model: torch.nn.Module, ids: torch.Tensor, image_inputs: dict) -> torch.Tensor:
        """See Family: transformers' get_rope_index."""
        is_image = (ids == model.config.image_token_id).int()
        return model.model.get_rope_index(ids, is_image, image_inputs.get("image_grid_thw"))[0][:, 0]

    def features(self, model: torch.nn.Module, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """See Family. Qwen3-VL's DeepStack adds features of earlier vision layers in its first decoder layers."""
        visual, pixels, grid = model.model.visual, image_inputs["pixel_values"], image_inputs["image_grid_thw"].cpu()
        made = self.arrangement(visual, grid)
        made = {name: to_device(part, pixels.device) if torch.is_tensor(part) else part for name, part in made.items()}
        seen = visual(pixels.to(visual.dtype), **{"grid_thw": grid} | made)
        return [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())]

    def arrangement(self, visual: torch.nn.Module, grid: torch.Tensor) -> dict[str, Any]:
        """What the tower needs to know of the images besides their pixels, from their extents `grid` [images, 3].

        transformers would make it of extents on the device, and ask the device for every one of them.
        """
        from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

        bounds = get_vision_cu_seqlens(grid)
        return {
            "cu_seqlens": bounds,
            "max_seqlen": int(bounds.diff().max()),
            "position_ids": get_vision_position_ids(grid, visual.spatial_merge_size),
        }

    def blank(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """See Family: one image token."""
        vision = model.config.vision_config
        side = vision.spatial_merge_size
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return {"pixel_values": torch.zeros(side * side, width), "image_grid_thw": torch.tensor([[1, side, side]])}

    def image_tokens(self, config: Any, pixels: int) -> int:
        return pixels // (config.vision_config.patch_size * config.vision_config.spatial_merge_size) ** 2

    def planned(self, model: torch.nn.Module, tokens: int) -> dict[str, torch.Tensor]:
        blank = self.blank(model)
        high = min(STRIP, tokens)
        wide = -(-tokens // high)
        patches, width = blank["pixel_values"].shape
        grid = blank["image_grid_thw"] * torch.tensor([1, high, wide])
        return {"pixel_values": torch.empty(high * wide * patches, width, device="meta"), "image_grid_thw": grid}

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN) -> tuple[type, Any, Any]:
        """See Family. Its head is tied to its embedding."""
        from transformers import (
            Qwen2VLConfig,
            Qwen2VLForConditionalGeneration,
            Qwen2VLProcessor,
            Qwen2VLVideoProcessor,
        )

        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
        config = Qwen2VLConfig(
            text_config=tiny_text(tokenizer, hidden, rope_parameters=rope, tie_word_embeddings=True),
            vision_config={"depth": 2, "embed_dim": 32, "hidden_size": hidden, "num_heads": 1, "patch_size": PATCH},
            tie_word_embeddings=True,
            **tiny_ids(tokenizer),
        )
        return (
            Qwen2VLForConditionalGeneration,
            config,
            tiny_processor(Qwen2VLProcessor, Qwen2VLVideoProcessor, tokenizer),
        )


def tiny_ids(tokenizer: Any) -> dict[str, int]:
    """The tokens that a tiny Qwen's config names."""
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in names.items()}


def tiny_processor(processor: type, video_processor: type, tokenizer: Any) -> Any:
    """A tiny Qwen's processor of a class, around an image processor and a video processor of one."""
    from transformers import Qwen2VLImageProcessor

    pixels = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
    pixels |= {"min_pixels": SIDE**2, "max_pixels": SIDE**2}
    return processor(
        image_processor=Qwen2VLImageProcessor(**pixels),
        tokenizer=tokenizer,
        video_processor=video_processor(**pixels),
        chat_template=tokenizer.chat_template,
    )


FAMILY = Qwen2VL()
