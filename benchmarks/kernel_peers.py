"""The peers of the kernel benchmark, each called as its own documentation says.

They are imported where they are used, so that one that is missing is named and not fatal.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

SEQUENCES = 16
"""Sequences that the rows are of: Liger's loss takes [sequences, length], and one advantage for each."""


def trl_log_softmax(logits: Tensor, index: Tensor):
    from rethinker.runtime.torchvision_cpu import make_importable

    make_importable()
    from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)


def liger_grpo(inputs: dict) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    shape = (SEQUENCES, len(inputs["index"]) // SEQUENCES)
    compiled = inputs["hidden"].is_cuda
    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo", compiled=compiled)
    return loss(
        inputs["hidden"].view(*shape, -1),
        inputs["weight"],
        inputs["index"].view(shape),
        torch.ones(shape, device=inputs["hidden"].device),
        inputs["advantages"].view(shape)[:, 0],
        old_per_token_logps=inputs["old_logps"].view(shape),
    )[0]


def liger_cross_entropy(inputs: dict) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(inputs["weight"], inputs["hidden"], inputs["index"])


def liger_scaled_cross_entropy(hidden: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's CuTe kernels on sm_90, its fallback elsewhere: negative log-probs and entropies."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    return LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, index, 1.0, -100, 1, True)[:2]


def cut_cross_entropy(inputs: dict) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["index"])


def quack_cross_entropy(inputs: dict) -> Tensor:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["index"])


@functools.cache
def _find_verl_kernels() -> None:
    """Make verl's kernels importable without its own __init__, which wants ray and more."""
    verl = importlib.util.find_spec("verl")
    if verl is None:
        raise ImportError("No module named 'verl'")
    folder = Path(verl.origin).parent
    for name, path in (("verl", folder), ("verl.utils", folder / "utils")):
        sys.modules.setdefault(name, types.ModuleType(name)).__path__ = [str(path)]


def verl_log_probs(hidden: Tensor, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    _find_verl_kernels()
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, index, 1.0, "none")
