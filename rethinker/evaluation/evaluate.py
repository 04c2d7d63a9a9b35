"""A model's greedy answers to a benchmark, judged; also with rethinking forced on all of them, or on the wrong ones.

Rethinking at test time (METHOD: evaluation): `forced` puts a trigger after every first answer and lets the model go on,
`oracle` only after wrong ones, which takes knowing the answers: an upper bound.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rethinker.algorithm.rethinking import Trigger, continue_after_trigger, rethinks
from rethinker.data.prompts import PromptEncoder
from rethinker.evaluation import Mode
from rethinker.evaluation.benchmark import accepted_answers
from rethinker.rewards.checker import AnswerChecker
from rethinker.rollout.engine import RolloutEngine
from rethinker.runtime.display import progress
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Completion, Query

# Questions of one rank per call of the engine: bounds the decoded images in memory and what a deadline covers.
CHUNK = 256


@dataclass(frozen=True)
class Answer:
    """What a question got: the response that counts and, where it was made to rethink, the one from before."""

    completion: Completion | None
    """None for a question that does not fit (see `left_out`)."""
    reward: float = 0.0
    first: Completion | None = None
    first_reward: float | None = None
    left_out: str | None = None
    """The setting whose limit the question exceeds; it counts as wrong."""
    no_room: bool = False
    """It should have rethought, but the first answer left no room."""

    @property
    def right(self) -> bool:
        return self.reward >= 1.0

    @property
    def was_right(self) -> bool:
        """Whether the first answer was right; the answer itself if there was no second pass."""
        return (self.reward if self.first_reward is None else self.first_reward) >= 1.0

    @property
    def rethinks(self) -> bool:
        """Whether the first answer rethinks of its own accord."""
        first = self.first or self.completion
        return first is not None and rethinks(first.text)


def evaluate(
    queries: Sequence[Query],
    rollout: RolloutEngine,
    encoder: PromptEncoder,
    checker: AnswerChecker,
    ranks: Ranks,
    *,
    mode: Mode,
    max_new_tokens: int,
    triggers: Sequence[Trigger] = (),
) -> list[Answer] | None:
    """Answer every query greedily, the ranks sharing the work; on rank 0 the answers in order, None elsewhere.

    Args:
        queries: the same on every rank; their images are decoded when their turn comes.
        mode: `normal`, `forced` or `oracle`.
        max_new_tokens: longest first answer, and longest second pass. The engine must take twice that and the trigger.
        triggers: for the second pass; a query's is the same in every evaluation.

    Raises:
        ConfigError: an image that cannot be read, and whatever the engine refuses.
    """
    numbers = range(len(queries))[ranks.rank :: ranks.world_size]
    chunks = -(-len(queries) // (ranks.world_size * CHUNK))  # the same on every rank: an engine may span ranks
    own: list[tuple[int, Answer]] = []
    starts: Iterable[int] = range(0, chunks * CHUNK, CHUNK)
    for start in progress(starts, "answered", chunks) if ranks.is_main and chunks > 1 else starts:
        part = numbers[start : start + CHUNK]
        answers = _answer([queries[i] for i in part], rollout, encoder, checker, mode, max_new_tokens, triggers)
        own += zip(part, answers, strict=True)
    shares = ranks.gather_to_main(own)
    if shares is None:
        return None
    by_number = dict(pair for share in shares for pair in share)
    return [by_number[i] for i in range(len(queries))]


def _answer(
    queries: list[Query],
    rollout: RolloutEngine,
    encoder: PromptEncoder,
    checker: AnswerChecker,
    mode: Mode,
    max_new_tokens: int,
    triggers: Sequence[Trigger],
) -> list[Answer]:
    """Answers to some queries. Calls the engine a fixed number of times: other ranks may take part in it."""
    misfits = [encoder.misfit(query) for query in queries]
    answers = [Answer(None, left_out=misfit) for misfit in misfits]
    fit = [i for i, misfit in enumerate(misfits) if misfit is None]
    prompts = {i: encoder.encode(queries[i]) for i in fit}
    sampling: dict[str, Any] = {"temperature": 0.0, "seed": 0}
    outputs = rollout.generate(list(prompts.values()), n=1, max_new_tokens=max_new_tokens, **sampling)
    first = {i: completions[0] for i, completions in zip(fit, outputs, strict=True)}
    rewards = score({i: (queries[i], completion) for i, completion in first.items()}, checker)
    for i in fit:
        answers[i] = Answer(first[i], rewards[i])
    if mode == "normal":
        return answers

    again = [i for i in fit if mode == "forced" or not answers[i].right]
    chosen = [triggers[zlib.crc32(queries[i].id.encode()) % len(triggers)] for i in again]
    room = 2 * max_new_tokens + max(len(trigger.token_ids) for trigger in triggers)
    second = continue_after_trigger(
        rollout.generate,
        [prompts[i] for i in again],
        [first[i] for i in again],
        chosen,
        encoder.decode,
        max_new_tokens=room,
        **sampling,
    )
    longer = {i: completion for i, completion in zip(again, second, strict=True) if completion is not None}
    rewards_after = score({i: (queries[i], completion) for i, completion in longer.items()}, checker)
    for i in again:
        if i in longer:
            answers[i] = Answer(longer[i], rewards_after[i], first[i], rewards[i])
        else:
            answers[i] = dataclasses.replace(answers[i], no_room=True)
    return answers


def score(responses: dict[int, tuple[Query, Completion]], checker: AnswerChecker) -> dict[int, float]:
    """The reward of every response's own text; where several answers are accepted, the best one's."""
    requests = {
        (i, n): (completion.text, dataclasses.replace(query, answer=answer))
        for i, (query, completion) in responses.items()
        for n, answer in enumerate(accepted_answers(query))
    }
    rewards = checker.score([(f"{i}/{n}", text, query) for (i, n), (text, query) in requests.items()])
    return {
        i: max(rewards[f"{i}/{n}"] for n in range(len(accepted_answers(query)))) for i, (query, _) in responses.items()
    }
