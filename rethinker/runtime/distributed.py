"""The ranks of a run: who am I, and the few collectives on Python objects that the loop needs."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.distributed.rendezvous import rendezvous


@dataclass(frozen=True)
class Ranks:
    """This process's place in the run. Without torchrun there is one rank."""

    rank: int
    world_size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank. Values are pickled, so keep pixels out of them."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is true on some rank."""
        return any(self.gather(value))

    def gather_to_main(self, value: Any) -> list[Any] | None:
        """Every rank's value, in rank order, on rank 0; None on the others."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values


ALONE = Ranks(0, 1, 0)
"""A process that works by itself."""


def start(timeout_s: float) -> Ranks:
    """Join the process group that torchrun describes (gloo on CPU, NCCL on CUDA); alone, form one of a single rank.
    `timeout_s` is the deadline of every collective, so that a lost rank ends the run instead of hanging it."""
    if "RANK" not in os.environ:
        port = str(get_free_port())
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks = Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ.get("LOCAL_RANK", 0)))
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s), **_meeting_point())
    return ranks


def _meeting_point() -> dict[str, Any]:
    """Where the ranks exchange addresses, if not simply where torchrun says.

    torchrun keeps its store when it starts the ranks again (--max-restarts): a fast rank would read the addresses of
    the dead ones there. On one node all ranks know the restart's number and keep apart by it. Over several nodes they
    may not; there TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives every start a store of its own.
    """
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restart == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return {}
    store, rank, world_size = next(rendezvous("env://"))
    return {"store": dist.PrefixStore(f"restart_{restart}", store), "rank": rank, "world_size": world_size}


def stop() -> None:
    """Leave the process group. DeepSpeed, where it was used, is to forget it too: the process may train once more."""
    if dist.is_initialized():  # the end of a vLLM engine destroys it
        dist.destroy_process_group()
    if groups := sys.modules.get("deepspeed.utils.groups"):
        groups._release_process_group_references()
