"""The shape of a policy from its config alone: exact parameter counts, without weights and without a network."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinker.config import ConfigError
from rethinker.families import family_of

if TYPE_CHECKING:
    from torch import nn

_QWEN25_VISION = {"hidden_size": 1280, "depth": 32, "num_heads": 16, "patch_size": 14, "window_size": 112}
_QWEN3_VISION = {"hidden_size": 1152, "depth": 27, "num_heads": 16, "patch_size": 16, "intermediate_size": 4304}


def _qwen25(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, seen: int, tied: bool) -> dict:
    text = {
        "vocab_size": 151_936 if hidden == 2048 else 152_064,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "tie_word_embeddings": tied,
    }
    vision = {**_QWEN25_VISION, "intermediate_size": seen, "out_hidden_size": hidden}
    vision["fullatt_block_indexes"] = [7, 15, 23, 31]
    return {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}


def _qwen3(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict:
    text = {
        "vocab_size": 151_936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "max_position_embeddings": 262_144,
        "tie_word_embeddings": False,
    }
    vision = {**_QWEN3_VISION, "out_hidden_size": hidden, "deepstack_visual_indexes": [8, 16, 24]}
    return {"model_type": "qwen3_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": False}


KNOWN: dict[str, dict[str, Any]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": _qwen25(2048, 11008, 36, 16, 2, 3420, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": _qwen25(3584, 18944, 28, 28, 4, 3420, False),
    "Qwen/Qwen2.5-VL-32B-Instruct": _qwen25(5120, 27648, 64, 40, 8, 3456, False),
    "Qwen/Qwen2.5-VL-72B-Instruct": _qwen25(8192, 29568, 80, 64, 8, 3456, False),
    "Qwen/Qwen3-VL-8B-Instruct": _qwen3(4096, 12288, 36, 32, 8),
    "Qwen/Qwen3-VL-32B-Instruct": _qwen3(5120, 25600, 64, 64, 8),
}
"""What the published config.json of these models says, for machines that have neither the model nor a network.

The Qwen2.5-VL ones come to 3.75, 8.29, 33.45 and 73.41 billion parameters and Qwen3-VL-8B to 8.77, as published.
"""


@dataclass(frozen=True)
class Shape:
    """What memory and time depend on. Counts are of parameters; V vocabulary, D hidden size."""

    name: str
    config: Any = field(compare=False)  # the Hugging Face config
    parameters: int
    vision_parameters: int
    layers: int
    hidden: int  # D
    intermediate: int
    vocabulary: int  # V
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    max_positions: int
    largest_group: int  # parameters that a weight sync gathers at once: a decoder layer, or the embedding
    linears: tuple[tuple[str, int, int], ...]  # of a decoder layer: name, in, out
    patch: int  # pixels
    merge: int  # patches per side of an image token
    patch_values: int  # numbers that the processor makes of a patch
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    tile: int = 0  # pixels per side of the tiles that an image is cut into; 0: images of any size

    @property
    def head_parameters(self) -> int:
        """V x D: the LM head, or the embedding."""
        return self.vocabulary * self.hidden

    @property
    def text_parameters(self) -> int:
        """All but the vision tower."""
        return self.parameters - self.vision_parameters

    def image_tokens(self, pixels: int) -> int:
        """Tokens of an image of that many pixels: of its tiles and, if there are several, one of the whole."""
        if self.tile:
            tiles = max(1, pixels // self.tile**2)
            pixels = (tiles + (tiles > 1)) * self.tile**2
        return pixels // (self.patch * self.merge) ** 2

    @property
    def tile_patches(self) -> int:
        """Patches of a tile."""
        return (self.tile // self.patch) ** 2


@functools.cache
def shape_of(model: str) -> Shape:
    """The shape of `policy.model`: `tiny`, a folder, a name in the hub's cache, or one of KNOWN.

    Raises:
        ConfigError: the config is nowhere to be found, or no model of this kind can be planned.
    """
    import torch

    config = _config_of(model)
    family_of(config.model_type, f"policy.model={model}")
    try:
        built = meta_model(config)
        text = config.get_text_config()
        language = built.model.language_model
        visual = family_of(config.model_type).vision_modules(built)
    except (ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"policy.model={model}: no vision-language model that can be planned: {reason}") from error

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    return Shape(
        name=model,
        config=config,
        parameters=count(built),
        vision_parameters=sum(map(count, visual)),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        vocabulary=built.lm_head.weight.shape[0],
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        tied=built.lm_head.weight is language.embed_tokens.weight,
        max_positions=text.max_position_embeddings,
        linears=tuple(
            (name, part.in_features, part.out_features)
            for name, part in language.layers[0].named_modules()
            if isinstance(part, torch.nn.Linear)
        ),
        largest_group=max(count(language.layers[0]), built.lm_head.weight.numel()),
        **_images(config),
    )


def _images(config: Any) -> dict[str, int]:
    """What Shape says of images: Qwen's are of any size, InternVL's are cut into square tiles."""
    vision = config.vision_config
    if config.model_type == "internvl":
        (patch, _), (tile, _) = vision.patch_size, vision.image_size
        return {
            "patch": patch,
            "merge": round(1 / config.downsample_ratio),
            "patch_values": vision.num_channels * patch**2,
            "vision_layers": vision.num_hidden_layers,
            "vision_hidden": vision.hidden_size,
            "vision_intermediate": vision.intermediate_size,
            "tile": tile,
        }
    hidden = getattr(vision, "embed_dim", vision.hidden_size)  # Qwen2-VL calls the language model's the hidden size
    return {
        "patch": vision.patch_size,
        "merge": vision.spatial_merge_size,
        "patch_values": vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        "vision_layers": vision.depth,
        "vision_hidden": hidden,
        "vision_intermediate": getattr(vision, "intermediate_size", None) or vision.mlp_ratio * hidden,
    }


def meta_model(config: Any, *, depth: int | None = None, dtype: Any = None) -> nn.Module:
    """The model without data (device "meta"), with `depth` decoder layers and vision blocks if given."""
    import rethinker.policy  # noqa: F401  transformers needs its repair of torchvision

    import torch  # isort: skip
    from transformers import AutoModelForImageTextToText

    if depth is not None:
        config = copy.deepcopy(config)
        text, vision = config.get_text_config(), config.vision_config
        text.num_hidden_layers = depth
        setattr(vision, "num_hidden_layers" if config.model_type == "internvl" else "depth", depth)
        if getattr(text, "layer_types", None):
            text.layer_types = (text.layer_types * depth)[:depth]
        for late in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            if hasattr(vision, late):
                setattr(vision, late, [])
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype or torch.bfloat16)


def _config_of(model: str) -> Any:
    import rethinker.policy  # noqa: F401

    from transformers import AutoConfig  # isort: skip

    if model == "tiny":
        from rethinker.embedded import tiny
        from rethinker.embedded.tokenizer import train_tokenizer

        return tiny._config(tiny.DEFAULT_SIZE, train_tokenizer((), merges=tiny.DEFAULT_SIZE.merges), True)
    folder = Path(model).expanduser()
    try:
        return AutoConfig.from_pretrained(
            folder if folder.is_dir() else model, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        if model in KNOWN:
            entry = dict(KNOWN[model])
            return AutoConfig.for_model(entry.pop("model_type"), **entry)
        raise ConfigError(
            f"policy.model={model} has no config.json here; give a model folder, a name in the hub's cache, or one of "
            f"{', '.join(KNOWN)} ({str(error).splitlines()[0]})"
        ) from None
