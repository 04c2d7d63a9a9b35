"""A tree of plain values and tensors as two files that execute nothing when they are read: JSON and safetensors."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rethinker.samples import Completion, Query, RemoteCompletion

_TENSOR = "__tensor__"


def frozen(tree: Any) -> Callable[[Path], None]:
    """Copy a tree as it is now; what this returns writes `path`.json and `path`.safetensors, for a path without suffix.

    Args:
        tree: dicts with text keys, lists, tuples (read back as lists), texts, numbers (NaN and infinities included,
            floats exact), booleans, None, tensors, and dataclasses (read back as dicts). Of a query only the id is
            kept, and of a response its two lengths and whether it is supervised; see held_samples.py.
    """
    tensors: dict[str, torch.Tensor] = {}

    def plain(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = node.detach().to("cpu", copy=True).contiguous()  # safetensors takes no shared memory
            return {_TENSOR: name}
        if isinstance(node, Query):
            return node.id
        if isinstance(node, Completion | RemoteCompletion):
            return [node.tokens, node.trainable_tokens, node.supervised]
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}

    text = json.dumps(tree, default=plain)

    def write(path: Path) -> None:
        path.with_name(f"{path.name}.json").write_text(text, encoding="utf-8")
        save_file(tensors, path.with_name(f"{path.name}.safetensors"))

    return write


def read_state(path: Path) -> Any:
    """What `frozen` wrote; tensors are on the host.

    Raises:
        OSError, ValueError: a file is missing or not one of ours.
    """
    with safe_open(path.with_name(f"{path.name}.safetensors"), framework="pt") as file:
        return json.loads(
            path.with_name(f"{path.name}.json").read_text(encoding="utf-8"),
            object_hook=lambda node: file.get_tensor(node[_TENSOR]) if _TENSOR in node else node,
        )
