"""LLaVA-OneVision: square tiles of one size in a grid that fits an image's shape, and one of the whole.

Features of what was added to fill the grid are left out, and a learned token ends each row of the others. Every image
of a prompt has the tiles that it would have alone, as in vLLM; transformers' chat template makes one of each of two.
`data.max_pixels` leaves out larger grids, in the processor and in the model's config; a checkpoint keeps what is left.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import nn

from rethinker.config import ConfigError
from rethinker.families import HIDDEN, PATCH, SIDE, Family, tiny_template, tiny_text, tiny_tokenizer, tiny_tower

_READ = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9"}
_MOST = 9  # tiles: features of a larger grid are scaled down to so many, once they are a fifth more
_ROOM = 1.1  # of a side


class LlavaOnevision(Family):
    """See Family. pixel_values are the tiles [tiles, channels, side, side] of all images, the whole before the others;
    tiles [images] counts them, image_sizes [images, 2] are in pixels."""

    PROCESSOR = "LlavaOnevisionProcessor"
    PLACEHOLDERS = ("<image>", "<video>", "<|im_start|>")
    IMAGE_INPUTS = ("pixel_values", "image_sizes")
    CONFIGURED = ("image_grid_pinpoints",)
    SERVED = (("model.vision_tower.", "model.vision_tower.vision_model."),)
    ENLARGES = False

    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """See Family. Every image is enlarged to a grid, so `min_pixels` changes nothing; the smallest grids stay."""
        grids, side = image_processor.image_grid_pinpoints, image_processor.size["height"]
        return {"image_grid_pinpoints": _grids(grids, side, max_pixels)}

    def vllm_settings(self, settings: dict[str, Any], longest: int) -> dict[str, Any]:
        """See Family. vLLM counts tokens by the model's config, and cannot look up a processor by a list of lists. Of
        the grids that are left it does not know the largest image, and would refuse one beyond a step's tokens."""
        settings = {"mm_processor_kwargs": {"images_kwargs": settings}, "hf_overrides": settings}
        return settings | {"max_num_batched_tokens": max(8192, longest)}

    def image_ids(self, processor: Any, height: int, width: int) -> list[int]:
        side = processor.image_processor.size["height"]
        return [processor.image_token_id] * processor._get_number_of_features(height, width, side, side)

    def image_inputs(self, made: Any) -> dict[str, torch.Tensor]:
        """See Family. The processor fills up the tiles of a prompt's images with zeros, which no normalised pixel is,
        to the most that one of them has."""
        pixels = made["pixel_values"]
        real = pixels.flatten(2).any(-1)  # [images, most]
        return {"pixel_values": pixels[real], "image_sizes": made["image_sizes"], "tiles": real.sum(-1)}

    def prepare(self, model: nn.Module) -> None:
        """See Family. The last layer's features are read without the norm behind it, which is not trained."""
        for name, value in _READ.items():
            if (found := getattr(model.config, name)) != value:
                raise ConfigError(f"policy.model: its {name} is {found!r}; only {value!r} is supported")
        model.model.vision_tower.post_layernorm.requires_grad_(False)

    def vision_modules(self, model: nn.Module) -> list[nn.Module]:
        """See Family. The norm that is not read is none of them."""
        tower, newline = model.model.vision_tower, nn.ParameterList([model.model.image_newline])
        return [tower.embeddings, tower.encoder, model.model.multi_modal_projector, newline]

    def features(self, model: nn.Module, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """See Family. transformers would keep what every layer makes, and wait for the device to know of sizes."""
        tower, pixels = model.model.vision_tower, image_inputs["pixel_values"].to(model.model.vision_tower.dtype)
        seen = tower.encoder(inputs_embeds=tower.embeddings(pixels)).last_hidden_state
        seen = model.model.multi_modal_projector(seen)  # [tiles, patches, D]
        newline, parts = model.model.image_newline.to(seen.dtype), []
        tiles, sizes = image_inputs["tiles"].tolist(), image_inputs["image_sizes"].tolist()
        for image, size in zip(seen.split(tiles), sizes, strict=True):
            parts += [image[0], _rows(image[1:], size, model.config, newline)]
        return [torch.cat(parts)]

    def blank(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """See Family: two tiles."""
        return self._squares(model, 1, "cpu")

    def image_tokens(self, config: Any, pixels: int) -> int:
        """See Family: the most of any shape of such an image."""
        side = config.vision_config.image_size
        patches = side // config.vision_config.patch_size
        most = int(_MOST * _ROOM**2 * patches**2)  # that are not scaled down
        found = 0
        for height, width in _grids(config.image_grid_pinpoints, side, pixels):
            rows, columns = patches * (height // side), patches * (width // side)
            found = max(found, min(rows * columns, most) + rows)
        return patches**2 + found

    def planned(self, model: nn.Module, tokens: int) -> dict[str, torch.Tensor]:
        """See Family. Its images are of one tile beside the whole; larger ones have as many tokens a tile, if their
        shape is that of a grid."""
        patches = model.config.vision_config.image_size // model.config.vision_config.patch_size
        return self._squares(model, -(-tokens // (2 * patches**2 + patches)), "meta")

    @staticmethod
    def _squares(model: nn.Module, count: int, device: str) -> dict[str, torch.Tensor]:
        """So many black images of the size of a tile."""
        vision = model.config.vision_config
        side = vision.image_size
        return {
            "pixel_values": torch.zeros(2 * count, vision.num_channels, side, side, device=device),
            "image_sizes": torch.tensor([[side, side]] * count),
            "tiles": torch.tensor([2] * count),
        }

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN, kind: str = "") -> tuple[type, Any, Any]:
        """See Family. Of its grids the last is larger than tests allow; features of the one before are scaled down."""
        from transformers import (
            LlavaOnevisionConfig,
            LlavaOnevisionForConditionalGeneration,
            LlavaOnevisionImageProcessor,
            LlavaOnevisionProcessor,
            LlavaOnevisionVideoProcessor,
        )

        tokenizer = tiny_tokenizer(tokenizer, {"image_token": "<image>", "video_token": "<video>"})
        side = SIDE * 3 // 8
        size, patches = {"height": side, "width": side}, (side // PATCH) ** 2
        shapes = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (2, 4), (4, 3), (5, 4)]
        grids = [[rows * side, columns * side] for rows, columns in shapes]
        to_id = tokenizer.convert_tokens_to_ids
        config = LlavaOnevisionConfig(
            text_config=tiny_text(tokenizer, hidden, model_type="qwen2", tie_word_embeddings=False),
            vision_config=tiny_tower(model_type="siglip_vision_model", image_size=side, vision_use_head=False),
            image_token_index=to_id("<image>"),
            video_token_index=to_id("<video>"),
            image_grid_pinpoints=grids,
            tie_word_embeddings=False,
        )
        processor = LlavaOnevisionProcessor(
            image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids),
            tokenizer=tokenizer,
            video_processor=LlavaOnevisionVideoProcessor(size=size),
            num_image_tokens=patches,
            vision_feature_select_strategy="full",
            chat_template=tiny_template("<image>\n"),
        )
        return LlavaOnevisionForConditionalGeneration, config, processor


def _grids(grids: Any, side: int, pixels: int) -> list[list[int]]:
    """Those of at most so many pixels, or the smallest; tiles are of side x side."""

    def fits(grid: Any) -> bool:
        return isinstance(grid, list | tuple) and len(grid) == 2 and all(n in range(side, 10**6, side) for n in grid)

    if not isinstance(grids, list | tuple) or not grids or not all(map(fits, grids)):
        raise ConfigError(
            "policy.model: its image_grid_pinpoints must be a list of [height, width], whole multiples of the side of "
            f"a tile ({side}); correct its config.json and its processor's"
        )
    smallest = min(height * width for height, width in grids)
    return [[height, width] for height, width in grids if height * width <= max(pixels, smallest)]


def _rows(tiles: torch.Tensor, size: list[int], config: Any, newline: torch.Tensor) -> torch.Tensor:
    """Image tokens [N, D] of an image's tiles [tiles, patches, D], row by row with a `newline` [D] behind each.

    Args:
        size: of the image, (height, width) in pixels.
    """
    from transformers.image_processing_utils import select_best_resolution
    from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    # Of all grids the processor chose one of so many tiles; which, needs no knowledge of its limits.
    grids = [grid for grid in config.image_grid_pinpoints if grid[0] * grid[1] == len(tiles) * side**2]
    height, width = select_best_resolution(size, grids)
    shape = (height // side, width // side, patches, patches, -1)
    seen = tiles.view(shape).permute(4, 0, 2, 1, 3).flatten(3).flatten(1, 2)  # [D, rows, columns]
    seen = unpad_image(seen, size)
    rows, columns = seen.shape[1:]
    ratio = sqrt(rows * columns / (_MOST * patches**2))
    if ratio > _ROOM:
        smaller = [int(rows // ratio), int(columns // ratio)]
        seen = nn.functional.interpolate(seen[None], smaller, mode="bilinear")[0]
    ends = newline[:, None, None].expand(-1, seen.shape[1], 1)
    return torch.cat((seen, ends), -1).flatten(1).T


FAMILY = LlavaOnevision()
