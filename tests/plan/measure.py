"""Measures what `rethinker plan` computes: resident memory of real ZeRO-3 steps on this machine, as JSON.

    python -m tests.plan.measure FOLDER NAME [NAME ...]

The policy engine as it trains. Per case: the memory held after two steps, and the most during the second, both above
what the process took before the engine was built. For a figure to mean tensors and no more, the caller sets
MALLOC_MMAP_THRESHOLD_, so that freed memory leaves the process, and every case has processes of its own, forks of one
that has imported everything: DeepSpeed keeps some of an engine that was destroyed, and lets it go in the next. A small
engine that is not compared comes first: libraries grow at their first use.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import re
import socket
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import deepspeed.runtime.zero.muon.original_muon  # noqa: F401  DeepSpeed would import it, and a compiler, in every fork
import torch

from rethinker.config import AlgorithmConfig, Config, DataConfig, LoraConfig, PolicyConfig, RolloutConfig, TrainConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded.tiny import TinySize, create_tiny
from rethinker.plan.step import MicroBatch
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.loading import load_processor
from rethinker.policy.packing import plan_micro_batches
from rethinker.runtime import distributed
from rethinker.samples import Query
from tests.families import tiny_models
from tests.policy.helpers import picture, samples_for


@dataclass(frozen=True)
class Case:
    """A model and a batch whose memory has one large part each."""

    size: TinySize
    lengths: list[int]  # of the responses to every query
    queries: int
    image: int  # side in pixels; 0 is text only
    tied: bool = True
    sub_group: int | None = None  # elements that the optimizer works on at a time
    settings: PolicyConfig = field(default_factory=lambda: PolicyConfig(dtype="float32"))
    family: str = ""  # a model of tests/families/tiny_models.py instead of `size`
    ranks: int = 1


_WIDE = TinySize(hidden=512, intermediate=1408, layers=4, heads=8, kv_heads=4)
_NARROW = TinySize(hidden=256, intermediate=704, layers=8, heads=4, kv_heads=2)
_SEEING = replace(_NARROW, layers=2, vision_hidden=256, vision_intermediate=1024, vision_layers=5, vision_heads=4)
CASES = {
    "text": Case(_WIDE, [96] * 8, 2, 0, ranks=2),
    "checkpointing": Case(
        _NARROW, [170] * 8, 2, 0, settings=PolicyConfig(dtype="float32", gradient_checkpointing=True)
    ),
    "lora": Case(_WIDE, [96] * 8, 2, 64, settings=PolicyConfig(dtype="float32", lora=LoraConfig(rank=32))),
    "images": Case(_SEEING, [8] * 4, 2, 256),
    "vocabulary": Case(replace(_NARROW, layers=2), [110] * 8, 1, 0, tied=False),
    "state": Case(replace(_WIDE, layers=6), [32] * 4, 1, 0, sub_group=1_000_000),
    "bfloat16": Case(_WIDE, [32] * 4, 1, 0, settings=PolicyConfig(dtype="bfloat16")),
}
FAMILY_CASES = {
    family: Case(_NARROW, [170] * 8, 2, 64, settings=PolicyConfig(dtype="float32"), family=family)
    for family in ("internvl", "qwen3_vl")
}
_WARM = Case(replace(_NARROW, layers=1), [8] * 2, 1, 64)
VOCABULARY = {"vocabulary": 20_000}


def config_of(case: Case, folder: Path) -> Config:
    zero = {"zero_optimization": {"sub_group_size": case.sub_group}} if case.sub_group else {}
    side = max(case.image, 64) ** 2
    return Config(
        policy=replace(case.settings, model=str(folder)),
        data=DataConfig(min_pixels=side, max_pixels=side),
        rollout=RolloutConfig(max_new_tokens=max(case.lengths)),
        algorithm=AlgorithmConfig(clip_low=0.9, clip_high=10.0),
        train=TrainConfig(schedule="constant", warmup_ratio=0, micro_batch_tokens=8192, deepspeed=zero),
    )


def model_of(name: str, case: Case, scratch: Path) -> Path:
    """The case's model, its vocabulary grown where the case says so."""
    if case.family:
        return tiny_models.create(case.family, scratch / name, hidden=256)  # large beside what libraries take
    folder = create_tiny(scratch / name, tie_word_embeddings=case.tied, size=case.size)
    if name in VOCABULARY:
        from rethinker.policy.loading import load_model

        model = load_model(folder, torch.float32)
        model.resize_token_embeddings(VOCABULARY[name], mean_resizing=False)
        model.save_pretrained(folder)
    return folder


def settle() -> None:
    """Free what is garbage, and give the heap's free pages back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    settle()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def highest() -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measure(name: str, case: Case, scratch: Path, ranks: distributed.Ranks) -> dict:
    folder = ranks.broadcast(model_of(name, case, scratch) if ranks.is_main else None)
    config = config_of(case, folder)
    encoder = PromptEncoder(load_processor(folder), config.data)
    pictures = scratch / f"{name}_pictures"
    pictures.mkdir()
    queries = [
        Query(str(i), "is it round?", "yes", (picture(pictures, i, (case.image,) * 2),) if case.image else ())
        for i in range(case.queries)
    ]
    samples = samples_for(queries, encoder, case.lengths)
    (bundles,) = plan_micro_batches(samples, budget=8192, world_size=ranks.world_size)[ranks.rank]
    before = resident()
    engine = PolicyEngine(config, folder, encoder, ranks, total_steps=4)
    engine.train_step(samples[:1])
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    engine.train_step(samples)
    peak = highest() - before
    state = resident() - before
    image = encoder.processor.image_token_id
    batch = MicroBatch(
        tokens=sum(bundle.tokens for bundle in bundles),
        rows=sum(len(sample.completion.token_ids) for bundle in bundles for sample in bundle.samples),
        prompt=max((bundle.samples[0].prompt_tokens for bundle in bundles), default=1),
        response=sum(case.lengths) // len(case.lengths),
        row=max((bundle.tokens for bundle in bundles), default=0),
        image_tokens=sum(encoder.encode(bundle.query).token_ids.count(image) for bundle in bundles),
    )
    engine.engine.destroy()
    return {
        "ranks": ranks.world_size,
        "name": name,
        "peak": peak,
        "state": state,
        "micro_batch": vars(batch),
        "folder": str(folder),
    }


def _rank(scratch: Path, name: str, case: Case, rank: int, port: str) -> None:
    """A rank's process: its results are printed by rank 0."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    ranks = distributed.start(120)
    own = scratch / f"{name}_{rank}"
    own.mkdir()
    measure("warm", replace(_WARM, settings=PolicyConfig(dtype=case.settings.dtype)), own, ranks)
    found = measure(name, case, own, ranks)
    if ranks.is_main:
        print(json.dumps(found), flush=True)
    distributed.stop()


def main(scratch: str, *names: str) -> int:
    gc.freeze()  # what is there now is no garbage, and stays shared by the forks
    fork = multiprocessing.get_context("fork")
    for name in names:
        case = (CASES | FAMILY_CASES)[name]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        arguments = [(Path(scratch), name, case, rank, port) for rank in range(case.ranks)]
        processes = [fork.Process(target=_rank, args=own) for own in arguments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
