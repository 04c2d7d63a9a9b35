"""What a Hugging Face folder or hub name holds of a model: weights, processor, generation settings, and no code."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rethinker.config import ConfigError, one_line
from rethinker.families import family_of


def load_model(folder: str | Path, dtype: torch.dtype) -> nn.Module:
    """Load a model from a Hugging Face folder or hub name, partitioned at once if ZeRO-3 is announced.

    Weights are read from safetensors only, and no code that comes with a model is run.

    Raises:
        ConfigError: no such model, another kind, or weights that are not exactly the model's.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    named = f"policy.model={str(folder)!r}"
    load_generation_config(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        family_of(config.model_type, named)
        model, loaded = AutoModelForImageTextToText.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # the check below names them
            output_loading_info=True,
        )
    except ConfigError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise ConfigError(f"{named} could not be loaded: {one_line(error)}") from error
    # transformers would fill a gap with random numbers and only log it.
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
        if names := sorted(map(str, loaded.get(fault) or ())):
            raise ConfigError(f"{named}: its weights are not the model's: {len(names)} {fault}, the first {names[0]}")
    return model


def load_generation_config(folder: str | Path):
    """Load a model's own generation settings, of which a run takes the end tokens; None where it has no such file.

    Raises:
        ConfigError: transformers refuses it.
    """
    from transformers import GenerationConfig

    try:
        loaded = GenerationConfig.from_pretrained(folder)
        tokens = loaded.eos_token_id if isinstance(loaded.eos_token_id, list) else [loaded.eos_token_id]
        if not all(token is None or isinstance(token, int) for token in tokens):
            raise ValueError(f"eos_token_id={loaded.eos_token_id!r} is no token id, and no list of such")
        return loaded
    except Exception as error:  # a file may hold anything
        if isinstance(error, OSError) and not (Path(folder) / "generation_config.json").is_file():
            return None
        raise ConfigError(
            f"policy.model={str(folder)!r}: its generation_config.json is refused ({one_line(error)}); correct the file"
        ) from error


def load_processor(folder: str | Path):
    """Load the tokenizer, chat template and image processor that belong to a model; none of its own code is run.

    Raises:
        ConfigError: there is none, or none for images and texts, or no chat template.
    """
    from transformers import AutoProcessor

    named = f"policy.model={str(folder)!r}"
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # no such folder; a folder without processor files; files with any content
        raise ConfigError(f"{named} has no processor: {one_line(error)}") from error
    for part in ("tokenizer", "image_processor", "image_token_id"):
        if getattr(processor, part, None) is None:
            raise ConfigError(f"{named} has no processor for images and texts: a {type(processor).__name__}, no {part}")
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template
    if processor.chat_template is None:
        raise ConfigError(f"{named} has no chat template; put its chat_template.jinja into the folder")
    return processor
