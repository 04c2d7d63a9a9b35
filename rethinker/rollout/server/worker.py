"""What a vLLM server that serves a run has besides vLLM: its settings for the trainer to compare, and weights by file.

`rethinker serve` adds it by `--worker-extension-cls`. Weights by file are for servers that NCCL cannot reach, above all
on CPU: the trainer writes buckets of tensors as safetensors files into a folder that both sides see, and sends their
paths and checksums by HTTP.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch

from rethinker.rollout import vllm_weights
from rethinker.rollout.vllm_settings import model_shape


class ServerWorker:
    """Methods that vLLM mixes into its worker; the trainer calls them through /collective_rpc. Answers are JSON."""

    # The worker's:
    model_runner: Any
    model_config: Any
    vllm_config: Any
    weight_transfer_engine: Any

    def rethinker_settings(self) -> dict[str, Any]:
        """What decides the samples, by the names of the run's settings; the trainer compares it with its own."""
        images, transfer = self.model_config.multimodal_config, self.vllm_config.weight_transfer_config
        return {
            "policy.dtype": str(self.model_config.dtype).removeprefix("torch."),
            "data.min_pixels, data.max_pixels": images.mm_processor_kwargs,
            "data.max_images": images.get_limit_per_prompt("image"),
            "data.max_prompt_tokens + rollout.max_new_tokens": self.model_config.max_model_len,
            "vLLM's logprobs_mode": self.model_config.logprobs_mode,
            "vLLM's weight transfer": "file" if transfer is None else transfer.backend,
        } | model_shape(self.model_config.hf_config)

    def rethinker_prepare_update(self, names: list[str]) -> None:
        """Make ready for a weight update, also after one that broke off: its trainer was killed, or a file was damaged.

        Raises:
            RuntimeError: `names` lack one of the model's parameters.
        """
        self._in_model(vllm_weights.prepare_update, names)
        self._weight_update_active = False
        if self.vllm_config.weight_transfer_config is None:
            self._in_model(vllm_weights.start_update)
        else:
            self.weight_transfer_engine.reset_weight_update_target()

    def rethinker_load(self, path: str, sha256: str) -> None:
        """Load one bucket: a safetensors file that this process can read, and the SHA-256 of its bytes.

        Raises:
            RuntimeError: the file is not here, or is not what the trainer wrote.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise RuntimeError(
                f"cannot read {path} ({error.strerror}): rollout.weight_folder must be one that the trainer and this "
                "server both see"
            ) from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise RuntimeError(f"{path} ({len(content)} bytes) is not what the trainer wrote")
        self._in_model(vllm_weights.load, list(safetensors.torch.load(content).items()))

    def rethinker_finish_update(self) -> None:
        """Put the new weights in place."""
        self._in_model(vllm_weights.finish_update)

    def rethinker_first_difference(self, sent: dict[str, list]) -> dict[str, Any]:
        """First tensor whose checksum differs from the policy's; `sent` maps a name to [sha256, rows]."""
        return {"differs": self._in_model(vllm_weights.first_difference, sent)}

    def _in_model(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.model_runner.get_model(), self.vllm_config, *arguments)
