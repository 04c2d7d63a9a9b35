"""A model folder from anywhere, judged by its files alone: right kind, whole weights, nothing to be run.

This file imports no torch and reads no tensor, so a folder that cannot be trained fails within milliseconds. Whether
config.json speaks of these weights is seen when they are loaded.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError, one_line
from rethinker.families import check_supported

INDEX = "model.safetensors.index.json"
AGAIN = "download or save the model again"


def check_model_folder(folder: Path, named: str) -> int:
    """Check that training can start from a folder.

    Args:
        folder: in Hugging Face format.
        named: how the user named it, `policy.model=...`, for messages.

    Returns:
        The size of its weights in bytes.

    Raises:
        ConfigError: no model, another kind of model, weights that are missing, cut short, or no safetensors, or
            files of another format beside them.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{named} has no config.json; give a folder in Hugging Face format")
    config = _read_json(folder / "config.json", named)
    detail = ", with code of its own (auto_map), which is never run" if "auto_map" in config else ""
    check_supported(config.get("model_type"), named, detail)
    for part, default in (("text_config", {}), ("vision_config", None)):
        if not isinstance(config.get(part, default), dict):
            raise ConfigError(
                f"{named}: its config.json's {part} is {'no object' if part in config else 'missing'}; {AGAIN}"
            )
    for file in (folder / "tekken.json", *folder.glob("consolidated*.safetensors")):
        if file.is_file():
            raise ConfigError(
                f"{named} has {file.name}, of Mistral's own format, which libraries would take for the model's; leave "
                "it out (hf download NAME --exclude tekken.json --exclude 'consolidated*' --local-dir FOLDER)"
            )
    shards = _shards(folder, named)
    for shard in shards:
        _shapes(shard, named)
    return sum(shard.stat().st_size for shard in shards)


def decoder_matrices(folder: Path) -> set[str]:
    """Names within a decoder layer, as self_attn.q_proj, of its matrices, in a folder that passed the check above."""
    shapes = {name: shape for shard in folder.glob("*.safetensors") for name, shape in _shapes(shard, "").items()}
    matrices = (name for name, shape in shapes.items() if len(shape) == 2 and "vision" not in name)
    found = (re.search(r"\blayers\.\d+\.(.+)\.weight$", name) for name in matrices)
    return {match[1] for match in found if match}


def _read_json(file: Path, named: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(f"{named}: {file.name} is damaged ({one_line(error)}); {AGAIN}") from None
    return content


def _shards(folder: Path, named: str) -> list[Path]:
    shards = set(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        weight_map = _read_json(folder / INDEX, named).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ConfigError(f"{named}: {INDEX} is damaged; {AGAIN}")
        shards |= {folder / str(name) for name in weight_map.values()}
    if not shards:
        hint = AGAIN
        for pickle in sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")):
            hint = f"{pickle} is a pickle, which may run code when it is read; save it as safetensors"
        raise ConfigError(f"{named} has no weights (*.safetensors); {hint}")
    broken = sorted(shard.name for shard in shards if not shard.is_file() or shard.stat().st_size <= 8)
    if broken:
        raise ConfigError(f"{named}: weights {broken[0]} are missing or empty; {AGAIN}")
    return sorted(shards)


def _shapes(shard: Path, named: str) -> dict[str, list[int]]:
    """Shape of every tensor, from the header; the library checks that header and file agree to the byte."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="np") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{named}: weights {shard.name} are damaged ({one_line(error)}); {AGAIN}") from None
