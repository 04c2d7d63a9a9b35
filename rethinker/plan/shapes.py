"""The shape of a policy from its config alone: exact parameter counts, without weights and without a network."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rethinker.config import ConfigError, one_line
from rethinker.families import family_of

if TYPE_CHECKING:
    from torch import nn

_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (2048, 11008, 36, 16, 2),
    "Qwen/Qwen2.5-VL-7B-Instruct": (3584, 18944, 28, 28, 4),
    "Qwen/Qwen2.5-VL-32B-Instruct": (5120, 27648, 64, 40, 8),
    "Qwen/Qwen2.5-VL-72B-Instruct": (8192, 29568, 80, 64, 8),
    "Qwen/Qwen3-VL-8B-Instruct": (4096, 12288, 36, 32, 8),
    "Qwen/Qwen3-VL-32B-Instruct": (5120, 25600, 64, 64, 8),
}
"""Sizes (_TEXT) of the models of the shipped recipes, for machines that have neither the model nor a network."""


def published_config(name: str) -> Any:
    """What the published config.json of a model of PUBLISHED says, where it is not transformers' default."""
    from transformers import AutoConfig

    text = dict(zip(_TEXT, PUBLISHED[name], strict=True))
    vision = {"out_hidden_size": text["hidden_size"]}
    tied = "3B" in name
    if "Qwen3" in name:
        text |= {"vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 262_144}
        return AutoConfig.for_model("qwen3_vl", text_config=text, vision_config=vision)
    text |= {"vocab_size": 151_936 if tied else 152_064, "max_position_embeddings": 128_000}
    vision |= {"hidden_size": 1280, "intermediate_size": 3456 if text["hidden_size"] > 5000 else 3420}
    both = {"text_config": text | {"tie_word_embeddings": tied}, "vision_config": vision}
    return AutoConfig.for_model("qwen2_5_vl", **both, tie_word_embeddings=tied)


@dataclass(frozen=True)
class Shape:
    """What memory and time depend on. Counts are of parameters; V vocabulary, D hidden size."""

    name: str
    config: Any = field(compare=False)  # the Hugging Face config
    parameters: int
    vision_parameters: int
    vocabulary: int  # V
    tied: bool
    largest_group: int  # parameters that a weight sync gathers at once: a decoder layer, or the embedding
    linears: tuple[tuple[str, int, int], ...]  # of a decoder layer: name, in, out
    patch: int  # pixels
    merge: int  # patches per side of an image token
    patch_values: int  # numbers that the processor makes of a patch
    tile: int  # pixels per side of the tiles that an image is cut into; 0: images of any size

    @property
    def text(self) -> Any:
        """The language model's config."""
        return self.config.get_text_config()

    @property
    def hidden(self) -> int:
        """D."""
        return self.text.hidden_size

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return getattr(self.text, "head_dim", None) or self.hidden // self.text.num_attention_heads

    @property
    def head_parameters(self) -> int:
        """V x D: the LM head, or the embedding."""
        return self.vocabulary * self.hidden

    @property
    def text_parameters(self) -> int:
        """All but the vision tower."""
        return self.parameters - self.vision_parameters

    @property
    def tile_patches(self) -> int:
        """Patches of a tile."""
        return (self.tile // self.patch) ** 2

    def image_tokens(self, pixels: int) -> int:
        """Tokens of an image of that many pixels: of its tiles and, if there are several, one of the whole."""
        if self.tile:
            tiles = max(1, pixels // self.tile**2)
            pixels = (tiles + (tiles > 1)) * self.tile**2
        return pixels // (self.patch * self.merge) ** 2


@functools.cache
def shape_of(model: str) -> Shape:
    """The shape of `policy.model`: `tiny`, a folder, a name in the hub's cache, or one of PUBLISHED.

    Raises:
        ConfigError: there is no config, or no model of this kind can be planned.
    """
    import torch

    config = _config_of(model)
    family = family_of(config.model_type, f"policy.model={model}")
    try:
        built = meta_model(config)
        visual = family.vision_modules(built)
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"policy.model={model} cannot be planned: {one_line(error)}") from error
    vision, language = config.vision_config, built.model.language_model

    def count(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    if config.model_type == "internvl":  # square tiles
        (patch, _), (tile, _) = vision.patch_size, vision.image_size
        merge, values = round(1 / config.downsample_ratio), vision.num_channels * patch**2
    else:
        patch, tile, merge = vision.patch_size, 0, vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * patch**2
    linears = [(n, m) for n, m in language.layers[0].named_modules() if isinstance(m, torch.nn.Linear)]
    return Shape(
        name=model,
        config=config,
        parameters=count(built),
        vision_parameters=sum(map(count, visual)),
        vocabulary=built.lm_head.weight.shape[0],
        tied=built.lm_head.weight is language.embed_tokens.weight,
        largest_group=max(count(language.layers[0]), built.lm_head.weight.numel()),
        linears=tuple((name, part.in_features, part.out_features) for name, part in linears),
        patch=patch,
        merge=merge,
        patch_values=values,
        tile=tile,
    )


def depths(config: Any) -> tuple[int, int]:
    """Layers of the language model and of the vision tower."""
    return config.get_text_config().num_hidden_layers, getattr(config.vision_config, _vision_depth(config))


def _vision_depth(config: Any) -> str:
    return "num_hidden_layers" if config.model_type == "internvl" else "depth"


def meta_model(config: Any, *, depth: int | None = None, dtype: Any = None) -> nn.Module:
    """The model without data (device "meta"), with `depth` decoder layers and vision blocks if given."""
    import rethinker.policy  # noqa: F401  transformers needs its repair of torchvision

    import torch  # isort: skip
    from transformers import AutoModelForImageTextToText

    if depth is not None:
        config = copy.deepcopy(config)
        text, vision = config.get_text_config(), config.vision_config
        text.num_hidden_layers = depth
        setattr(vision, _vision_depth(config), depth)
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
        where = folder if folder.is_dir() else model
        return AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if model in PUBLISHED:
            return published_config(model)
        raise ConfigError(
            f"policy.model={model} has no config.json here; give a model folder, a name in the hub's cache, or one of "
            f"{', '.join(PUBLISHED)} ({one_line(error)})"
        ) from None
