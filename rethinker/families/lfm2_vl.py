"""LFM2-VL: most decoder layers are short convolutions; an image is one view of any extent, or tiles with such a view.

An image of more than twice the pixels of a tile is cut into as many tiles as its shape and `data.max_pixels` call for.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch

from rethinker.families import HIDDEN, PATCH, SIDE, STRIP, Family, tiny_template, tiny_text, tiny_tower
from rethinker_kernels.devices import to_device

_SIZES = ("downsample_factor", "encoder_patch_size", "max_image_tokens")
_TILE, _MOST_TILES = 512, 10  # of the published models


class LFM2VL(Family):
    """See Family. pixel_values are the patches [patches, channels * patch area] of all views, spatial_shapes their
    extents in patches [views, 2]."""

    PROCESSOR = "Lfm2VlProcessor"
    PLACEHOLDERS = (
        "<image>",
        "<|image_start|>",
        "<|image_end|>",
        "<|img_thumbnail|>",
        "<|im_start|>",
        *(f"<|img_row_{row + 1}_col_{col + 1}|>" for row in range(_MOST_TILES) for col in range(_MOST_TILES)),
    )
    IMAGE_INPUTS = ("pixel_values", "spatial_shapes", "pixel_attention_mask")
    SERVED = (("model.vision_tower.", "model.vision_tower.vision_model."),)
    ENLARGES = False

    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """See Family. A single view has no more tokens than a tile, so a small image may have fewer pixels than
        `min_pixels`."""
        token = (image_processor.encoder_patch_size * image_processor.downsample_factor) ** 2  # pixels of one
        tile = image_processor.tile_size**2
        most = max(1, min(max_pixels, tile) // token)
        tiles = min(_MOST_TILES, max_pixels // tile) if image_processor.do_image_splitting else 1
        return {
            "min_image_tokens": min(most, max(1, min_pixels // token)),
            "max_image_tokens": most,
            "min_tiles": min(2, max(1, tiles)),
            "max_tiles": max(1, tiles),
        }

    def image_ids(self, processor: Any, height: int, width: int) -> list[int]:
        images, to_id = processor.image_processor, processor.tokenizer.convert_tokens_to_ids
        sizes = {name: getattr(images, name) for name in _SIZES}
        tiles = {name: getattr(images, name) for name in ("min_tiles", "max_tiles", "tile_size")}
        wide, high = images.smart_resize(height, width, min_image_tokens=images.min_image_tokens, **sizes)
        token = images.encoder_patch_size * images.downsample_factor  # side in pixels
        # Sides are rounded up, and the processor does not pad what is larger than its largest view or tile.
        if high * wide > max(images.max_image_tokens * token**2, images.tile_size**2 * images.do_image_splitting):
            raise ValueError(f"{width} x {height} pixels would be a view of {wide} x {high}, larger than any other")
        view = [processor.image_token_id] * (high // token * (wide // token))
        shown = view
        tolerance = images.max_pixels_tolerance
        if images.max_tiles > 1 and images._is_image_too_large(height, width, max_pixels_tolerance=tolerance, **sizes):
            columns, rows, *_ = images._get_grid_layout(height, width, **tiles)
            tile = [processor.image_token_id] * (images.tile_size // token) ** 2
            names = [f"<|img_row_{row + 1}_col_{column + 1}|>" for row in range(rows) for column in range(columns)]
            shown = [i for name in names for i in (to_id(name), *tile)]
            shown += [to_id(processor.image_thumbnail_token), *view]
        return [to_id(processor.image_start_token), *shown, to_id(processor.image_end_token)]

    def image_inputs(self, made: Any) -> dict[str, torch.Tensor]:
        """See Family. The processor pads every view to the patches of the largest one that it may make."""
        shapes = made["spatial_shapes"]
        views = zip(made["pixel_values"], shapes.prod(-1).tolist(), strict=True)
        return {"pixel_values": torch.cat([view[:patches] for view, patches in views]), "spatial_shapes": shapes}

    def prepare(self, model: torch.nn.Module) -> None:
        for layer in self.language_model(model).layers:
            if hasattr(layer, "conv"):
                layer.conv.forward = MethodType(short_convolution, layer.conv)

    def tail(self, text_config: Any) -> int | None:
        return text_config.conv_L_cache - 1

    def state(self, text_config: Any, size: int) -> int:
        """See Family: the last inputs of each convolution."""
        return size * text_config.layer_types.count("conv") * text_config.hidden_size * self.tail(text_config)

    def features(self, model: torch.nn.Module, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """See Family. All views are one batch, and all tokens go through the projector at once: ZeRO-3's ranks would
        not agree on how often a module is called otherwise."""
        pixels, shapes = image_inputs["pixel_values"], image_inputs["spatial_shapes"].cpu()
        tower, side = model.model.vision_tower, model.config.downsample_factor
        padded, mask = padded_views(shapes, pixels.device)
        views = pixels.to(tower.dtype)[padded]
        seen = tower(views, pixel_attention_mask=mask, spatial_shapes=shapes).last_hidden_state
        patches = seen.flatten(0, 1)[to_device(squares(shapes, side), pixels.device)]
        return [model.model.multi_modal_projector(patches.unflatten(1, (side, side))).flatten(0, 2)]

    def blank(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """See Family: one image token."""
        return self._view(model, 1, 1, "cpu")

    def image_tokens(self, config: Any, pixels: int) -> int:
        """See Family: those of a view, and of the tiles if there may be some, though a square image of as few pixels
        has none."""
        token = (config.vision_config.patch_size * config.downsample_factor) ** 2
        tile = getattr(config, "tile_size", _TILE) ** 2
        view, tiles = max(1, min(pixels, tile) // token), min(_MOST_TILES, pixels // tile)
        return view + tiles * (tile // token) * (tiles > 1)

    def planned(self, model: torch.nn.Module, tokens: int) -> dict[str, torch.Tensor]:
        high = min(STRIP, tokens)
        return self._view(model, high, -(-tokens // high), "meta")

    @staticmethod
    def _view(model: torch.nn.Module, high: int, wide: int, device: str) -> dict[str, torch.Tensor]:
        """A black view of high x wide image tokens."""
        vision, side = model.config.vision_config, model.config.downsample_factor
        patches = torch.zeros(high * wide * side**2, vision.num_channels * vision.patch_size**2, device=device)
        return {"pixel_values": patches, "spatial_shapes": torch.tensor([[high * side, wide * side]])}

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN, kind: str = "") -> tuple[type, Any, Any]:
        """See Family. Two convolutions and two layers of attention; its head is tied to its embedding."""
        from transformers import (
            Lfm2VlConfig,
            Lfm2VlForConditionalGeneration,
            Lfm2VlImageProcessor,
            Lfm2VlProcessor,
        )

        tokenizer.add_special_tokens({"extra_special_tokens": list(self.PLACEHOLDERS)})
        text = tiny_text(tokenizer, hidden, model_type="lfm2", tie_word_embeddings=True)
        text |= {"norm_eps": text.pop("rms_norm_eps"), "num_hidden_layers": 4, "block_auto_adjust_ff_dim": False}
        text["layer_types"] = ["conv", "full_attention", "conv", "full_attention"]
        text |= {"conv_dim": hidden, "block_dim": hidden}  # for vLLM's model
        side = SIDE // 2
        config = Lfm2VlConfig(
            text_config=text,
            vision_config=tiny_tower(num_patches=(side // PATCH) ** 2, vision_use_head=False),
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            projector_hidden_size=hidden,
            tile_size=side,
            tie_word_embeddings=True,
        )
        images = Lfm2VlImageProcessor(
            encoder_patch_size=PATCH, tile_size=side, size={"height": side, "width": side}, max_image_tokens=4
        )
        processor = Lfm2VlProcessor(images, tokenizer, chat_template=tiny_template("<image>\n"))
        return Lfm2VlForConditionalGeneration, config, processor


@torch.compiler.disable
def short_convolution(self: Any, hidden_states: torch.Tensor, attention_mask: Any, **_: Any) -> torch.Tensor:
    """transformers' Lfm2ShortConv.forward for packed rows.

    Args:
        hidden_states: [B, L, D].
        attention_mask: the batch's `rethinker.policy.recurrent.Sequences`.

    Returns:
        [B, L, D].
    """
    before, after, x = self.in_proj(attention_mask.row(hidden_states)).chunk(3, dim=-1)  # [T, D] each
    # The convolution pads both ends. It is called as a module: hooks of ZeRO-3 around the call gather its weight.
    mixed = attention_mask.convolve(before * x, lambda seen: self.conv(seen)[..., : seen.shape[-1]])
    return attention_mask.rows(self.out_proj(after * mixed))


def padded_views(shapes: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views of several extents as a batch: the patches of each, and what hides the padding.

    Args:
        shapes: patches of the views whose patches follow each other, on the host: [views, 2].

    Returns:
        Where in the patches of all views those of each are, [views, longest], and a mask [views, 1, 1, longest], unless
        all are as long. transformers' towers would make no mask for attention functions that they do not know; one of 4
        dimensions they hand on as it is.
    """
    lengths = shapes.prod(-1)
    place = torch.arange(int(lengths.max()))
    real = place < lengths[:, None]
    padded = torch.where(real, (torch.cumsum(lengths, 0) - lengths)[:, None] + place, 0)
    return to_device(padded, device), None if real.all() else to_device(real[:, None, None], device)


def squares(shapes: torch.Tensor, side: int) -> torch.Tensor:
    """Where in the flattened batch of `padded_views` the patches of each token are, view by view and row by row:
    [tokens, side * side]."""
    longest, found = int(shapes.prod(-1).max()), []
    for number, (high, wide) in enumerate(shapes.tolist()):
        places = torch.arange(high * wide).view(high // side, side, wide // side, side)
        found.append(number * longest + places.transpose(1, 2).reshape(-1, side * side))
    return torch.cat(found)


FAMILY = LFM2VL()
