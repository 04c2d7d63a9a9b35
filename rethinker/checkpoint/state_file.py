"""A tree of numbers, texts and tensors as two files that execute nothing when they are read: JSON and safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_TENSOR = "__tensor__"


def write_state(path: Path, tree: Any) -> None:
    """Write `path`.json and `path`.safetensors.

    Args:
        path: without suffix.
        tree: dicts with text keys, lists, tuples (read back as lists), texts, numbers (NaN and infinities included,
            floats exact), booleans, None and tensors.
    """
    tensors: dict[str, torch.Tensor] = {}
    outline = _outline(tree, "", tensors)
    _with_suffix(path, ".json").write_text(json.dumps(outline), encoding="utf-8")
    save_file(tensors, _with_suffix(path, ".safetensors"))


def read_state(path: Path) -> Any:
    """What `write_state` wrote; tensors are on the host.

    Raises:
        OSError, ValueError: a file is missing or not one of ours.
    """
    outline = json.loads(_with_suffix(path, ".json").read_text(encoding="utf-8"))
    with safe_open(_with_suffix(path, ".safetensors"), framework="pt") as file:
        return _filled(outline, file)


def _outline(node: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(node, torch.Tensor):
        tensors[name] = node.detach().to("cpu", copy=True).contiguous()  # shared memory is refused
        return {_TENSOR: name}
    if isinstance(node, dict):
        assert all(isinstance(key, str) for key in node), f"{name}: JSON keys are texts"
        return {key: _outline(value, f"{name}/{key}", tensors) for key, value in node.items()}
    if isinstance(node, list | tuple):
        if any(isinstance(value, dict | list | tuple | torch.Tensor) for value in node):
            return [_outline(value, f"{name}/{i}", tensors) for i, value in enumerate(node)]
        return list(node)
    return node


def _filled(node: Any, file: Any) -> Any:
    if isinstance(node, dict):
        return file.get_tensor(node[_TENSOR]) if _TENSOR in node else {k: _filled(v, file) for k, v in node.items()}
    return [_filled(value, file) for value in node] if isinstance(node, list) else node


def _with_suffix(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
