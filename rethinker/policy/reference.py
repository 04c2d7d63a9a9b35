"""A reference policy that moves (algorithm.reference_every): it takes the policy's weights, and is in checkpoints.

ZeRO-3 cuts both policies into the same pieces, so each rank copies its own, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from safetensors.torch import save_file
from torch import nn

from rethinker.policy.optimizer_state import parts_of, repartitioned


class MovingReference:
    """The reference policy's own copy of what is trained, in this rank's pieces."""

    def __init__(self, pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]], rank: int) -> None:
        """
        Args:
            pairs: by name, what is trained and the reference's copy of it, which is frozen; both partitioned by ZeRO-3.
        """
        self._pairs, self._rank = pairs, rank

    def move(self) -> None:
        """Take the policy's weights as they are now."""
        for trained, kept in self._pairs.values():
            _fill(kept, trained.ds_tensor)

    def bytes(self) -> int:
        """What the copy takes in a checkpoint, over all ranks."""
        return sum(kept.ds_tensor.dtype.itemsize * kept.ds_numel for _, kept in self._pairs.values())

    def snapshot(self) -> Callable[[Path], None]:
        """This rank's pieces as they are now; what comes back writes them into a folder."""
        state = {name: kept.ds_tensor.to("cpu", copy=True) for name, (_, kept) in self._pairs.items()}

        def write(folder: Path) -> None:
            save_file(state, folder / f"reference_{self._rank:05d}.safetensors")

        return write

    def load(self, folder: Path) -> None:
        """Go on with what any number of ranks wrote into a folder; without such files, from the first reference."""
        with parts_of(folder, "reference") as files:
            for name, (_, kept) in self._pairs.items() if files else ():
                parts = [file.get_slice(name) for file in files]
                _fill(kept, repartitioned(parts, kept.ds_numel, kept.ds_tensor.numel(), self._rank))


def _fill(parameter: nn.Parameter, piece: torch.Tensor) -> None:
    parameter.ds_tensor.copy_(piece)
    if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # ZeRO-3 keeps small ones whole: they are gathered again
        parameter.partition()
