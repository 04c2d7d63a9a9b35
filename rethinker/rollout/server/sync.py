"""Weight transfer to vLLM servers: `nccl` between GPUs, `file` where NCCL cannot reach (CPU).

Rank 0 sends to all servers at once; the other ranks only walk the weight stream, which is a collective.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import safetensors
import safetensors.torch
import torch

from rethinker.config import ConfigError
from rethinker.rollout.deadline import Deadline
from rethinker.rollout.engine import WeightStream
from rethinker.rollout.server.replicas import Replicas

BUCKET_BYTES = 256 << 20  # of tensors in one file: on disk and, while it is loaded, in the server's memory
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
Watch = Callable[[str, torch.Tensor], None]


class Checkpoint:
    """A model folder's weights as a WeightStream on `device`: what the servers begin with."""

    def __init__(self, model_dir: str, device: str):
        self._device = device
        folder = Path(model_dir)
        if not folder.is_dir():
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(model_dir, allow_patterns=["*.safetensors"]))
        self._files = sorted(folder.glob("*.safetensors"))
        if not self._files:
            raise ConfigError(f"policy.model={model_dir} holds no .safetensors file")

    def metadata(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """See WeightStream."""
        found = []
        for file in self._files:
            with safetensors.safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    part = tensors.get_slice(name)
                    found.append((name, _DTYPES[part.get_dtype()], tuple(part.get_shape())))
        return found

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for file in self._files:
            with safetensors.safe_open(file, framework="pt", device=self._device) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (no mapping)
                    yield name, tensors.get_tensor(name)


class FileTransfer:
    """Sends weights as safetensors files through a folder that the servers see, one bucket at a time."""

    device = "cpu"

    def __init__(self, replicas: Replicas, folder: str | None, is_sender: bool):
        self._replicas = replicas
        self._folder = Path(tempfile.mkdtemp(prefix="rethinker-weights-", dir=folder)) if is_sender else None

    def send(self, weights: WeightStream, deadline: Deadline, watch: Watch) -> None:
        """One whole update. Collective: every rank walks the stream to its end, whatever happens to the transfer.

        Raises:
            ServerError: a server refused, in its own words.
            NoServerLeft: all were lost.
            RuntimeError: a tensor that the metadata announced did not come.
        """
        stream = iter(weights)
        try:
            if self._folder is not None:
                self._send([name for name, *_ in weights.metadata()], stream, deadline, watch)
        finally:
            for name, tensor in stream:  # the other ranks wait in these collectives
                watch(name, tensor)

    def _send(
        self, names: list[str], stream: Iterator[tuple[str, torch.Tensor]], deadline: Deadline, watch: Watch
    ) -> None:
        def each(path: str, body: Any = None) -> None:
            self._replicas.run(self._replicas.each(path, body), deadline)

        each("/init_weight_transfer_engine", {"init_info": {"names": names}})
        each("/start_weight_update")
        bucket: dict[str, torch.Tensor] = {}
        size, lost = 0, set(names)
        for name, tensor in stream:
            watch(name, tensor)
            bucket[name] = tensor.detach().to("cpu", copy=True).contiguous()  # the stream may reuse its memory
            lost.discard(name)
            size += bucket[name].nbytes
            if size >= BUCKET_BYTES:
                self._hand_over(bucket, each)
                bucket, size = {}, 0
        if bucket:
            self._hand_over(bucket, each)
        each("/finish_weight_update")
        if lost:
            raise RuntimeError(f"weight sync: {len(lost)} announced tensors did not come, the first {min(lost)}")

    def _hand_over(self, bucket: dict[str, torch.Tensor], each: Callable[[str, Any], None]) -> None:
        content = safetensors.torch.save(bucket)
        file = self._folder / "bucket.safetensors"
        file.write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        try:
            each("/update_weights", {"update_info": {"path": str(file), "sha256": digest}})
        finally:
            file.unlink()

    def close(self) -> None:
        """Remove the folder."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class NCCLTransfer:
    """Sends weights with vLLM's own packed NCCL broadcast. Not yet run on a GPU.

    The group holds rank 0's GPU and every worker of every server. It is made anew when a server was lost.
    """

    def __init__(self, replicas: Replicas, rank: int):
        self._replicas = replicas
        self._rank = rank
        self.device = f"cuda:{torch.cuda.current_device()}"  # NCCL sends from there
        self._members: list[str] = []
        self._trainer: Any = None

    def send(self, weights: WeightStream, deadline: Deadline, watch: Watch) -> None:
        """One whole update. Collective, as `FileTransfer.send`; an error in the middle leaves the group unusable.

        Raises:
            ReplicaLost: a server was lost in the middle.
            ServerError: a server refused, in its own words.
        """
        from rethinker.rollout.weight_sync import StreamSource

        source = StreamSource(weights, watch)
        if self._rank != 0:
            for _ in source:
                pass
            return
        if self._members != self._replicas.alive:
            self._connect(source, deadline)
        self._trainer.client.deadline = deadline
        self._trainer.source = source
        self._trainer.send_weights()

    def _connect(self, source: Any, deadline: Deadline) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        replicas = self._replicas
        if self._trainer is not None:
            replicas.run(replicas.each("/shutdown_weight_transfer_engine"), deadline)
            self._trainer.shutdown()
        sizes = replicas.run(replicas.each("/get_world_size", get=True), deadline)
        self._members = list(replicas.alive)
        client = _NCCLClient(replicas, [(a, sizes[a]["world_size"]) for a in self._members], deadline)
        local = all(urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1") for address in self._members)
        init = NCCLTrainerInitInfo(
            master_address="127.0.0.1" if local else get_ip(),
            master_port=get_open_port(),
            world_size=1 + sum(size for _, size in client.sizes),
            rank=0,
            packed=True,
        )
        self._trainer = WeightTransferTrainerFactory.trainer_init(init, client=client, source=source)

    def close(self) -> None:
        """Leave the group."""
        if self._trainer is not None:
            self._trainer.shutdown()


class _NCCLClient:
    """vLLM's weight-sync control plane (its VLLMWeightSyncClient protocol) over several servers."""

    def __init__(self, replicas: Replicas, sizes: list[tuple[str, int]], deadline: Deadline):
        self.sizes = sizes
        self.deadline = deadline
        self._replicas = replicas

    def _each(self, path: str, body: Any = None) -> None:
        # A server that leaves now leaves a hole in the group: no going on without it.
        self._replicas.run(self._replicas.each(path, body, keep_all=True), self.deadline)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Every server's workers join the group behind those of the servers before it."""
        offsets, offset = {}, init_info["rank_offset"]
        for address, size in self.sizes:
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
