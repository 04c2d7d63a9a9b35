"""Run by test_out_of_memory.py: optimizer steps in which memory runs out at a chosen place, and clean ones beside them.

Usage: python -m tests.integration.memory_faults MODEL_FOLDER SCRATCH_FOLDER OUTPUT.pt
       torchrun --nproc-per-node 2 -m tests.integration.memory_faults MODEL_FOLDER SCRATCH_FOLDER BUDGET_FILE
"""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import NoGatherCoalescedHandle, ZeroParamStatus

from rethinker.config import AlgorithmConfig, Config, DataConfig, PolicyConfig, RolloutConfig, TrainConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.model import load_processor
from rethinker.policy.out_of_memory import note_budget
from rethinker.runtime import distributed
from tests.policy.helpers import queries_of_every_kind, samples_for

BUDGET = 100  # two micro-batches of the samples below; the next smaller budget makes three
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB (injected)"


class Fault:
    """Raises once, the `at`-th time it is asked; with 0, every time."""

    def __init__(self, at: int) -> None:
        self.at, self.left, self.raised_at = at, at, None

    def __call__(self, *given: object) -> None:
        self.left -= 1
        tensors = [x for one in given for x in (one if isinstance(one, tuple) else (one,)) if torch.is_tensor(x)]
        self.activation = weakref.ref(tensors[0]) if tensors else lambda: None
        if self.left == 0 or self.left < 0 == self.at:
            self.raised_at = time.perf_counter()
            raise torch.OutOfMemoryError(FULL)


def before(module: torch.nn.Module, fault: Fault) -> None:
    module.register_forward_pre_hook(fault)


