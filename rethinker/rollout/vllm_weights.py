"""The worker's half of a weight sync: loads checkpoint tensors into vLLM's live model, and compares them.

It runs in the trainer's process (vllm_engine.py) or in a server's (server/worker.py).

Loading is vLLM's own layerwise reload, by names of a Hugging Face checkpoint, so every model that vLLM loads from a
checkpoint also syncs. Nothing of vLLM is patched. The experts of a layer come as transformers holds them: all in one
tensor [experts, outputs, inputs], `gate_up_proj` with gate above up, and `down_proj`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
from vllm.model_executor.models.utils import StageMissingLayer

from rethinker.families import Family, family_of
from rethinker.rollout.engine import Checksum, checksum

_EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}  # by transformers' names vLLM's


def prepare_update(model: nn.Module, vllm_config: Any, names: list[str]) -> None:
    """End an update that was broken off, and compare a checkpoint's names with the model's parameters.

    Raises:
        RuntimeError: a parameter, or a part of a fused one, would get no value; the weights have not been touched.
    """
    if any(get_layerwise_info(layer).can_load() for layer in model.modules()):
        _finish(model, vllm_config)
    served = _family(vllm_config).served
    mapped, fused_parts, missing = {_mapped(model, served(name)) for name in names}, _fused_parts(model), []
    experts = {ours: part for part, ours in _EXPERTS.items()}
    for name in dict(model.named_parameters()).keys() - mapped:
        parent, layer, leaf = f".{name}".rsplit(".", 2)
        own = fused_parts.get(f"{parent}.{layer}"[1:]) or fused_parts.get(layer, [layer])
        parts = {f"{parent}.{part}.{leaf}"[1:] for part in own}
        missing += {f"{parent}.{experts[leaf]}"[1:]} - mapped if layer == "routed_experts" else parts - mapped
    if missing:
        raise RuntimeError(
            f"weight sync: the policy has no value for {len(missing)} of vLLM's parameters, the first {min(missing)}"
        )
    for layer in _experts(model):
        layer.is_fused_checkpoint_transposed = False  # as in files of some models
        if layer.quant_method.unquantized_backend is UnquantizedMoeBackend.CPU:
            layer.quant_method.moe_kernel = None  # what exists is not asked to pack new weights; a new one packs


def load(model: nn.Module, vllm_config: Any, names: list[str], weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Replace the model's weights by a checkpoint's, layer by layer: its own loader fuses and shards them.

    Args:
        names: of all tensors of the checkpoint.
        weights: these tensors; each lives until its layer is whole.

    Raises:
        RuntimeError: a parameter or a part of one would get no value, or a tensor of `names` did not come.
    """
    prepare_update(model, vllm_config, names)
    lost, served = set(names), _family(vllm_config).served

    def arriving() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            lost.discard(name)
            yield served(name), tensor

    with set_current_vllm_config(vllm_config):
        initialize_layerwise_reload(model)
        model.load_weights(arriving())
    _finish(model, vllm_config)
    if lost:  # vLLM fills what a fused layer lacks with whatever is in memory
        raise RuntimeError(f"weight sync: {len(lost)} announced tensors did not come, the first {min(lost)}")


def _family(vllm_config: Any) -> Family:
    return family_of(vllm_config.model_config.hf_config.model_type)


def _finish(model: nn.Module, vllm_config: Any) -> None:
    """Put the new weights in place. On a CPU a tied head keeps an old packed copy, which is packed again."""
    with set_current_vllm_config(vllm_config):
        finalize_layerwise_reload(model, vllm_config.model_config)
        _repack_tied_heads(model)


def first_difference(model: nn.Module, vllm_config: Any, sent: dict[str, Checksum]) -> str | None:
    """The first of the policy's tensors, by checkpoint name, that differs from what a vLLM model computes with.

    Reads what the model really multiplies with: on CPU the packed copy behind a linear layer, not a parameter that
    was left behind. Needs unsharded weights (tensor_parallel_size 1), and checksums in the model's type.
    """
    served = _family(vllm_config).served
    sent = {served(name): tensor for name, tensor in sent.items()}
    for name, (digest, rows) in sent.items():
        for live in _live_tensors(model, name, sent):
            # vLLM pads the vocabulary: rows beyond the checkpoint's are never read.
            if checksum(torch.atleast_1d(live)[:rows], vllm_config.model_config.dtype) != (digest, rows):
                return name
    return None


