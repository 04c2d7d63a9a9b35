"""Weight sync into a vLLM engine that shares the trainer's process, through vLLM's weight-transfer API.

`send_weights` walks the policy's weight stream and hands buckets of tensors by reference to the worker's side, the
`inprocess` backend registered here; nothing is serialised. Names are those of a Hugging Face checkpoint, so every model
that vLLM loads from a checkpoint also syncs. vLLM has a base class for the trainer's side too: it changed between
0.26 and 0.32, and has nothing to add within one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rethinker.rollout.checksums import Checksum, checksum
from rethinker.rollout.engine import WeightStream

BACKEND = "inprocess"
# Tensors are copied when they leave the stream (it may reuse their memory) and live until their layer is loaded.
BUCKET_BYTES = 256 << 20


@dataclass
class InProcessInitInfo(WeightTransferInitInfo):
    """What the trainer will send in every update: checkpoint names."""

    names: list[str]


@dataclass
class InProcessUpdateInfo(WeightTransferUpdateInfo):
    """One bucket of weights under their checkpoint names."""

    weights: list[tuple[str, torch.Tensor]]


class InProcessWeightTransferEngine(WeightTransferEngine[InProcessInitInfo, InProcessUpdateInfo]):
    """The worker's side: loads checkpoint tensors into the live model, layer by layer, as vLLM's own backends do."""

    init_info_cls = InProcessInitInfo
    update_info_cls = InProcessUpdateInfo
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: InProcessInitInfo) -> None:
        """Compare the names with the model's parameters, before anything is touched.

        Raises:
            RuntimeError: a parameter, or a part of a fused one, would get no value.
        """
        if missing := without_value(self.model, set(init_info.names)):
            raise RuntimeError(
                f"weight sync: the policy has no value for {len(missing)} of vLLM's parameters, the first {missing[0]}"
            )

    def start_weight_update(self) -> None:
        """Put the model into loading state."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket. Unlike the base class this waits for no device: the tensors are on the model's stream."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: InProcessUpdateInfo) -> None:
        """Hand the bucket to the model's own checkpoint loader, which fuses and shards."""
        self.model.load_weights(update_info.weights)

    def finish_weight_update(self) -> None:
        """Put the new weights in place."""
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Nothing is held."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Abstract in vLLM 0.26, and called by nobody here; see `send_weights`."""
        raise NotImplementedError


def send_weights(client: InProcessClient, source: WeightSource) -> None:
    """Send every tensor of the source in one update. Collective over the trainer's ranks, as iterating the source is.

    Raises:
        RuntimeError: the source ended before everything that its metadata announced.
    """
    lost = {meta.name for meta in source.metadata()}
    client.start_weight_update()
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in source:
        bucket.append((name, tensor.detach().clone()))
        lost.discard(name)
        size += tensor.nbytes
        if size >= BUCKET_BYTES:
            client.update_weights({"weights": bucket})
            bucket, size = [], 0
    if bucket:
        client.update_weights({"weights": bucket})
    client.finish_weight_update()
    if lost:
        raise RuntimeError(f"weight sync: {len(lost)} announced tensors did not come, the first {min(lost)}")


