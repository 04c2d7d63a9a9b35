"""Run on every rank by test_out_of_memory.py: memory runs out at chosen places, last of all on one rank of several."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from rethinker.config import Config, DataConfig, PolicyConfig, RolloutConfig, TrainConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.loading import load_processor
from rethinker.runtime import distributed
from tests.policy.helpers import queries_of_every_kind, samples_for

BUDGET = 100  # two micro-batches of the samples below
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB (injected)"


def fail(*_: object, **__: object) -> None:
    print(f"fault at {time.time():.3f}", file=sys.stderr, flush=True)
    raise torch.OutOfMemoryError(FULL)


def failure(work: Callable[[], object]) -> dict[str, str]:
    try:
        work()
    except Exception as error:
        return {"type": type(error).__name__, "message": str(error), "cause": str(error.__cause__)}
    return {"type": "none", "message": "", "cause": ""}


def main(model: str, scratch: str) -> None:
    ranks = distributed.start(60)
    pictures = Path(scratch) / f"pictures_{ranks.rank}"
    pictures.mkdir(exist_ok=True)
    encoder = PromptEncoder(load_processor(model), DataConfig(min_pixels=1024, max_pixels=8192))
    samples = samples_for(queries_of_every_kind(pictures)[:2], encoder, [5, 12])
    note = Path(scratch) / "micro_batch_tokens.json"

    def build(budget: int = BUDGET, file: Path | None = note) -> PolicyEngine:
        config = Config(
            policy=PolicyConfig(model=model, dtype="float32"),
            rollout=RolloutConfig(max_new_tokens=16),
            train=TrainConfig(learning_rate=1e-3, schedule="constant", warmup_ratio=0, micro_batch_tokens=budget),
        )
        return PolicyEngine(config, model, encoder, ranks, total_steps=10, budget_file=file)

    results: dict = {}
    engine = build(file=None)
    step, engine.engine.step = engine.engine.step, fail
    results["optimizer"] = failure(lambda: engine.train_step(samples))
    engine.engine.step, engine._pack = step, fail
    for name, work in (("train_step", engine.train_step), ("score", engine.score)):
        results[name] = failure(lambda work=work: work(samples))
    engine = build(1)
    engine._pack = fail
    results["one response"] = failure(lambda: engine.train_step(samples))
    results["noted"] = [note.is_file()]
    engine = build()
    engine._pack = fail
    results["with a note"] = failure(lambda: engine.train_step(samples))
    ranks.gather(None)  # both have written the note
    engine = build()
    results["noted"] += [engine.micro_batch_tokens, engine.train_step(samples)["grad_norm"]]
    if ranks.is_main:
        (Path(scratch) / "results.json").write_text(json.dumps(results))
    engine = build(file=note.with_name("last.json"))
    if ranks.rank == 1:  # while rank 0 waits for it
        engine.policy.hf.model.language_model.layers[2].register_forward_pre_hook(fail)
    engine.train_step(samples)
    distributed.stop()
