"""What follows when a micro-batch does not fit into memory: a smaller budget, and ZeRO-3 as it was before the step.

One rank repeats the step. Several cannot: where one fails, the others wait in an all-gather that it will never reach,
and nothing tells them. So that rank notes the smaller budget in the run's folder and ends; the next start reads it.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from rethinker.config import ConfigError
from rethinker.samples import Bundle

Plan = list[list[list[Bundle]]]  # [rank][micro-batch][bundle]
_MESSAGES = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory")  # from libraries with allocators of their own


class OutOfMemory(RuntimeError):
    """Memory ran out where this process cannot try again; the message says what the next start will do."""


def ran_out(error: BaseException) -> bool:
    """Whether an error says that the device's memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
    )


def smaller_budget(budget: int, plan_for: Callable[[int], Plan]) -> int:
    """Half the budget, or half of what was really used of it; at least room for the longest response.

    Args:
        budget: train.micro_batch_tokens in force, tokens.
        plan_for: the step's micro-batches under a budget.

    Raises:
        ConfigError: a single response with its prompt is the fullest micro-batch, and no budget makes it smaller.
    """
    largest = _largest(plan_for(budget))
    half = max(1, min(budget, largest) // 2)
    fits = max(half, _largest(plan_for(half)))  # a response of more than half has a micro-batch of its own
    if fits >= largest:
        raise ConfigError(
            f"out of memory with one response of {largest} tokens (prompt included) in a micro-batch, and no smaller "
            f"train.micro_batch_tokens (now {budget}) divides that; set policy.gradient_checkpointing=true, or lower "
            "rollout.gpu_memory_utilization, rollout.max_new_tokens or data.max_pixels"
        )
    return fits


def _largest(plan: Plan) -> int:
    """Tokens of the fullest micro-batch."""
    return max((sum(b.tokens for b in bundles) for micro in plan for bundles in micro), default=0)


def note_budget(file: Path, setting: int, budget: int) -> None:
    """Write the budget that replaces `setting` (train.micro_batch_tokens), whole or not at all."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps({"train.micro_batch_tokens": setting, "reduced_to": budget}) + "\n")
    os.replace(partial, file)


def noted_budget(file: Path, setting: int) -> int:
    """The noted budget; `setting` itself without a note, or if the note was made under another setting."""
    if not file.is_file():
        return setting
    note = json.loads(file.read_text())
    return note["reduced_to"] if note["train.micro_batch_tokens"] == setting else setting


class ZeroState:
    """Puts ZeRO-3 back to where no forward is under way and no gradient is held (DeepSpeed 0.19, one rank)."""

    def __init__(self, *engines: deepspeed.DeepSpeedEngine) -> None:
        """Args:
        engines: with or without an optimizer; call this while none of them runs.
        """
        self._engines = engines
        self._depth = len(parameter_offload.FWD_MODULE_STACK)

    @torch.no_grad()
    def restore(self) -> None:
        """Release what an interrupted forward or backward holds. Call it after the error's traceback is gone."""
        gc.collect()  # the graph of the failed forward has cycles with the hooks that it registered
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # gathers and reductions still read and write what is dropped below
        del parameter_offload.FWD_MODULE_STACK[self._depth :]
        for engine in self._engines:
            optimizer = engine.optimizer
            offload = getattr(optimizer, "parameter_offload", optimizer)  # without an optimizer it is the offload
            _release_parameters(engine.module, offload)
            if offload is not optimizer:
                _forget_gradients(engine, optimizer)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _release_parameters(module: torch.nn.Module, offload: Any) -> None:
    """Every parameter partitioned, nothing in flight, no module active, and no half-recorded trace."""
    coordinator = offload.get_param_coordinator()
    module.ds_inflight_param_registry.clear()
    for parameter in module.parameters():
        parameter.ds_active_sub_modules.clear()
        if parameter.ds_status is ZeroParamStatus.INFLIGHT:  # its gather may have failed: nothing to wait for
            parameter.ds_status = ZeroParamStatus.AVAILABLE
        parameter.partition()
    coordinator.release_backward_leftovers()
    if coordinator.is_record_trace():
        coordinator._invalidate_trace()
    for part in module.modules():
        part.ds_recompute_parameters = set()
        part.applied_pre_backward_ref_cnt = 0
        part._parameters._in_forward = False
    if offload.persistent_parameters:
        offload.persistent_parameters[0].all_gather(offload.persistent_parameters)


def _forget_gradients(engine: deepspeed.DeepSpeedEngine, optimizer: Any) -> None:
    """No gradient anywhere: the next backward writes over what the partitions hold instead of adding to it."""
    engine.zero_grad()
    optimizer.zero_grad()  # also says that the next micro-batch is the first
    optimizer.averaged_gradients = {}
    optimizer._offload_boundary_param_ids = set()
    optimizer.param_reduce_events.clear()
    for bucket in optimizer.ipg_buckets.values():
        bucket.clear_params()
    hooks = optimizer._backward_hook_state
    hooks.reset_for_new_step()
    hooks.backward_active_depth = hooks.remaining_grad_acc_hooks = 0
    engine._unmanaged_backward_count = 0
