"""torch.compile of the decoder layers (policy.compile): one graph for all layers, inside ZeRO-3's hooks.

ZeRO-3 gathers a module's weights in a hook before its forward and frees them in one after it. Hooks inside a compiled
function would cut it at every linear layer, so a decoder layer is gathered as a whole (`gather_whole_layers` in
zero3.py) and its `forward`, which stands inside its own hooks, is what is compiled. The layers share their class's
code, so one compilation serves them all.
"""

from __future__ import annotations

import torch
from torch import nn


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the forwards of a language model's decoder layers in place, for any number of tokens.

    There is one graph for batches laid out in one row and one for several, each with and without gradients: four at
    most, whatever the shapes.

    Args:
        model: with `model.language_model.layers`.
        backend: of torch.compile.
    """
    for layer in model.model.language_model.layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def apart(attention: str) -> str:
    """A name for transformers' attention function `attention` as one that compiled layers call and do not contain:
    it launches kernels of its own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"{attention}_apart"
    ALL_ATTENTION_FUNCTIONS.register(name, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[attention]))
    return name
