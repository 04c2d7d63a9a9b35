"""Pass rates, chunk by chunk: a chunk is asked, judged and written whole, and a killed measurement goes on after it.

Every chunk has its own seed: asked again it gets the same responses (on the same number of ranks).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rethinker.config import Config, ConfigError
from rethinker.curation.subset import PassRate
from rethinker.data.prompts import PromptEncoder
from rethinker.rewards.checker import AnswerChecker
from rethinker.rollout.engine import RolloutEngine
from rethinker.runtime.display import progress
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Query

# Questions of one rank per call of the engine, and per file.
CHUNK = 256

# Keeps the seeds apart from those of training's episodes.
_STREAM = 0x6375


def missing_chunks(folder: Path, queries: int) -> set[int]:
    """Numbers of the chunks that have not been measured yet."""
    return {n for n in range(-(-queries // CHUNK)) if not chunk_file(folder, n).is_file()}


def chunk_file(folder: Path, number: int) -> Path:
    """Where a chunk's pass rates lie: a line of JSON per question."""
    return folder / "chunks" / f"{number:05d}.jsonl"


def measure(
    queries: Sequence[Query],
    samples: int,
    folder: Path,
    rollout: RolloutEngine,
    encoder: PromptEncoder,
    checker: AnswerChecker,
    ranks: Ranks,
    config: Config,
) -> None:
    """Ask the questions of every missing chunk `samples` times each and write what came out.

    Rank r has every world_size-th chunk. A round in which any rank's chunk is missing is asked whole, by all ranks.

    Args:
        queries: the same on every rank.
        samples: responses per question, at `rollout.temperature`.
        folder: the output; on disks that ranks do not share, each finds its own chunks.
        config: the settings; `seed` is the measurement's.
    """
    total = -(-len(queries) // CHUNK)
    missing = missing_chunks(folder, len(queries))
    firsts = range(0, total, ranks.world_size)
    for first in progress(firsts, "asked", len(firsts)) if ranks.is_main and len(firsts) > 1 else firsts:
        if not ranks.any(first + ranks.rank in missing):
            continue
        number = first + ranks.rank
        part = queries[number * CHUNK : (number + 1) * CHUNK]
        rates = _ask(part, samples, number, rollout, encoder, checker, config)
        if part:
            _write(chunk_file(folder, number), rates)


def _ask(
    queries: Sequence[Query],
    samples: int,
    number: int,
    rollout: RolloutEngine,
    encoder: PromptEncoder,
    checker: AnswerChecker,
    config: Config,
) -> list[PassRate]:
    misfits = [encoder.misfit(query) for query in queries]
    asked = [query for query, misfit in zip(queries, misfits, strict=True) if misfit is None]
    seed = int(np.random.SeedSequence([config.seed, _STREAM, number]).generate_state(1)[0])
    answers = rollout.generate(
        [encoder.encode(query) for query in asked],
        n=samples,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        seed=seed,
    )
    rewards = checker.score(
        [
            (f"{q}/{i}", completion.text, query)
            for q, (query, completions) in enumerate(zip(asked, answers, strict=True))
            for i, completion in enumerate(completions)
        ]
    )
    found = {}
    for q, (query, completions) in enumerate(zip(asked, answers, strict=True)):
        right = sum(rewards[f"{q}/{i}"] >= 1.0 for i in range(samples))
        tokens = sum(completion.tokens for completion in completions) / samples
        found[query.id] = PassRate(query.id, category_of(query), right, samples, tokens)
    return [
        found.get(query.id) or PassRate(query.id, category_of(query), 0, 0, left_out=misfit)
        for query, misfit in zip(queries, misfits, strict=True)
    ]


def category_of(query: Query) -> str:
    """The question's category, "all" without one."""
    return str(query.metadata.get("category", "all"))


def _write(path: Path, rates: list[PassRate]) -> None:
    """Whole or not at all, also when the machine stops."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            for rate in rates:
                file.write(json.dumps(vars(rate)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise ConfigError(
            f"--output {path.parent.parent}: cannot be written ({error}); what was asked is kept"
        ) from error


def read_rates(folder: Path, queries: Sequence[Query]) -> list[PassRate]:
    """The pass rates of all questions, in their order.

    Raises:
        ConfigError: a chunk that is damaged or of other questions, naming the file to remove.
    """
    rates: list[PassRate] = []
    for number in range(-(-len(queries) // CHUNK)):
        path = chunk_file(folder, number)
        part = queries[number * CHUNK : (number + 1) * CHUNK]
        try:
            found = [PassRate(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); remove it to ask its questions again") from error
        if [rate.query_id for rate in found] != [query.id for query in part]:
            raise ConfigError(f"{path} is about other questions; remove it to ask its own again")
        rates += found
    return rates
