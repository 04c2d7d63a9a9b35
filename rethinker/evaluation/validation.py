"""Greedy pass@1 on held-out questions, judged by the training reward."""

from __future__ import annotations

from collections import defaultdict

from rethinker.data.prompts import PromptEncoder
from rethinker.evaluation.answering import AnsweringModel
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
    groups = AnsweringModel(rollout, encoder, checker).answer(mine, max_new_tokens=max_new_tokens)
    verdicts = [(group.query.metadata.get("category", "all"), group.rewards[0] >= 1.0) for group in groups]
    by_category: dict[str, list[bool]] = defaultdict(list)
    for category, right in (verdict for share in ranks.gather(verdicts) for verdict in share):
        by_category[category].append(right)
    return Accuracy(
        overall=sum(map(sum, by_category.values())) / max(1, len(queries)),
        by_category={category: sum(right) / len(right) for category, right in sorted(by_category.items())},
        questions=len(queries),
    )
