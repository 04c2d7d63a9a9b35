"""Gemma 4: per-layer embeddings and keys that layers share (E2B, E4B), experts beside a dense MLP (26B-A4B), or neither
(31B); layers of two kinds, which differ in their heads' size, number and rotation.

An image has about as many tokens as one of five budgets, whatever its size: the largest that `data.max_pixels` allows.
"""

from __future__ import annotations

from typing import Any

import torch

from rethinker.config import ConfigError
from rethinker.families import HIDDEN, PATCH, STRIP, Family, tiny_text, tiny_tower
from rethinker.families.gemma3 import tiny_gemma_tokenizer
from rethinker.families.lfm2_vl import padded_views, squares
from rethinker_kernels.devices import to_device

_BUDGETS = (70, 140, 280, 560, 1120)  # tokens of an image: the processor takes no others


class Gemma4(Family):
    """See Family. pixel_values are the patches [patches, channels * patch area] of all images, spatial_shapes their
    extents in patches [images, 2]."""

    PROCESSOR = "Gemma4Processor"
    PLACEHOLDERS = ("<|image|>", "<|image>", "<image|>", "<|audio|>", "<|audio>", "<audio|>", "<|video|>", "<|turn>")
    IMAGE_INPUTS = ("pixel_values", "image_position_ids")
    TOKEN_TYPES = "mm_token_type_ids"
    TINY = ("", "per_layer", "moe")

    def image_settings(self, image_processor: Any, min_pixels: int, max_pixels: int) -> dict[str, Any]:
        """See Family. Images are enlarged to the budget, and so `min_pixels` changes nothing."""
        return {
            "max_soft_tokens": _budget(max_pixels, image_processor.patch_size * image_processor.pooling_kernel_size)
        }

    def image_ids(self, processor: Any, height: int, width: int) -> list[int]:
        to_id = processor.tokenizer.convert_tokens_to_ids
        (count,) = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_tokens"]
        return to_id([processor.boi_token, *[processor.image_token] * count, processor.eoi_token])

    def image_inputs(self, made: Any) -> dict[str, torch.Tensor]:
        """See Family. The processor pads every image to the patches of the largest one; vLLM has a name of its own for
        their places."""
        places = made["image_position_ids" if "image_position_ids" in made else "pixel_position_ids"]
        shapes = places.amax(1).flip(-1) + 1  # rows, columns; padding is at -1
        views = zip(made["pixel_values"], shapes.prod(-1).tolist(), strict=True)
        return {"pixel_values": torch.cat([view[:patches] for view, patches in views]), "spatial_shapes": shapes}

    def image_blocks(self, text_config: Any) -> tuple[str, ...]:
        """See Family. Layers that see everything are causal."""
        return ("sliding_attention",) if text_config.use_bidirectional_attention == "vision" else ()

    def routers(self, model: torch.nn.Module) -> dict[int, torch.nn.Module]:
        layers = enumerate(self.language_model(model).layers)
        return {number: layer.router for number, layer in layers if layer.enable_moe_block}

    def cached(self, text_config: Any) -> list[tuple[int, int]]:
        """See Family. The last layers read the keys of earlier ones."""
        layers = list(text_config.per_layer_config)[: text_config.num_hidden_layers - text_config.num_kv_shared_layers]
        return [(layer.num_key_value_heads, layer.head_dim) for layer in layers]

    def prepare(self, model: torch.nn.Module) -> None:
        """See Family. What transformers and vLLM treat differently is refused; published models have none of it."""
        text = model.config.text_config
        if text.use_bidirectional_attention == "all":
            raise ConfigError(
                "policy.model: its use_bidirectional_attention is 'all'; only 'vision' and null are supported"
            )
        if (shared := text.num_kv_shared_layers) >= text.num_hidden_layers:
            raise ConfigError(
                f"policy.model: its num_kv_shared_layers={shared} leaves none to share; correct its config.json"
            )
        if text.hidden_size_per_layer_input and text.pad_token_id != 0:
            raise ConfigError(
                f"policy.model: its pad_token_id is {text.pad_token_id}; vLLM has 0: set it so in its config.json"
            )
        if suppressed := model.generation_config.suppress_tokens:
            raise ConfigError(
                f"policy.model: its generation_config.json has suppress_tokens={suppressed}, of which vLLM's log-probs "
                "know; leave them out there"
            )
        for router in self.routers(model).values():
            router.top_k, router.num_experts = text.top_k_experts, text.num_experts
        if model.model.audio_tower is not None:  # nothing is heard: its weights stay as they are
            model.model.audio_tower.requires_grad_(False)
            model.model.embed_audio.requires_grad_(False)

    def vision_modules(self, model: torch.nn.Module) -> list[torch.nn.Module]:
        return [model.model.vision_tower, model.model.embed_vision]

    def token_inputs(self, model: torch.nn.Module, ids: torch.Tensor, image: torch.Tensor) -> dict[str, torch.Tensor]:
        """See Family: the per-layer embeddings; an image's tokens have that of padding."""
        text = self.language_model(model)
        if not text.hidden_size_per_layer_input:
            return {}
        return {"per_layer_inputs": text.get_per_layer_inputs(ids.masked_fill(image, 0), None)}

    def features(self, model: torch.nn.Module, image_inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """See Family. All images are one batch. transformers' model averages over patches by a product of matrices."""
        pixels, shapes = image_inputs["pixel_values"], image_inputs["spatial_shapes"].cpu()
        tower, side = model.model.vision_tower, model.config.vision_config.pooling_kernel_size
        padded, mask = padded_views(shapes, pixels.device)
        places = torch.cat([torch.cartesian_prod(*map(torch.arange, shape)).flip(-1) for shape in shapes.tolist()])
        places = to_device(places, pixels.device)[padded]  # x and y of each patch
        nothing = torch.zeros_like(padded, dtype=torch.bool)  # padding repeats a patch
        seen = tower.encoder(
            inputs_embeds=tower.patch_embedder(pixels[padded], places, nothing),
            attention_mask=mask,
            pixel_position_ids=places,
        ).last_hidden_state
        patches = seen.flatten(0, 1)[to_device(squares(shapes, side), pixels.device)]  # [N, side * side, D]
        pooled = patches.float().mean(1).to(seen.dtype).float() * tower.pooler.root_hidden_size
        if tower.config.standardize:
            pooled = (pooled - tower.std_bias.float()) * tower.std_scale.float()
        return [model.model.embed_vision(pooled.to(seen.dtype))]

    def blank(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """See Family: one image token."""
        return self._view(model, 1, 1, "cpu")

    def image_tokens(self, config: Any, pixels: int) -> int:
        """See Family: the budget, which no image exceeds."""
        return _budget(pixels, config.vision_config.patch_size * config.vision_config.pooling_kernel_size)

    def planned(self, model: torch.nn.Module, tokens: int) -> dict[str, torch.Tensor]:
        high = min(STRIP, tokens)
        return self._view(model, high, -(-tokens // high), "meta")

    @staticmethod
    def _view(model: torch.nn.Module, high: int, wide: int, device: str) -> dict[str, torch.Tensor]:
        """A black view of high x wide image tokens."""
        vision = model.config.vision_config
        side = vision.pooling_kernel_size
        patches = torch.zeros(high * wide * side**2, 3 * vision.patch_size**2, device=device)
        return {"pixel_values": patches, "spatial_shapes": torch.tensor([[high * side, wide * side]])}

    def tiny(self, tokenizer: Any, hidden: int = HIDDEN, kind: str = "") -> tuple[type, Any, Any]:
        """See Family. Its kinds are those of the published models; that with per-layer embeddings has an audio tower,
        too."""
        from transformers import (
            Gemma4AudioFeatureExtractor,
            Gemma4Config,
            Gemma4ForConditionalGeneration,
            Gemma4ImageProcessor,
            Gemma4Processor,
            Gemma4VideoProcessor,
        )

        names = {"image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>"}
        names |= {"audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>"}
        tokenizer = tiny_gemma_tokenizer(tokenizer, names, ("<|video|>", "<|turn>", "<turn|>"))
        to_id = tokenizer.convert_tokens_to_ids
        kinds = {
            "": {"attention_k_eq_v": True, "use_bidirectional_attention": "vision"},
            "per_layer": {
                "num_hidden_layers": 5,
                "layer_types": ["sliding_attention", *_TYPES, *_TYPES],
                "num_kv_shared_layers": 2,
                "use_double_wide_mlp": True,
                "num_key_value_heads": 1,
                "hidden_size_per_layer_input": 32,
            },
            "moe": {
                "attention_k_eq_v": True,
                "use_bidirectional_attention": "vision",
                "enable_moe_block": True,
                "num_experts": 8,
                "top_k_experts": 2,
                "moe_intermediate_size": 3 * hidden // 2,
            },
        }
        text = {
            "num_hidden_layers": 4,
            "layer_types": 2 * _TYPES,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "head_dim": 32,
            "global_head_dim": 64,
            "sliding_window": 80,  # more than an image's tokens
            "hidden_size_per_layer_input": 0,
            "final_logit_softcapping": 3.0,  # low enough to bend
            "pad_token_id": 0,
            "vocab_size_per_layer_input": len(tokenizer),
        }
        audio = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "output_proj_dims": 32}
        config = Gemma4Config(
            text_config=tiny_text(tokenizer, hidden, **text | kinds[kind]),
            vision_config=tiny_tower(
                num_key_value_heads=1,
                head_dim=32,
                pooling_kernel_size=2,
                position_embedding_size=160,
                use_clipped_linears=kind == "per_layer",
                standardize=kind != "per_layer",
                default_output_length=_BUDGETS[0],  # for vLLM
            ),
            audio_config=audio | {"subsampling_conv_channels": [8, 4]} if kind == "per_layer" else None,
            image_token_id=to_id("<|image|>"),
            boi_token_id=to_id("<|image>"),
            eoi_token_id=to_id("<image|>"),
            audio_token_id=to_id("<|audio|>"),
            boa_token_id=to_id("<|audio>"),
            eoa_token_index=to_id("<audio|>"),
            video_token_id=to_id("<|video|>"),
        )
        sizes = {"patch_size": PATCH, "pooling_kernel_size": 2}
        processor = Gemma4Processor(
            feature_extractor=Gemma4AudioFeatureExtractor(),
            image_processor=Gemma4ImageProcessor(max_soft_tokens=_BUDGETS[0], **sizes),
            tokenizer=tokenizer,
            video_processor=Gemma4VideoProcessor(**sizes),
            chat_template=TINY_TEMPLATE,
        )
        return Gemma4ForConditionalGeneration, config, processor

    def draw(self, name: str, values: torch.Tensor) -> None:
        """See Family. Scores have no scale of their own: without one in the queries' norm each token would see one
        other. Buffers are scalars of layers, and the tower's bounds, shift and scale."""
        if name.endswith(".q_norm.weight"):
            values.fill_(len(values) ** -0.5)
        elif name.endswith(("layer_scalar", "_min", "_max", "std_bias", "std_scale")):
            torch.nn.init.uniform_(values, 0.5, 1.5)
            values.mul_(-1.0 if name.endswith("_min") else 1.0)


_TYPES = ["sliding_attention", "full_attention"]


def _budget(pixels: int, side: int) -> int:
    """The largest budget of tokens of side x side pixels each that an image of so many pixels fills."""
    return max([budget for budget in _BUDGETS if budget * side**2 <= pixels], default=_BUDGETS[0])


# Gemma's own, for texts and images.
TINY_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}\n"
    "{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<|image|>{% elif item['type'] == 'text' %}{{ item['text'] | trim }}"
    "{% endif %}{% endfor %}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)

FAMILY = Gemma4()
