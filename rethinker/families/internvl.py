"""InternVL3 in transformers' own format (`*-hf`): square tiles of one size, and plain positions.

An image is cut into as many tiles as its size and `data.max_pixels` call for, plus one of the whole when it is cut.
"""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

PLACEHOLDERS = ("<IMG_CONTEXT>", "<img>", "</img>", "<video>", "<|im_start|>")
IMAGE_INPUTS = ("pixel_values",)  # [tiles, channels, side, side]
MROPE = False


def image_settings(image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
    """See Family. The tile of the whole image is not counted."""
    tile = image_processor.size["height"] * image_processor.size["width"]
    most = max(1, max_pixels // tile)
    return {"crop_to_patches": True, "min_patches": min(most, max(1, min_pixels // tile)), "max_patches": most}


def image_ids(processor: Any, height: int, width: int) -> list[int]:
    """See Family."""
    tiles = processor.image_processor.get_number_of_image_patches(height, width)
    tokens = [processor.image_token_id] * (tiles * processor.image_seq_length)
    return [processor.start_image_token_id, *tokens, processor.end_image_token_id]


def reduced(image_processor: Any, image: Image.Image) -> Image.Image:
    """See Family. Tiles and the view of the whole are resized from the image itself, so it stays as it is."""
    return image


def vision_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """See Family."""
    return [model.model.vision_tower, model.model.multi_modal_projector]


def positions(model: torch.nn.Module, ids: torch.Tensor, image_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """See Family."""
    return torch.arange(ids.shape[1])[None]


def features(model: torch.nn.Module, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """See Family."""
    return [model.model.get_image_features(image_inputs["pixel_values"]).pooler_output.flatten(0, 1)]


def blank(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """See Family: one tile."""
    vision = model.config.vision_config
    return {"pixel_values": torch.zeros(1, vision.num_channels, *vision.image_size)}