def in_backward_of(module: torch.nn.Module, fault: Fault) -> None:
    def watch(_module, _inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        if output.requires_grad:
            output.register_hook(fault)

    module.register_forward_hook(watch)


def around(owner: object, name: str, fault: Fault, after: bool = False) -> None:
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if not after:
            fault()
        result = original(*args, **kwargs)
        if after:
            fault()
        return result

    setattr(owner, name, wrapped)


def layer(engine: PolicyEngine, number: int) -> torch.nn.Module:
    return engine.policy.hf.model.language_model.layers[number]


# where -> (plants the fault, settings)
PLACES: dict[str, tuple[Callable[[PolicyEngine], Fault], dict]] = {}


def place(name: str, at: int, **settings):
    def add(plant):
        def planted(engine: PolicyEngine) -> Fault:
            fault = Fault(at)
            plant(engine, fault)
            return fault

        PLACES[name] = (planted, settings)

    return add


place("forward of the first micro-batch", 1)(lambda e, f: before(layer(e, 0), f))
place("forward of the second micro-batch", 2)(lambda e, f: before(layer(e, 2), f))
place("head", 2)(lambda e, f: before(e.policy.hf.lm_head, f))
place("backward of the first micro-batch", 1)(lambda e, f: in_backward_of(layer(e, 3), f))
place("backward of the second micro-batch", 2)(lambda e, f: in_backward_of(layer(e, 0), f))
place("pack", 2)(lambda e, f: around(e, "_pack", f))
place("reduction of gradients", 2)(lambda e, f: around(e.engine.optimizer, "partition_grads", f))
place("recomputation", 2, gradient_checkpointing=True, kl_coef=0.1)(lambda e, f: in_backward_of(layer(e, 1).mlp, f))
place("reference model", 2, gradient_checkpointing=True, kl_coef=0.1)(
    lambda e, f: before(e.reference.module.hf.model.language_model.layers[2], f)
)


place("score", 2)(lambda e, f: before(layer(e, 2), f))


@place("gather of weights", 40)
def _(engine: PolicyEngine, fault: Fault) -> None:
    wait = NoGatherCoalescedHandle.wait

    def wrapped(self, *args, **kwargs):
        if engine.armed:
            fault()
        return wait(self, *args, **kwargs)

    NoGatherCoalescedHandle.wait = wrapped


def build(model: str, pictures: Path, ranks, budget_file: Path | None = None, **settings) -> PolicyEngine:
    encoder = PromptEncoder(load_processor(model), DataConfig(min_pixels=1024, max_pixels=8192))
    policy = {k: v for k, v in settings.items() if k == "gradient_checkpointing"}
    algorithm = {k: v for k, v in settings.items() if k not in policy}
    config = Config(
        policy=PolicyConfig(model=model, dtype="float32", **policy),
        rollout=RolloutConfig(max_new_tokens=16),
        algorithm=AlgorithmConfig(clip_low=10.0, clip_high=10.0, **algorithm),
        train=TrainConfig(learning_rate=1e-3, schedule="constant", warmup_ratio=0, micro_batch_tokens=BUDGET),
    )
    engine = PolicyEngine(config, model, encoder, ranks, total_steps=10, budget_file=budget_file)
    engine.samples = samples_for(queries_of_every_kind(pictures)[:2], encoder, [5, 12])
    engine.armed = False
    return engine


def weights(engine: PolicyEngine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.weights}


def step(engine: PolicyEngine) -> dict:
    return {"metrics": engine.train_step(engine.samples), "weights": weights(engine)}


def scores(engine: PolicyEngine) -> list[list[float]]:
    engine.score(engine.samples)
    return [sample.completion.trainer_logprobs.tolist() for sample in engine.samples]


def held(engine: PolicyEngine) -> int:
    """What an interrupted pass leaves behind: gathered or active weights, gradients, modules entered."""
    parameters = list(engine.policy.parameters())
    gathered = sum(p.ds_status is not ZeroParamStatus.NOT_AVAILABLE for p in parameters)
    active = sum(bool(p.ds_active_sub_modules) for p in parameters)
    gradients = sum(p.grad is not None for p in parameters)
    return gathered + active + gradients + len(FWD_MODULE_STACK) - engine._at_rest._depth


def beside(engine: PolicyEngine, twin: PolicyEngine, name: str, results: dict, work: Callable) -> None:
    """Memory runs out in `engine`'s work, which is repeated; its twin has the smaller budget from the start."""
    engine.micro_batch_tokens, retries, engine.armed = BUDGET, engine.oom_retries, True
    fault = PLACES[name][0](engine)
    left, restore = [], engine._at_rest.restore

    def watched():
        left.append(held(engine))
        restore()
        left.append(held(engine) + (fault.activation() is not None))

    engine._at_rest.restore = watched
    got = work(engine)
    done = time.perf_counter()
    engine.armed, engine._at_rest.restore = False, restore
    twin.micro_batch_tokens = engine.micro_batch_tokens
    results[name] = {
        "left": left,
        "raised": fault.raised_at is not None,
        "retries": engine.oom_retries - retries,
        "budget": engine.micro_batch_tokens,
        "seconds": done - (fault.raised_at or done),
        "got": [got, step(engine)],
        "clean": [work(twin), step(twin)],
    }


def one_rank(model: str, pictures: Path, ranks, output: str) -> None:
    results: dict = {}
    for settings in ({"gradient_checkpointing": True, "kl_coef": 0.1}, {}):
        engine, twin = (build(model, pictures, ranks, **settings) for _ in range(2))
        for name in (name for name, (_, of) in PLACES.items() if of == settings):
            beside(engine, twin, name, results, scores if name == "score" else step)
    results["state"] = engine.state_dict()
    before(layer(engine, 2), Fault(0))
    results["hopeless"] = failure(engine)
    around(twin.optimizer, "step", Fault(1))
    results["optimizer"] = failure(twin)
    note_budget(note := Path(output).with_name("note.json"), BUDGET, 81)
    results["noted"] = build(model, pictures, ranks, budget_file=note).micro_batch_tokens
    torch.save(results, output)


def failure(engine: PolicyEngine) -> dict[str, str]:
    try:
        engine.train_step(engine.samples)
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error)}
    return {"type": "none", "message": ""}


def two_ranks(model: str, pictures: Path, ranks, budget_file: str) -> None:
    """Rank 1 runs out of memory in its forward."""
    engine = build(model, pictures, ranks, budget_file=Path(budget_file))
    fault = Fault(1)
    if ranks.rank == 1:
        before(layer(engine, 2), fault)
    try:
        engine.train_step(engine.samples)
    finally:
        if fault.raised_at:
            print(f"fault at {time.time() - time.perf_counter() + fault.raised_at:.3f}", file=sys.stderr, flush=True)


def main(model: str, scratch: str, output: str) -> None:
    ranks = distributed.start(60)
    pictures = Path(scratch) / f"pictures_{ranks.rank}"
    pictures.mkdir(exist_ok=True)
    (one_rank if ranks.world_size == 1 else two_ranks)(model, pictures, ranks, output)
    distributed.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
