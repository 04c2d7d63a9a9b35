"""Greedy pass@1 on held-out questions, judged by the training reward."""

from __future__ import annotations

from collections import defaultdict

from rethinker.data.prompts import PromptEncoder
from rethinker.rewards.checker import AnswerChecker
from rethinker.rollout.engine import RolloutEngine
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Accuracy, Query


def validate(
    queries: list[Query],
    rollout: RolloutEngine,
    encoder: PromptEncoder,
    checker: AnswerChecker,
    ranks: Ranks,
    max_new_tokens: int,
) -> Accuracy:
    """Answer every query once at temperature 0, the ranks sharing the work. A reward of at least 1 counts as right."""
    mine = queries[ranks.rank :: ranks.world_size]
    answers = rollout.generate(
        [encoder.encode(q) for q in mine], n=1, max_new_tokens=max_new_tokens, temperature=0.0, seed=0
    )
    rewards = checker.score([(q.id, completions[0].text, q) for q, completions in zip(mine, answers, strict=True)])
    verdicts = [(q.metadata.get("category", "all"), rewards[q.id] >= 1.0) for q in mine]
    by_category: dict[str, list[bool]] = defaultdict(list)
    for share in ranks.gather(verdicts):
        for category, right in share:
            by_category[category].append(right)
    right = sum(sum(v) for v in by_category.values())
    return Accuracy(
        overall=right / max(1, len(queries)),
        by_category={c: sum(v) / len(v) for c, v in sorted(by_category.items())},
        questions=len(queries),
    )
