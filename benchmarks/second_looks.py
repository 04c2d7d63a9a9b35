"""What a second look at a sum is worth: how likely the right steps and answer are, at first and after a trigger.

    python -m benchmarks.second_looks CHECKPOINT [CHECKPOINT ...]

Prints for each checkpoint of sums_cpu, over validation questions of 2 to 6 terms, the mean probability that an answer
which works the sum out (instead of giving the result at once) is right in every step: as a first answer, after a wrong
answer (a digit is misread) and a trigger, and after the right answer and a trigger. Where the last two are equal, the
second look does not use what it sees of the first one.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from rethinker.config import PolicyConfig, RethinkConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded.sums import Parts, answer_text, slow_answer, sums, with_slip
from rethinker.embedded.warmup import as_bundle
from rethinker.policy.model import Policy, load_model, load_processor
from rethinker.policy.packing import pack
from rethinker.samples import Query
from rethinker.settings import load_config

LOOKS = ("first answer", "after a wrong one", "after the right one")
TERMS = range(2, 7)
BATCH = 50


def probabilities(folder: Path, queries: Sequence[Query]) -> dict[str, list[float]]:
    """Of each look the probability of the right steps and answer, query by query."""
    encoder = PromptEncoder(load_processor(folder), load_config("sums_cpu", {"run.name": "any"}).data)
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


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row per checkpoint and look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    terms = [f"{n} terms" for n in TERMS]
    queries = [query for query in sums("validation") if query.metadata["category"] in terms]
    folders = parser.parse_args(argv).checkpoints
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder}: there is no such checkpoint")
    print(f"| checkpoint | right steps | {' | '.join(terms)} | all |\n|{'---|' * (len(terms) + 3)}")
    for folder in folders:
        for look, values in probabilities(folder, queries).items():
            pairs = list(zip(queries, values, strict=True))
            cells = [mean(value for query, value in pairs if query.metadata["category"] == name) for name in terms]
            print(f"| {folder} | {look} | {' | '.join(f'{cell:.2f}' for cell in (*cells, mean(values)))} |", flush=True)


if __name__ == "__main__":
    main()
