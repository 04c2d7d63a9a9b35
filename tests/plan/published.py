"""What the config.json of published models says, for machines that have neither the models nor a network."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig

_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PUBLISHED = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (2048, 11008, 36, 16, 2),
    "Qwen/Qwen2.5-VL-7B-Instruct": (3584, 18944, 28, 28, 4),
    "Qwen/Qwen2.5-VL-32B-Instruct": (5120, 27648, 64, 40, 8),
    "Qwen/Qwen2.5-VL-72B-Instruct": (8192, 29568, 80, 64, 8),
    "Qwen/Qwen3-VL-8B-Instruct": (4096, 12288, 36, 32, 8),
}


def write(name: str, folder: Path, layers: int | None = None) -> str:
    """A folder with a model's config.json; with `layers` of only so many decoder and vision layers."""
    text = dict(zip(_TEXT, PUBLISHED[name], strict=True))
    vision: dict = {"out_hidden_size": text["hidden_size"]}
    tied = "3B" in name
    if layers:
        text["num_hidden_layers"] = vision["depth"] = layers
    if "Qwen3" in name:
        kind, vocabulary = "qwen3_vl", 151_936
        text |= {"head_dim": 128, "max_position_embeddings": 262_144}
    else:
        kind, vocabulary = "qwen2_5_vl", 151_936 if tied else 152_064
        text |= {"max_position_embeddings": 128_000, "tie_word_embeddings": tied}
        vision |= {"hidden_size": 1280, "intermediate_size": 3456 if text["hidden_size"] > 5000 else 3420}
    both = {"text_config": text | {"vocab_size": vocabulary}, "vision_config": vision}
    AutoConfig.for_model(kind, **both, tie_word_embeddings=tied).save_pretrained(folder)
    return str(folder)
