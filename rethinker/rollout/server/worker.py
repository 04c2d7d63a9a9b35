"""What a vLLM server that serves a run has besides vLLM: weights by file, and answers to the trainer's questions.

`--worker-extension-cls rethinker.rollout.server.worker.ServerWorker` brings it in; `rethinker serve` sets that. The
`file` weight transfer is for servers that NCCL cannot reach, above all on CPU: the trainer writes buckets of tensors as
safetensors files into a folder that both sides see, and sends their paths and checksums by HTTP.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.weight_transfer.base import WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from rethinker.rollout.checksums import Checksum
from rethinker.rollout.vllm_settings import outline
from rethinker.rollout.weight_sync import InProcessWeightTransferEngine, end_broken_update, first_difference

BACKEND = "file"


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """One bucket of weights: a safetensors file that this process can read, and the SHA-256 of its bytes."""

    path: str
    sha256: str


class FileWeightTransferEngine(InProcessWeightTransferEngine):
    """Loads checkpoint tensors from files into the live model; each worker of a server takes its part."""

    update_info_cls = FileUpdateInfo

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        """Load one bucket.

        Raises:
            RuntimeError: the file is not here, or is not what the trainer wrote.
        """
        try:
            content = Path(update_info.path).read_bytes()
        except OSError as error:
            raise RuntimeError(
                f"cannot read {update_info.path} ({error.strerror}): rollout.weight_folder must be one that the "
                "trainer and this server both see"
            ) from error
        if hashlib.sha256(content).hexdigest() != update_info.sha256:
            raise RuntimeError(f"{update_info.path} ({len(content)} bytes) is not what the trainer wrote")
        self.model.load_weights(list(safetensors.torch.load(content).items()))


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, FileWeightTransferEngine)


class ServerWorker:
    """Methods that vLLM mixes into its worker; the trainer calls them through /collective_rpc. Answers are JSON."""

    # The worker's:
    model_runner: Any
    model_config: Any
    vllm_config: Any
    weight_transfer_engine: Any

    def rethinker_outline(self) -> dict[str, Any]:
        """The numbers that shape the served model."""
        return outline(self.model_config.hf_config)

    def rethinker_end_broken_update(self) -> None:
        """Make ready for a weight update after one that broke off: its trainer was killed, or a file was not whole."""
        self._weight_update_active = False
        self.weight_transfer_engine.reset_weight_update_target()
        with set_current_vllm_config(self.vllm_config):
            end_broken_update(self.model_runner.get_model(), self.model_config)

    def rethinker_first_difference(self, sent: dict[str, list], dtype: str) -> dict[str, Any]:
        """First tensor whose checksum differs from the policy's; `sent` maps a name to [sha256, rows]."""
        expected = {name: Checksum(*value) for name, value in sent.items()}
        return {"differs": first_difference(self.model_runner.get_model(), expected, getattr(torch, dtype))}
