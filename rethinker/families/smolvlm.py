"""SmolVLM and SmolVLM2: square tiles of one size, as many as it takes, and one of the whole.

The longest edge of every image becomes as many tiles as `data.max_pixels` has room for, whatever the image's own size:
`data.min_pixels` changes nothing. Its processor needs the package num2words.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch

from rethinker.families import HIDDEN, SIDE, Family, tiny_text, tiny_tokenizer, tiny_tower

MOST_TILES = 10  # of an edge: images are never larger than 4096 pixels


class SmolVLM(Family):
    """See Family. pixel_values are [tiles, channels, side, side]."""

    PROCESSOR = "SmolVLMProcessor"
    PLACEHOLDERS = (
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<|im_start|>",
        *(f"<row_{row + 1}_col_{column + 1}>" for row in range(MOST_TILES) for column in range(MOST_TILES)),
    )
    IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask")

    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """See Family. The tile of the whole image is not counted."""
        tile = image_processor.max_image_size["longest_edge"]
        return {"size": {"longest_edge": tile * min(MOST_TILES, max(1, isqrt(max_pixels) // tile))}}

    def image_ids(self, processor: Any, height: int, width: int) -> list[int]:
        from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

        _, rows, columns = processor.image_processor.get_number_of_image_patches(height, width)
        text = get_image_prompt_string(
            rows,
            columns,
            processor.image_seq_len,
            fake_token_around_image=processor.fake_image_token,
            image_token=processor.image_token,
            global_image_token=processor.global_image_token,
        )
        return processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def image_inputs(self, made: Any) -> dict[str, torch.Tensor]:
        """See Family. Every tile is full, so the processor's mask of pixels says nothing. Its pixels have a dimension
        for prompts, vLLM's have none."""
        return {"pixel_values": made["pixel_values"].flatten(0, -4)}

    def language_model(self, model: torch.nn.Module) -> torch.nn.Module:
        return model.model.text_model

    def vision_modules(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        return [model.model.vision_model, model.model.connector]

    def features(self, model: torch.nn.Module, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """See Family. transformers would look for empty tiles first, and wait for the device to answer."""
        tower, embeddings = model.model.vision_model, model.model.vision_model.embeddings
        pixels = image_inputs["pixel_values"].to(tower.dtype)
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)  # [tiles, patches, width]
        places = _places(embeddings.num_patches_per_side, pixels.device)
        hidden = patches + embeddings.position_embedding(places)
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        return [model.model.connector(tower.post_layernorm(hidden)).flatten(0, 1)]

    def image_tokens(self, config: Any, pixels: int) -> int:
        """See Family: of its tiles and, if there are several, one of the whole."""
        tiles = max(1, isqrt(pixels) // config.vision_config.image_size) ** 2
        return (tiles + (tiles > 1)) * _tile_tokens(config)

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN) -> tuple[type, Any, Any]:
        from transformers import (
            SmolVLMConfig,
            SmolVLMForConditionalGeneration,
            SmolVLMImageProcessor,
            SmolVLMProcessor,
            SmolVLMVideoProcessor,
        )

        names = {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        }
        tokenizer = tiny_tokenizer(tokenizer, names, [token for token in self.PLACEHOLDERS if token[:5] == "<row_"])
        side = SIDE // 2
        config = SmolVLMConfig(
            text_config=tiny_text(tokenizer, hidden, model_type="llama", head_dim=32, tie_word_embeddings=False),
            vision_config=tiny_tower(image_size=side),
            scale_factor=2,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
        )
        sizes = {"size": {"longest_edge": SIDE}, "max_image_size": {"longest_edge": side}}
        processor = SmolVLMProcessor(
            image_processor=SmolVLMImageProcessor(**sizes),
            tokenizer=tokenizer,
            video_processor=SmolVLMVideoProcessor(**sizes),
            image_seq_len=_tile_tokens(config),
            chat_template=TINY_TEMPLATE,
        )
        return SmolVLMForConditionalGeneration, config, processor


def _places(side: int, device: torch.device) -> torch.Tensor:
    """Which of the learned positions each patch of a full tile has, [patches].

    They are vLLM's, with its rounding. With sides of 27 patches transformers' differ in one row and one column in fp32,
    and in bf16 in six of each: its models would not see what was sampled from.
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side, device=device)
    at = torch.bucketize(torch.arange(side, device=device) / side, bounds, right=True)
    return (at[:, None] * side + at).flatten()


def _tile_tokens(config: Any) -> int:
    vision = config.vision_config
    return (vision.image_size // vision.patch_size // config.scale_factor) ** 2


# SmolVLM's own, for texts and images.
TINY_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}:{% else %}: {% endif %}"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}<image>{% endif %}"
    "{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)

FAMILY = SmolVLM()
