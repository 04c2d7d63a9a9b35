"""What the config.json of published models says, for machines that have neither the models nor a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_QWEN2_5 = {"max_position_embeddings": 128_000, "vocab_size": 152_064}
_QWEN3 = {"max_position_embeddings": 262_144, "vocab_size": 151_936, "head_dim": 128}
_QWEN3_5 = {
    "max_position_embeddings": 262_144,
    "vocab_size": 248_320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
_VISION = {"hidden_size": 1280, "intermediate_size": 3420}
_TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16, "patch_size": 16}
# model_type, the numbers of _TEXT, and what else the language model and the vision tower have.
PUBLISHED: dict[str, tuple[str, tuple[int, ...], dict[str, Any], dict[str, Any]]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (
        *("qwen2_5_vl", (2048, 11008, 36, 16, 2)),
        *(_QWEN2_5 | {"vocab_size": 151_936, "tie_word_embeddings": True}, _VISION),
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("qwen2_5_vl", (3584, 18944, 28, 28, 4), _QWEN2_5, _VISION),
    "Qwen/Qwen2.5-VL-32B-Instruct": (
        *("qwen2_5_vl", (5120, 27648, 64, 40, 8)),
        *(_QWEN2_5, _VISION | {"intermediate_size": 3456}),
    ),
    "Qwen/Qwen2.5-VL-72B-Instruct": (
        *("qwen2_5_vl", (8192, 29568, 80, 64, 8)),
        *(_QWEN2_5, _VISION | {"intermediate_size": 3456}),
    ),
    "Qwen/Qwen3-VL-8B-Instruct": ("qwen3_vl", (4096, 12288, 36, 32, 8), _QWEN3, {}),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": ("qwen3_vl_moe", (2048, 6144, 48, 32, 4), _QWEN3 | _EXPERTS, _TOWER),
    "Qwen/Qwen3.5-9B": ("qwen3_5", (4096, 12288, 32, 16, 4), _QWEN3_5, _TOWER),
}


def write(name: str, folder: Path, layers: int | None = None) -> str:
    """A folder with a model's config.json; with `layers` of only so many decoder and vision layers."""
    kind, sizes, text, vision = PUBLISHED[name]
    text = {"tie_word_embeddings": False} | text | dict(zip(_TEXT, sizes, strict=True))
    vision = vision | {"out_hidden_size": text["hidden_size"]}
    if layers:
        text["num_hidden_layers"] = vision["depth"] = layers
    both = {"text_config": text, "vision_config": vision}
    AutoConfig.for_model(kind, **both, tie_word_embeddings=text["tie_word_embeddings"]).save_pretrained(folder)
    return str(folder)
