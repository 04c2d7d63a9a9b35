"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images of any size, M-RoPE, and (Qwen3) DeepStack."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from rethinker_kernels.devices import to_device

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

LONGEST_STRIP = 200  # times as long as wide: what transformers' smart_resize takes


def image_settings(image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """See Family."""
    return {"size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}


def image_ids(processor: Any, height: int, width: int) -> list[int]:
    """See Family. An image that is more than LONGEST_STRIP times as long as wide raises ValueError."""
    images = processor.image_processor
    patches = images.get_number_of_image_patches(height, width)
    return [processor.image_token_id] * (patches // images.merge_size**2)


def reduced(image_processor: Any, image: Image.Image) -> Image.Image:
    """See Family. The processor resizes 8-bit pixels first, and by the same function: equal to the bit."""
    limits = image_processor.size
    if image.width * image.height <= limits.longest_edge:
        return image
    factor = image_processor.patch_size * image_processor.merge_size
    pixels = image_processor.process_image(image)[None]
    small = image_processor.resize(pixels, limits, image_processor.resample, factor)[0]
    # Only if the processor will leave the reduced image alone; it may not where the limits are close together, and it
    # refuses a strip that rounding to whole patches has made too long.
    short, long = sorted(small.shape[1:])
    if not limits.shortest_edge <= short * long <= limits.longest_edge or long > LONGEST_STRIP * short:
        return image
    return Image.fromarray(small.permute(1, 2, 0).contiguous().numpy())


def vision_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """See Family."""
    return [model.model.visual]


def positions(model: torch.nn.Module, ids: torch.Tensor, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """See Family: transformers' get_rope_index."""
    is_image = (ids == model.config.image_token_id).int()
    return model.model.get_rope_index(ids, is_image, image_inputs.get("image_grid_thw"))[0][:, 0]


def features(model: torch.nn.Module, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """See Family. Qwen3-VL's DeepStack adds features of earlier vision layers in its first decoder layers."""
    visual, pixels, grid = model.model.visual, image_inputs["pixel_values"], image_inputs["image_grid_thw"].cpu()
    seen = visual(pixels.to(visual.dtype), grid_thw=grid, **_arrangement(visual, grid, pixels.device))
    return [seen.pooler_output, *(getattr(seen, "deepstack_features", None) or ())]


def _arrangement(visual: torch.nn.Module, grid: torch.Tensor, device: torch.device) -> dict[str, Any]:
    """What the tower needs to know of the images besides their pixels, from their extents `grid` [images, 3].

    transformers would make it of extents on the device, and ask the device for every one of them.
    """
    config, side = visual.config, visual.spatial_merge_size
    bounds = get_vision_cu_seqlens(grid)
    made: dict[str, Any] = {
        "cu_seqlens": bounds,
        "max_seqlen": int(bounds.diff().max()),
        "position_ids": get_vision_position_ids(grid, side),
    }
    if hasattr(visual, "fullatt_block_indexes"):  # Qwen2.5-VL: most layers see windows of an image
        index, windows = get_vision_window_index(grid, side, visual.window_size, visual.patch_size)
        made |= {"window_index": index, "cu_window_seqlens": windows, "max_window_seqlen": int(windows.diff().max())}
    if hasattr(visual, "num_grid_per_side"):  # Qwen3-VL: learned positions, between which it interpolates
        made["interp_indices"], made["interp_weights"] = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=config.spatial_merge_size,
        )
    return {name: to_device(part, device) if torch.is_tensor(part) else part for name, part in made.items()}


def blank(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """See Family: one image token."""
    vision = model.config.vision_config
    side = vision.spatial_merge_size
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {"pixel_values": torch.zeros(side * side, width), "image_grid_thw": torch.tensor([[1, side, side]])}
