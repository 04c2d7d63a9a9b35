"""Mistral Small 3 and its like: Pixtral's tower, images of any size, row by row with a token at the end of each.

Images are only ever reduced: `data.min_pixels` changes nothing, and `data.max_pixels` is the square that they fit in.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch

from rethinker.config import ConfigError
from rethinker.families import HIDDEN, PATCH, SIDE, STRIP, Family, tiny_text, tiny_tokenizer, tiny_tower
from rethinker_kernels.devices import to_device


class Mistral3(Family):
    """See Family. pixel_values are [pixels, channels], image after image and row by row; image_sizes [images, 2]."""

    PROCESSOR = "PixtralProcessor"
    PLACEHOLDERS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[SYSTEM_PROMPT]")
    IMAGE_INPUTS = ("pixel_values", "image_sizes")
    ENLARGES = False

    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """See Family. An edge is rounded up to whole tokens, of two patches, and so must not be between them."""
        unit = 2 * image_processor.patch_size["height"]
        return {"size": {"longest_edge": max(unit, isqrt(max_pixels) // unit * unit)}}

    def image_arguments(self, processor: Any) -> dict[str, Any]:
        """See Family. An image is a multiple of whole tokens, not of patches."""
        return {"patch_size": processor.patch_size * processor.spatial_merge_size}

    def image_ids(self, processor: Any, height: int, width: int) -> list[int]:
        """See Family. A strip of which nothing is left when it is reduced raises ValueError."""
        unit, longest = processor.patch_size * processor.spatial_merge_size, processor.image_processor.size.longest_edge
        ratio = max(height / longest, width / longest)
        if ratio > 1:
            height, width = int(height / ratio), int(width / ratio)
        if not height or not width:
            raise ValueError(f"an image more than {longest} times as long as wide")
        row = [processor.image_token_id] * -(-width // unit) + [processor.image_break_token_id]
        return [*(row * -(-height // unit))[:-1], processor.image_end_token_id]

    def image_inputs(self, made: Any) -> dict[str, torch.Tensor]:
        """See Family. The processor pads images to the largest of their prompt."""
        sizes = made.get("image_sizes")
        if sizes is None:  # images that vLLM has cut to their sizes
            sizes = torch.tensor([image.shape[1:] for image in made["pixel_values"]])
        pixels = [
            image[:, :height, :width].permute(1, 2, 0).flatten(0, 1)
            for image, (height, width) in zip(made["pixel_values"], sizes.tolist(), strict=True)
        ]
        return {"pixel_values": torch.cat(pixels), "image_sizes": sizes}

    def prepare(self, model: torch.nn.Module) -> None:
        """See Family. Of the vision tower's layers, only the last one's features are handed on; every token sees all
        before it."""
        if (window := model.config.get_text_config().sliding_window) is not None:
            raise ConfigError(f"policy.model: its text_config.sliding_window is {window}; only null is supported")
        if model.config.vision_feature_layer != -1:
            raise ConfigError(
                f"policy.model: its vision_feature_layer is {model.config.vision_feature_layer}; only -1 is supported"
            )

    def features(self, model: torch.nn.Module, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """See Family. transformers would convolve each padded image, and read the extents from the device."""
        tower, pixels, sizes = model.model.vision_tower, image_inputs["pixel_values"], image_inputs["image_sizes"].cpu()
        side, grids = tower.patch_size, (sizes // tower.patch_size).tolist()
        lengths = [high * wide for high, wide in grids]
        patches = [  # [patches, channels, side, side] each
            image.view(high, side, wide, side, -1).permute(0, 2, 4, 1, 3).flatten(0, 1)
            for image, (high, wide) in zip(pixels.split([side * side * n for n in lengths]), grids, strict=True)
        ]
        # One call of every module with weights, however many images there are, or ZeRO-3's ranks would part.
        hidden = tower.ln_pre(tower.patch_conv(torch.cat(patches).to(tower.dtype)).flatten(1)[None])
        places = torch.cat([torch.cartesian_prod(*map(torch.arange, grid)).view(-1, 2) for grid in grids])
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        hidden = tower.transformer(
            hidden,
            attention_mask=None,  # by the bounds: see policy/attention.py
            position_embeddings=tower.patch_positional_embedding(hidden, to_device(places, pixels.device)),
            cu_seq_lens_q=to_device(bounds, pixels.device),
            max_length_q=max(lengths),
        ).last_hidden_state
        return [model.model.multi_modal_projector(hidden[0], sizes.tolist())]

    def blank(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """See Family: one image token."""
        side = _token_side(model.config)
        sizes = torch.tensor([[side, side]])
        return {"pixel_values": torch.zeros(side * side, model.config.vision_config.num_channels), "image_sizes": sizes}

    def image_tokens(self, config: Any, pixels: int) -> int:
        """See Family. Tokens at the ends of rows are not counted."""
        return max(1, isqrt(pixels) // _token_side(config)) ** 2

    def planned(self, model: torch.nn.Module, tokens: int) -> dict[str, torch.Tensor]:
        high, side = min(STRIP, tokens), _token_side(model.config)
        sizes = torch.tensor([[high * side, -(-tokens // high) * side]])
        channels = model.config.vision_config.num_channels
        return {"pixel_values": torch.empty(int(sizes.prod()), channels, device="meta"), "image_sizes": sizes}

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN) -> tuple[type, Any, Any]:
        from transformers import (
            Mistral3Config,
            Mistral3ForConditionalGeneration,
            PixtralImageProcessor,
            PixtralProcessor,
        )

        tokenizer = tiny_tokenizer(tokenizer, {}, [*self.PLACEHOLDERS, "[/INST]", "[/SYSTEM_PROMPT]"])
        text = tiny_text(tokenizer, hidden, model_type="mistral", head_dim=32, sliding_window=None)
        config = Mistral3Config(
            text_config={**text, "tie_word_embeddings": False},
            vision_config=tiny_tower(model_type="pixtral", head_dim=32, image_size=2 * SIDE),
            spatial_merge_size=2,
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
            tie_word_embeddings=False,
        )
        processor = PixtralProcessor(
            image_processor=PixtralImageProcessor(
                size={"longest_edge": SIDE}, patch_size={"height": PATCH, "width": PATCH}
            ),
            tokenizer=tokenizer,
            patch_size=PATCH,
            spatial_merge_size=2,
            chat_template=TINY_TEMPLATE,
        )
        return Mistral3ForConditionalGeneration, config, processor


def _token_side(config: Any) -> int:
    return config.vision_config.patch_size * config.spatial_merge_size


# Mistral's own, for texts and images.
TINY_TEMPLATE = (
    "<|endoftext|>{% for message in messages %}"
    "{% set open, close = ('[SYSTEM_PROMPT]', '[/SYSTEM_PROMPT]') if message['role'] == 'system' "
    "else ('[INST]', '[/INST]') %}{{ open }}"
    "{% for block in message['content'] %}"
    "{% if block['type'] == 'text' %}{{ block['text'] }}{% elif block['type'] == 'image' %}[IMG]{% endif %}"
    "{% endfor %}{{ close }}{% endfor %}"
)

FAMILY = Mistral3()