def register() -> None:
    """Make the `inprocess` backend known to vLLM; once per process is enough, more does no harm."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, InProcessWeightTransferEngine)


class InProcessClient:
    """vLLM's weight-sync control plane over an LLMEngine in this process."""

    def __init__(self, engine: Any):
        self._engine = engine

    def announce(self, source: WeightSource) -> None:
        """Tell the worker's side what will come; see `InProcessWeightTransferEngine.init_transfer_engine`."""
        names = [meta.name for meta in source.metadata()]
        self._engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": {"names": names}})

    def start_weight_update(self) -> None:
        """Open an update."""
        self._engine.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket."""
        self._engine.collective_rpc("update_weights", kwargs={"update_info": update_info})

    def finish_weight_update(self) -> None:
        """Close the update."""
        self._engine.collective_rpc("finish_weight_update")


class StreamSource(WeightSource):
    """A WeightStream as vLLM's WeightSource, watched while it is walked.

    Args:
        stream: the policy's weights.
        on_tensor: called with every name and tensor before it is sent (deadline, checksum).
    """

    def __init__(self, stream: WeightStream, on_tensor: Callable[[str, torch.Tensor], None]):
        self._stream = stream
        self._on_tensor = on_tensor

    def metadata(self) -> list[ParamMeta]:
        """Name, type and full shape of every tensor."""
        return [ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in self._stream.metadata()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._stream:
            self._on_tensor(name, tensor)
            yield name, tensor


def first_difference(model: nn.Module, sent: dict[str, Checksum], dtype: torch.dtype) -> str | None:
    """Compare the weights a vLLM model computes with against the policy's checksums.

    Reads what the model really multiplies with: on CPU the packed copy behind a linear layer, not a parameter that
    was left behind. Needs unsharded weights (tensor_parallel_size 1).

    Args:
        model: vLLM's model.
        sent: `checksum(tensor, dtype)` of every policy tensor, by checkpoint name.
        dtype: the engine's type.

    Returns:
        The first name whose tensors differ, or None.
    """
    for name, expected in sent.items():
        for live in _live_tensors(model, name):
            # vLLM pads the vocabulary: rows beyond the checkpoint's are never read.
            if checksum(live[: expected.rows], dtype) != expected:
                return name
    return None


def end_broken_update(model: nn.Module, model_config: Any) -> None:
    """Take a model out of the loading state in which a broken update left it; it needs a whole update then."""
    if any(get_layerwise_info(layer).can_load() for layer in model.modules()):
        finalize_layerwise_reload(model, model_config)
        _repack_tied_heads(model)


def without_value(model: nn.Module, names: set[str]) -> list[str]:
    """The model's parameters, or parts of fused ones, that no checkpoint name in `names` fills."""
    mapped = set(model.hf_to_vllm_mapper.apply_list(list(names)))
    fused_parts = _fused_parts(model)
    missing = []
    for name, _ in model.named_parameters():
        if name in mapped:
            continue
        parent, layer, leaf = name.rsplit(".", 2)
        parts = [f"{parent}.{part}.{leaf}" for part in fused_parts.get(layer, [layer])]
        missing += [part for part in parts if part not in mapped]
    return missing


def _fused_parts(model: nn.Module) -> dict[str, list[str]]:
    """Names of fused layers and of their parts in a checkpoint; some models leave them to their language model."""
    mappings = (getattr(module, "packed_modules_mapping", None) or {} for module in model.modules())
    return {fused: parts for mapping in mappings for fused, parts in mapping.items()}


def _live_tensors(model: nn.Module, name: str) -> Iterator[torch.Tensor]:
    """What the engine holds of one checkpoint tensor: usually one tensor, two where a tied head has a packed copy."""
    (mapped,) = model.hf_to_vllm_mapper.apply_list([name])
    path, leaf = mapped.rsplit(".", 1)
    parent_path, child = path.rsplit(".", 1)
    parent = model.get_submodule(parent_path)
    if hasattr(parent, child):
        layer = getattr(parent, child)
        yield _unpacked(layer, leaf)
        yield from (_unpacked(head, leaf, packed_first=True) for head in _tied_heads(model, layer))
        return
    fused, part = next(
        (fused, parts.index(child))
        for fused, parts in _fused_parts(model).items()
        if child in parts and hasattr(parent, fused)
    )
    layer = getattr(parent, fused)  # q, k and v, or gate and up, stacked along the rows
    start = sum(layer.output_sizes[:part])
    yield _unpacked(layer, leaf)[start : start + layer.output_sizes[part]]


def _unpacked(layer: nn.Module, leaf: str, packed_first: bool = False) -> torch.Tensor:
    """A layer's parameter; where vLLM's CPU kernels packed the weight, the packed one, read by multiplying with 1."""
    tensor = getattr(layer, leaf)
    if leaf != "weight" or not hasattr(layer, "cpu_linear") or (tensor.numel() and not packed_first):
        return tensor.data
    width = tensor.shape[1] if tensor.numel() else layer.input_size_per_partition
    return layer.cpu_linear(torch.eye(width, dtype=tensor.dtype), tensor, None).T


def _tied_heads(model: nn.Module, embedding: nn.Module) -> list[nn.Module]:
    """The heads that share an embedding's weight but are modules of their own."""
    if not isinstance(embedding, VocabParallelEmbedding):
        return []
    return [
        m
        for m in model.modules()
        if isinstance(m, ParallelLMHead) and m is not embedding and m.weight is embedding.weight
    ]


def _repack_tied_heads(model: nn.Module) -> None:
    """Pack tied heads' weights again: the reload packs the embedding's, and a head keeps the old copy (CPU)."""
    for embedding in model.modules():
        for head in _tied_heads(model, embedding):
            head.quant_method.process_weights_after_loading(head)
