"""Pass rates, chunk by chunk: a chunk is asked, judged and written whole, and a killed measurement goes on after it.

Every chunk has its own seed: asked again it gets the same responses (on the same number of ranks).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.config import Config, ConfigError
from rethinker.curation.subset import PassRate
from rethinker.data.query_stream import fingerprint
from rethinker.evaluation.answering import AnsweringModel
from rethinker.evaluation.settings import CHUNK, recorded
from rethinker.runtime.display import progress
from rethinker.runtime.distributed import Ranks
from rethinker.runtime.files import whole_file
from rethinker.samples import Query

# Says what is measured in a folder.
MANIFEST = "measurement.json"

# Keeps the seeds apart from those of training's episodes.
_STREAM = 0x6375


def identity(config: Config, model: str, queries: Sequence[Query], samples: int) -> dict[str, Any]:
    """What the pass rates depend on; a measurement goes on only if all of it is the same."""
    folder = Path(model)
    if folder.is_dir():
        digest = hashlib.sha256()
        for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
            with path.open("rb") as file:
                digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
        version = f"sha256 {digest.hexdigest()}"
    else:
        from transformers import AutoConfig

        version = f"commit {AutoConfig.from_pretrained(model, trust_remote_code=False)._commit_hash}"
    return {
        **{"model": model, "model_version": version, "data": config.data.train, "data_sha256": fingerprint(queries)},
        **{"samples": samples, "seed": config.seed},
        **recorded(config, "data.max_prompt_tokens", "rollout.temperature"),
    }


def begin(folder: Path, measured: dict[str, Any]) -> None:
    """Note what is measured here, or compare it with what was.

    Raises:
        ConfigError: naming each difference, or the folder of something else.
    """
    path = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            if any(folder.iterdir()):
                raise ConfigError(f"--output {folder} holds other files; choose another folder")
            with whole_file(path) as partial:
                partial.write_text(json.dumps(measured, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {folder}: cannot be used ({error}); choose another folder") from error
    # The same content may lie in another place now.
    differing = [k for k in {**before, **measured} if before.get(k) != measured.get(k) and k not in ("model", "data")]
    if differing:
        changes = ", ".join(f"{key}={measured.get(key)} (was {before.get(key)})" for key in differing)
        raise ConfigError(
            f"--output {folder} holds a measurement with other settings: {changes}; choose another folder"
        )


def missing_chunks(folder: Path, queries: int) -> set[int]:
    """Numbers of the chunks that have not been measured yet."""
    return {n for n in range(-(-queries // CHUNK)) if not chunk_file(folder, n).is_file()}


def chunk_file(folder: Path, number: int) -> Path:
    """Where a chunk's pass rates lie: a line of JSON per question."""
    return folder / "chunks" / f"{number:05d}.jsonl"


def measure(
    queries: Sequence[Query], samples: int, folder: Path, model: AnsweringModel, ranks: Ranks, config: Config
) -> None:
    """Ask the questions (the same on every rank) of every missing chunk `samples` times each and write what came out.

    Rank r has every world_size-th chunk. A round in which any rank's chunk is missing is asked whole, by all ranks.
    """
    missing = missing_chunks(folder, len(queries))
    firsts = range(0, -(-len(queries) // CHUNK), ranks.world_size)
    for first in progress(firsts, "asked", len(firsts)) if ranks.is_main and len(firsts) > 1 else firsts:
        number = first + ranks.rank
        if not ranks.any(number in missing):
            continue
        rates = _ask(queries[number * CHUNK : (number + 1) * CHUNK], samples, number, model, config)
        if not rates:
            continue
        path = chunk_file(folder, number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as partial:
                partial.write_text("".join(json.dumps(vars(rate)) + "\n" for rate in rates), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--output {folder}: cannot be written ({error}); what was asked is kept") from error


def _ask(queries: Sequence[Query], samples: int, number: int, model: AnsweringModel, config: Config) -> list[PassRate]:
    rates = [PassRate(q.id, str(q.metadata.get("category", "all")), left_out=model.encoder.misfit(q)) for q in queries]
    fit = [i for i, rate in enumerate(rates) if rate.left_out is None]
    groups = model.answer(
        [queries[i] for i in fit],
        n=samples,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        seed=int(np.random.SeedSequence([config.seed, _STREAM, number]).generate_state(1)[0]),
    )
    model.checker.check_working()
    for i, group in zip(fit, groups, strict=True):
        right = sum(group.right)
        tokens = sum(completion.sampled_tokens for completion in group.completions) / samples
        rates[i] = dataclasses.replace(rates[i], right=right, samples=samples, tokens=tokens)
    return rates


def read_rates(folder: Path, queries: Sequence[Query]) -> list[PassRate]:
    """The pass rates of all questions, in their order.

    Raises:
        ConfigError: a chunk that is damaged or of other questions, naming the file to remove.
    """
    rates: list[PassRate] = []
    for start in range(0, len(queries), CHUNK):
        path, part = chunk_file(folder, start // CHUNK), queries[start : start + CHUNK]
        try:
            found = [PassRate(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); remove it to ask its questions again") from error
        if [rate.query_id for rate in found] != [query.id for query in part]:
            raise ConfigError(f"{path} is about other questions; remove it to ask its own again")
        rates += found
    return rates
