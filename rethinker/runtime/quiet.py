"""Keeps libraries' chatter off the user's screen: messages that name nothing the user could change."""

from __future__ import annotations

import os
import warnings

import torch


def hush() -> None:
    """Call before importing DeepSpeed, vLLM or transformers; what the user has set in the environment stays."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it found no accelerator
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Of torch's collectives under DeepSpeed and vLLM: theirs to follow, not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed.*")
    from transformers.utils import logging

    logging.disable_progress_bar()