def _mapped(model: nn.Module, name: str) -> str:
    """vLLM's name of a checkpoint's parameter, before it is fused with others; parts of a model rename their own."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    name = mapper.apply_list([name])[0] if mapper else name
    part, _, rest = name.partition(".")
    inner = getattr(getattr(model, part, None), "hf_to_vllm_mapper", None)
    return f"{part}.{replace(inner, orig_to_new_stacked={}).apply_list([rest])[0]}" if inner else name


def _fused_parts(model: nn.Module) -> dict[str, list[str]]:
    """Names of fused layers and of their parts in a checkpoint; some models leave them to their language model, some
    name them only to their loader. A layer that a loader names by its whole path, as its parts may differ from those of
    others (Gemma 4's keys may be its values, too), is here by its path."""
    fused: dict[str, list[str]] = {}
    paths = dict(model.named_modules())
    for path, module in paths.items():
        stacked = getattr(getattr(module, "hf_to_vllm_mapper", None), "orig_to_new_stacked", {})
        for part, (layer, _) in stacked.items():  # ".mlp.up_proj" to ".mlp.gate_up_proj"
            whole = f"{path}.{layer}".strip(".")
            parts = fused.setdefault(whole if whole in paths else layer.strip(".").rpartition(".")[2], [])
            parts += {part.strip(".").rpartition(".")[2]} - set(parts)
    mappings = (getattr(module, "packed_modules_mapping", None) or {} for module in model.modules())
    return fused | {layer: parts for mapping in mappings for layer, parts in mapping.items()}


def _live_tensors(model: nn.Module, name: str, sent: dict[str, Checksum]) -> Iterator[torch.Tensor]:
    """What the engine holds of one checkpoint tensor: usually one tensor, two where a tied head has a packed copy, none
    where it leaves out a tower.

    Of a part of a fused layer, the rows behind those of the parts before it, which were `sent` too; the last part may
    be there more than once."""
    path, _, leaf = _mapped(model, name).rpartition(".")
    if not path:  # the model's own
        yield getattr(model, leaf).data
        return
    if isinstance(getattr(model, path.partition(".")[0]), StageMissingLayer):
        return
    parent_path, _, child = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if leaf in _EXPERTS:
        yield _expert_weights(getattr(parent, child).routed_experts, _EXPERTS[leaf])
        return
    if hasattr(parent, child):
        layer = getattr(parent, child)
        if layer is None:  # what vLLM never computes with, such as a norm behind the features that are read
            return
        yield _unpacked(layer, leaf)
        yield from (_unpacked(head, leaf, packed_first=True) for head in _tied_heads(model, layer))
        return
    fused_parts = _fused_parts(model)
    fused, parts = next(
        (fused, fused_parts.get(f"{parent_path}.{fused}", parts))
        for fused, parts in fused_parts.items()
        if child in parts and hasattr(parent, fused)
    )
    prefix = name.removesuffix(f"{child}.{leaf}")
    start = sum(sent[f"{prefix}{part}.{leaf}"][1] for part in parts[: parts.index(child)])
    whole, rows = _unpacked(getattr(parent, fused), leaf), sent[name][1]
    for at in range(start, len(whole) if child == parts[-1] else start + 1, rows):
        yield whole[at : at + rows]


def _unpacked(layer: nn.Module, leaf: str, packed_first: bool = False) -> torch.Tensor:
    """A layer's parameter; where vLLM's CPU kernels packed the weight, the packed one, read by multiplying with 1."""
    tensor = getattr(layer, leaf)
    if leaf == "weight" and hasattr(layer, "_cpu_unpacked_conv_weight"):
        return convolution_weight(layer)
    if leaf != "weight" or not hasattr(layer, "cpu_linear") or (tensor.numel() and not packed_first):
        return tensor.data
    width = tensor.shape[1] if tensor.numel() else getattr(layer, "input_size_per_partition", layer.input_size)
    return layer.cpu_linear(torch.eye(width, dtype=tensor.dtype), tensor, None).T


def convolution_weight(layer: nn.Module) -> torch.Tensor:
    """The weight [C, 1, W] of a convolution, of which vLLM keeps a packed one in its place and this beside it, in
    bfloat16 where the CPU has instructions for that."""
    plain = getattr(layer, "_cpu_unpacked_conv_weight", None)
    return layer.weight if plain is None else plain[:, None]


def _experts(model: nn.Module) -> list[RoutedExperts]:
    return [module for module in model.modules() if isinstance(module, RoutedExperts)]


def _expert_weights(layer: RoutedExperts, name: str) -> torch.Tensor:
    """Weights of a layer's experts [experts, outputs, inputs], as they were before vLLM's CPU kernel packed them."""
    weight, method = getattr(layer, name).data, layer.quant_method
    if method.unquantized_backend is UnquantizedMoeBackend.TRITON:
        return weight
    if method.unquantized_backend is not UnquantizedMoeBackend.CPU:
        raise RuntimeError(
            f"rollout.check_sync cannot read experts as vLLM's {method.unquantized_backend.value} kernel holds them; "
            "set it to false"
        )
    # Packing moves numbers within an expert. Where to, is seen by packing their places, a byte at a time: every type
    # holds 0 to 255.
    isa, place = method.moe_kernel.fused_experts.isa, torch.arange(weight[0].numel()).view(1, *weight.shape[1:])
    moved = sum(cpu_prepack_moe_weight((place >> 8 * i & 255).to(weight.dtype), isa).long() << 8 * i for i in range(4))
    return torch.empty_like(weight).flatten(1).index_copy_(1, moved.flatten(), weight.flatten(1)).view_as(weight)


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
