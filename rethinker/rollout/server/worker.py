"""What a vLLM server that serves a run has besides vLLM: its settings for the trainer to compare, and weights by file.

`rethinker serve` adds it by `--worker-extension-cls`. Weights by file are for servers that NCCL cannot reach, above all
on CPU: the trainer writes them into a folder that both sides see, and sends path and checksum by HTTP.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

from rethinker.rollout import vllm_weights
from rethinker.rollout.vllm_settings import SERVED

if not torch.cuda.is_available():
    from rethinker.rollout import vllm_cpu_ops  # noqa: F401  # registers its classes


class ServerWorker:
    """Methods that vLLM mixes into its worker; the trainer calls them through /collective_rpc. Answers are JSON."""

    # The worker's:
    model_runner: Any
    vllm_config: Any
    weight_transfer_engine: Any

    def rethinker_settings(self) -> dict[str, Any]:
        """What `rethinker serve` started this server with; the trainer compares it with its own settings."""
        return json.loads(os.environ[SERVED])

    def rethinker_prepare_update(self, names: list[str]) -> None:
        """Make ready for an update by NCCL, also after one that was broken off: its trainer was killed.

        Raises:
            RuntimeError: `names` lack one of the model's parameters.
        """
        self._in_model(vllm_weights.prepare_update, names)
        self._weight_update_active = False
        self.weight_transfer_engine.reset_weight_update_target()

    def rethinker_load(self, path: str, sha256: str) -> None:
        """Take over the weights of a safetensors file that this process can read.

        Raises:
            RuntimeError: the file is not here, or is not what the trainer wrote.
        """
        try:
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise RuntimeError(
                f"cannot read {path} ({error.strerror}): rollout.weight_folder must be one that the trainer and this "
                "server both see"
            ) from error
        if digest != sha256:
            raise RuntimeError(f"{path} ({os.path.getsize(path)} bytes) is not what the trainer wrote")
        tensors = load_file(path)
        self._in_model(vllm_weights.load, list(tensors), tensors.items())

    def rethinker_first_difference(self, sent: dict[str, list]) -> dict[str, Any]:
        """First tensor whose checksum differs from the policy's; `sent` maps a name to [sha256, rows]."""
        return {"differs": self._in_model(vllm_weights.first_difference, sent)}

    def _in_model(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model_runner.get_model(), self.vllm_config, *arguments)
