"""How weights reach vLLM servers: `nccl` between GPUs, `file` where NCCL cannot reach (CPU). Rank 0 sends to all."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file

from rethinker.model_folder import check_model_folder
from rethinker.rollout.deadline import Deadline
from rethinker.rollout.server.replicas import Replicas

Metadata = list[tuple[str, torch.dtype, tuple[int, ...]]]
Tensors = Iterator[tuple[str, torch.Tensor]]


class FolderWeights:
    """The weights of a model folder, or of a name on the hub, as a WeightStream."""

    def __init__(self, model: str):
        """Raises ConfigError if the weights are damaged or missing."""
        patterns = ["*.json", "*.safetensors"]
        folder = Path(model if Path(model).is_dir() else snapshot_download(model, allow_patterns=patterns))
        check_model_folder(folder, f"policy.model={model}")
        self._files = [safe_open(file, "pt") for file in sorted(folder.glob("*.safetensors"))]

    def metadata(self) -> Metadata:
        """See WeightStream. The files are mapped: nothing is read."""
        return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self]

    def __iter__(self) -> Tensors:
        return ((name, file.get_tensor(name)) for file in self._files for name in file.keys())  # noqa: SIM118


class FileTransfer:
    """Sends weights as a safetensors file through a folder that the servers see."""

    def __init__(self, replicas: Replicas, folder: str | None):
        self._replicas = replicas
        self._folder = tempfile.TemporaryDirectory(prefix="rethinker-weights-", dir=folder)

    def send(self, metadata: Metadata, tensors: Tensors, deadline: Deadline) -> None:
        """Make one whole update. A server that is lost meanwhile is left out.

        Raises:
            ServerError: a server answered with an error, in its own words.
            NoServerLeft: all were lost.
        """
        path = Path(self._folder.name) / "weights.safetensors"
        try:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors}, path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            self._replicas.worker("rethinker_load", deadline, path=str(path), sha256=digest)
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the folder."""
        self._folder.cleanup()


class NCCLTransfer:
    """Sends weights with vLLM's own packed NCCL broadcast. Not yet run on a GPU.

    The group holds rank 0's GPU and every worker of every server. It is made anew when a server was lost.
    This object is also vLLM's client (its VLLMWeightSyncClient protocol), over all servers at once.
    """

    def __init__(self, replicas: Replicas):
        self._replicas = replicas
        self._sizes: dict[str, int] = {}  # workers of each server in the group
        self._trainer: Any = None

    def send(self, metadata: Metadata, tensors: Tensors, deadline: Deadline) -> None:
        """Make one whole update, as `FileTransfer.send`; an error in the middle leaves the group unusable.

        Raises:
            ReplicaLost: a server was lost in the middle.
            ServerError: a server answered with an error, in its own words.
        """
        self._deadline = deadline
        names = [name for name, *_ in metadata]
        self._replicas.worker("rethinker_prepare_update", deadline, names=names)
        source = _source(metadata, tensors)
        if list(self._sizes) != self._replicas.alive:
            self._connect(source)
        self._trainer.source = source
        self._trainer.send_weights()

    def _connect(self, source: Any) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        if self._trainer is not None:
            self._replicas.each("/shutdown_weight_transfer_engine", self._deadline)
            self._trainer.shutdown()
        answers = self._replicas.each("/collective_rpc", self._deadline, {"method": "rethinker_settings"})
        self._sizes = {address: len(answers[address]["results"]) for address in self._replicas.alive}
        local = all(urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1") for address in self._sizes)
        init = NCCLTrainerInitInfo(
            master_address="127.0.0.1" if local else get_ip(),
            master_port=get_open_port(),
            world_size=1 + sum(self._sizes.values()),
            rank=0,
            packed=True,
        )
        self._trainer = WeightTransferTrainerFactory.trainer_init(init, client=self, source=source)

    def close(self) -> None:
        """Leave the group."""
        if self._trainer is not None:
            self._trainer.shutdown()

    def _each(self, path: str, body: Any = None) -> None:
        # A server that leaves now leaves a hole in the group: no going on without it.
        self._replicas.each(path, self._deadline, body, keep_all=True)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every server's workers join the group behind those of the servers before it."""
        offsets, offset = {}, init_info["rank_offset"]
        for address, size in self._sizes.items():
            offsets[address] = offset
            offset += size
        self._each("/init_weight_transfer_engine", lambda a: {"init_info": init_info | {"rank_offset": offsets[a]}})

    def start_weight_update(self) -> None:
        """Open an update."""
        self._each("/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive: returns once the broadcast has ended."""
        self._each("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Close the update."""
        self._each("/finish_weight_update", weight_version and {"weight_version": weight_version})


def _source(metadata: Metadata, tensors: Tensors) -> Any:
    """A stream under way as vLLM's WeightSource, on the GPU."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in metadata]

        def __iter__(self) -> Tensors:
            return ((name, tensor.cuda()) for name, tensor in tensors)

    return Source()
