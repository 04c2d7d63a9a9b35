"""torch.compile of the decoder layers (policy.compile): one graph for all layers, inside ZeRO-3's hooks.

ZeRO-3 gathers a module's weights in a hook before its forward and frees them in one after it. Hooks inside a compiled
function would cut it at every linear layer, so ZeRO-3 gathers a decoder layer as a whole, and the layer's `forward`,
which stands inside its own hooks, is what is compiled. The layers share their class's code, so one compilation serves
them all.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def compile_layers(model: nn.Module, backend: str = "inductor") -> None:
    """Compile the forwards of a language model's decoder layers in place, for any number of tokens.

    There is one graph for batches laid out in one row and one for several, each with and without gradients: four at
    most, whatever the shapes.

    Args:
        model: with `model.language_model.layers`, not yet under DeepSpeed.
        backend: of torch.compile.
    """
    from deepspeed.utils import set_z3_leaf_modules  # takes seconds to import, and few runs compile

    layers = model.model.language_model.layers
    set_z3_leaf_modules(model, list({type(layer) for layer in layers}))
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=backend)


def apart(attention: str) -> str:
    """A name for transformers' attention function `attention` as one that compiled layers call and do not contain:
    it launches kernels of its own."""
    name = f"{attention}_apart"
    ALL_ATTENTION_FUNCTIONS.register(name, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[attention]))
    return name
