"""What a second look at a sum is worth: how likely the right steps and answer are, at first and after a trigger.

    python -m benchmarks.second_looks CHECKPOINT [CHECKPOINT ...]

Prints for each checkpoint of sums_cpu, over validation questions of 2 to 6 terms, the mean probability that a response
which works the sum out is right in every step: as a first answer, after a wrong answer (a digit is misread) and a
trigger, and after the right answer and a trigger. Where the last two are equal, the second look does not use what it
sees of the first one. It can pay only if they are above the probability of a first answer that is as hard.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

from rethinker.config import PolicyConfig, RethinkConfig
from rethinker.data.prompts import PromptEncoder
from rethinker.embedded.sums import Parts, answer_text, sums, with_slip
from rethinker.embedded.warmup import as_completion
from rethinker.policy.model import Policy, load_model, load_processor
from rethinker.policy.packing import pack
from rethinker.samples import Bundle, Query, Sample
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
        bundles = [_answered(query, encoder, rng) for query in queries[start : start + BATCH]]
        batch = pack(bundles, encoder.encode, encoder.pixels, policy.positions)
        with torch.no_grad():
            logps, _ = policy(batch)  # [R]
        lengths = [len(sample.completion.token_ids) for bundle in bundles for sample in bundle.samples]
        parts = zip(logps.split(lengths), batch.loss_mask.split(lengths), strict=True)
        scores = iter([logp[mask].double() for logp, mask in parts])
        for at_once, first, *seconds in zip(scores, scores, scores, scores, strict=True):
            # Of the first answers those that work it out: all that do not begin with the box.
            found[LOOKS[0]].append((first.sum().exp() / (1 - at_once[0].exp())).item())
            for look, second in zip(LOOKS[1:], seconds, strict=True):
                found[look].append(second.sum().exp().item())
    return found


def _answered(query: Query, encoder: PromptEncoder, rng: random.Random) -> Bundle:
    """The query with an answer at once, the right steps, and these again after a wrong and after the right answer."""
    right = "\n".join([*query.metadata["steps"], answer_text(query.answer)])
    trigger = rng.choice(list(RethinkConfig().triggers.values()))
    seen = [with_slip(query.metadata["symbols"], rng), right]
    responses: list[Parts] = [[(answer_text(query.answer), True)], [(right, True)]]
    responses += [[(first, False), (trigger, False), ("\n" + right, True)] for first in seen]
    prompt_tokens = len(encoder.encode(query).token_ids)
    completions = [as_completion(parts, encoder.tokenizer) for parts in responses]
    return Bundle(query, tuple(Sample(query, c, 0.0, 0, prompt_tokens=prompt_tokens) for c in completions))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a row per checkpoint and look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path)
    terms = [f"{n} terms" for n in TERMS]
    queries = [query for query in sums("validation") if query.metadata["category"] in terms]
    print(f"| checkpoint | right steps and answer | {' | '.join(terms)} | all |\n|{'---|' * (len(terms) + 3)}")
    for folder in parser.parse_args(argv).checkpoints:
        for look, values in probabilities(folder, queries).items():
            pairs = list(zip(queries, values, strict=True))
            cells = [mean(value for query, value in pairs if query.metadata["category"] == name) for name in terms]
            print(f"| {folder} | {look} | {' | '.join(f'{cell:.2f}' for cell in (*cells, mean(values)))} |", flush=True)


if __name__ == "__main__":
    main()
