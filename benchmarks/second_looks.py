"""What a second look at a sum is worth: how likely the right steps and answer are, at first and after a trigger.

    python -m benchmarks.second_looks CHECKPOINT [CHECKPOINT ...] [--json FILE]

Prints, over validation questions with as many terms as sums_cpu trains on, the mean probability that an answer which
works the sum out (instead of giving the result at once) is right in every step: as a first answer, after a wrong answer
(a digit is misread) and a trigger, and after the right answer and a trigger. Where the last two are equal, the second
look does not use what it sees of the first one. Several checkpoints are those of runs that differ by seed: the table
has their means with 95% intervals, and that of the difference to the first answer.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from benchmarks.machine import describe
from rethinker.config import ConfigError, PolicyConfig, RethinkConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded.sums import Parts, answer_text, slow_answer, sums, with_slip
from rethinker.embedded.warmup import as_bundle
from rethinker.evaluation.intervals import mean_interval
from rethinker.model_folder import check_model_folder
from rethinker.policy.loading import load_model, load_processor
from rethinker.policy.model import Policy
from rethinker.policy.packing import pack
from rethinker.samples import Query
from rethinker.settings import resolve_config

LOOKS = ("first answer", "after a wrong one", "after the right one")
BATCH = 50


def probabilities(folder: Path, queries: Sequence[Query]) -> dict[str, list[float]]:
    """Of each look the probability of the right steps and answer, query by query."""
    encoder = PromptEncoder(load_processor(folder), resolve_config("sums_cpu").data)
    policy = Policy(load_model(folder, torch.float32).eval(), PolicyConfig())
    rng, found = random.Random(0), {look: [] for look in LOOKS}
    for start in range(0, len(queries), BATCH):
        asked = queries[start : start + BATCH]
        bundles = [as_bundle(query, responses(query, rng), encoder) for query in asked]
        batch = pack(bundles, encoder.encode, encoder.pixels, policy.positions)
        with torch.no_grad():
            logps, _ = policy(batch)  # [R]
        lengths = [len(sample.completion.token_ids) for bundle in bundles for sample in bundle.samples]
        scored = list(zip(batch.target_ids.split(lengths), logps.double().split(lengths), strict=True))  # by response
        for look, right, at_once in zip(cycle(LOOKS), scored[::2], scored[1::2], strict=False):
            found[look].append(_right_steps(*right, *at_once))
    return found


def responses(query: Query, rng: random.Random) -> list[Parts]:
    """For each look an answer with the right steps, and one that gives the result at once."""
    right = slow_answer(query.metadata["symbols"])
    trigger = rng.choice(list(RethinkConfig().triggers.values()))
    answers = (right, answer_text(query.answer))
    found: list[Parts] = [[(answer, True)] for answer in answers]
    for first in (with_slip(query.metadata["symbols"], rng), right):
        found += [[(first, False), (trigger, False), ("\n" + answer, True)] for answer in answers]
    return found


def _right_steps(ids: Tensor, logps: Tensor, at_once_ids: Tensor, at_once_logps: Tensor) -> float:
    """Probability of the right steps among the answers that do not give the result at once, from a response with each,
    [tokens]. What they share comes first and does not count, nor whether a response ends after its answer or goes on.
    """
    shared = int((ids[: len(at_once_ids)] == at_once_ids[: len(ids)]).long().cumprod(0).sum())
    return (logps[shared:-1].sum().exp() / (1 - at_once_logps[shared].exp())).item()


def shares(folder: Path, queries: Sequence[Query]) -> dict[str, dict[str, float]]:
    """Of each look the means of `probabilities` by category, and of all."""
    found = {}
    for look, values in probabilities(folder, queries).items():
        by_category: dict[str, list[float]] = {}
        for query, value in zip(queries, values, strict=True):
            by_category.setdefault(query.metadata["category"], []).append(value)
        found[look] = {name: mean(own) for name, own in by_category.items()} | {"all": mean(values)}
    return found


def table(measured: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """A Markdown row for each look: means over checkpoints of `shares`, and by how much it is above the first."""
    names = [name for name in measured[0][LOOKS[0]] if name != "all"]
    lines = [f"| right steps | {' | '.join(names)} | all | minus first |", "|---" * (len(names) + 3) + "|"]
    for look in LOOKS:
        cells = [f"{mean(found[look][name] for found in measured):.2f}" for name in names]
        cells.append(_with_interval([found[look]["all"] for found in measured], ".2f"))
        gaps = [found[look]["all"] - found[LOOKS[0]]["all"] for found in measured]
        cells.append("" if look == LOOKS[0] else _with_interval(gaps, "+.3f"))
        lines.append(f"| {look} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _with_interval(values: Sequence[float], form: str) -> str:
    middle, half = mean_interval(values)
    return f"{middle:{form}}" + ("" if half is None else f" ± {half:{form.lstrip('+')}}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all checkpoints, print the table of their means, and write what was measured, in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="also write the shares of every checkpoint here")
    options = parser.parse_args(argv)
    folders = list(dict.fromkeys(folder.resolve() for folder in options.checkpoints))
    try:
        for folder in folders:
            check_model_folder(folder, f"{folder} (a run's model is RUN/checkpoints/best)")
    except ConfigError as error:
        parser.error(str(error))
    trained = resolve_config("sums_cpu").data.category_weights
    queries = [query for query in sums("validation") if query.metadata["category"] in trained]
    measured = []
    for folder in folders:
        measured.append(shares(folder, queries))
        print(f"{folder}: " + ", ".join(f"{look} {own['all']:.3f}" for look, own in measured[-1].items()), flush=True)
    print(table(measured))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": describe(), "questions": len(queries), "checkpoints": measured}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
