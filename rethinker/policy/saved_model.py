"""A policy on the disk, in Hugging Face format: what stands beside the weights is made once, before the first step.

Libraries refuse to save some of what they load. A run hears of it while it has nothing to lose, and what it saves later
are bytes and tensors, which only a disk refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from rethinker.config import ConfigError, one_line
from rethinker.families import configure, family_of
from rethinker.policy import lora
from rethinker.policy.loading import load_processor
from rethinker.policy.lora import FullWeights


def files_beside_weights(model: nn.Module, processor: Any, base: str | Path) -> dict[str, bytes]:
    """All that a saved model has but its weights, by the files' names: configs, processor, an adapter's config.

    Args:
        model: from `load_model`, its weights partitioned or not, with the adapters of `lora.add_adapters` or without.
        processor: the model's, as it is to be saved.
        base: the folder or name that adapters are trained beside.

    Raises:
        ConfigError: a part that cannot be saved, or not be read again.
    """

    def save_config(folder: Path) -> None:
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__]
        configure(model.config, family_of(model.config.model_type), processor)
        model.config.save_pretrained(folder)

    def save_generation_config(folder: Path) -> None:
        # As it is: its save_pretrained refuses a temperature without do_sample, which transformers and vLLM both take.
        file = folder / "generation_config.json"
        model.generation_config.to_json_file(file, use_diff=True, keys_to_pop=["compile_config"])

    def save_processor(folder: Path) -> None:
        processor.save_pretrained(folder)
        load_processor(folder)

    def name_weights(folder: Path) -> None:
        shapes = FullWeights(lora.base_weights(model)).metadata()
        revert_weight_conversion(model, {name: torch.empty(shape, device="meta") for name, _, shape in shapes})

    parts: dict[str, Callable[[Path], None]] = {
        "config.json": save_config,
        "generation_config.json": save_generation_config,
        "processor": save_processor,
        "weights": name_weights,
    }
    if hasattr(model, "peft_config"):
        parts["adapter"] = lambda folder: lora.save_config(folder / lora.FOLDER, model, base)
    with TemporaryDirectory() as name:
        folder = Path(name)
        for part, save in parts.items():
            try:
                save(folder)
            except OSError as error:
                raise ConfigError(
                    f"{folder}: a saved model's {part} cannot be written there ({one_line(error)}); set TMPDIR to a "
                    "folder with room"
                ) from error
            except Exception as error:  # whatever a library raises
                raise ConfigError(
                    f"policy.model: its {part} cannot be saved, and so no checkpoint: {one_line(error)}; correct the "
                    f"model's folder, {base}"
                ) from error
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def save_weights(
    folder: Path, model: nn.Module, weights: Mapping[str, torch.Tensor], adapters: Mapping[str, torch.Tensor]
) -> None:
    """Write a model's weights in safetensors.

    Args:
        folder: made if missing.
        model: whose names the weights have; in files some have others.
        weights: full, on the host.
        adapters: full, by peft's names; none without policy.lora.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = revert_weight_conversion(model, dict(weights))
    # Experts are parts of one tensor in a model, and tensors of their own in a file, which refuses parts.
    named = {name: w if w.nbytes == w.untyped_storage().nbytes() else w.clone() for name, w in named.items()}
    save_torch_state_dict(named, folder, max_shard_size="50GB")
    if adapters:
        lora.save_weights(folder / lora.FOLDER, adapters)


def save_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what `files_beside_weights` made, into a folder that is there."""
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
