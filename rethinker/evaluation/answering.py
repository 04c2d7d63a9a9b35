"""A model that answers questions, and the judged groups of its answers: for evaluation, validation and curation."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rethinker.algorithm.rethinking import Trigger
from rethinker.config import Config, ConfigError, one_line
from rethinker.data.prompts import PromptEncoder
from rethinker.families import family_of
from rethinker.rewards.checker import AnswerChecker
from rethinker.rewards.entries import first_alone
from rethinker.rollout.dialogue import Dialogue
from rethinker.rollout.engine import RolloutEngine, make_engine, respond
from rethinker.runtime import distributed
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Accuracy, Group, Query


@dataclass(frozen=True)
class AnsweringModel:
    """What answers questions on this rank, and judges the answers."""

    rollout: RolloutEngine
    encoder: PromptEncoder
    checker: AnswerChecker
    dialogue: Dialogue | None = None
    """What answers within a response; None: a response is one turn."""

    def answer(
        self,
        queries: Sequence[Query],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        accepted: Callable[[Query], list[str]] | None = None,
    ) -> list[Group]:
        """A group of n completions to every query (each fits), with their rewards; greedy ones by default.

        Every rank calls this equally often, since an engine may span ranks. See RolloutEngine.generate, and `judge`.
        """
        prompts = [self.encoder.encode(query) for query in queries]
        sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        answers = respond(self.rollout, self.dialogue, queries, prompts, n=n, **sampling)
        groups = [Group(query, completions, 0) for query, completions in zip(queries, answers, strict=True)]
        judge(groups, self.checker, accepted)
        return groups


def judge(
    groups: Sequence[Group], checker: AnswerChecker, accepted: Callable[[Query], list[str]] | None = None
) -> None:
    """Set each group's rewards to the first reward function's values, which say what is right: every completion gets
    that of its own text, since requests carry ids.

    `accepted` gives the answers to a query of which any counts; by default it has one, `query.answer`.
    """
    requests: dict[str, tuple[str, Query]] = {}
    lengths: dict[str, tuple[int, bool]] = {}
    for g, group in enumerate(groups):
        answers = accepted(group.query) if accepted else [group.query.answer]
        for a, answer in enumerate(answers):
            query = dataclasses.replace(group.query, answer=answer) if accepted else group.query
            requests |= {f"{g}/{i}/{a}": (completion.text, query) for i, completion in enumerate(group.completions)}
            lengths |= {f"{g}/{i}/{a}": (c.tokens, c.truncated) for i, c in enumerate(group.completions)}
        group.rewards = [-math.inf] * len(group.completions)
    for request, reward in checker.score([(key, *asked) for key, asked in requests.items()], lengths).items():
        g, i, _ = map(int, request.split("/"))
        groups[g].rewards[i] = max(groups[g].rewards[i], reward)


def validate(
    queries: list[Query], model: AnsweringModel, ranks: Ranks, max_new_tokens: int, keep: int = 0
) -> tuple[Accuracy, list[Group]]:
    """Answer one query or more, greedily, the ranks sharing the work. `Group.right` says which answers are right.

    Beside the accuracy, on rank 0 the groups of the first `keep` queries come back, in order; on other ranks none.
    """
    places = range(len(queries))[ranks.rank :: ranks.world_size]
    groups = model.answer([queries[place] for place in places], max_new_tokens=max_new_tokens)
    right = np.zeros(len(queries), dtype=int)
    for rank, verdicts in enumerate(ranks.gather([group.right[0] for group in groups])):
        right[rank :: ranks.world_size] = verdicts
    by_category = pd.Series(right).groupby([query.category for query in queries]).mean().to_dict()
    # Without their queries, which hold images and which rank 0 has.
    mine = {i: dataclasses.replace(g, query=None) for i, g in zip(places, groups, strict=True) if i < keep}
    held = {place: group for share in ranks.gather_to_main(mine) or [] for place, group in share.items()}
    answers = [dataclasses.replace(held[place], query=queries[place]) for place in sorted(held)]
    asked = hashlib.sha256(repr([(query.id, query.question, query.answer) for query in queries]).encode()).hexdigest()
    accuracy = Accuracy(float(right.mean()), by_category, len(queries), "".join(map(str, right)), asked[:16])
    return accuracy, answers


@contextmanager
def open_model(config: Config, folder: str, ranks: Ranks, encoder: PromptEncoder) -> Iterator[AnsweringModel]:
    """The engine and the checker of a model (a folder, or a name on the hub) on a rank; see `fit_model`."""
    with ExitStack() as stack:
        # Recorded responses have been answered.
        talks = config.environment.use and config.rollout.backend != "recorded"
        dialogue = Dialogue(config, encoder) if talks else None
        if dialogue:
            stack.callback(dialogue.close)
        checker = stack.enter_context(AnswerChecker(config.reward, config.rollout.max_new_tokens, encoder.png_images))
        rollout = make_engine(config, folder, **vars(ranks))
        stack.callback(rollout.close)
        checker.start()  # after an engine that measures what memory is free: a reward may take some
        checker.try_out()
        yield AnsweringModel(rollout, encoder, checker, dialogue)


@contextmanager
def ranks_of_torchrun(timeout_s: float) -> Iterator[Ranks]:
    """The ranks that torchrun started, joined until the end of the context; without torchrun a single one."""
    if "RANK" not in os.environ:
        yield distributed.ALONE
        return
    try:
        yield distributed.start(timeout_s)
    finally:
        distributed.stop()


def sample(queries: list[Query], limit: int | None) -> list[Query]:
    """`limit` of the queries at random, the same ones every time and in their order; all without a limit."""
    if limit is None or limit >= len(queries):
        return queries
    return [queries[i] for i in sorted(random.Random(0).sample(range(len(queries)), limit))]


def fit_model(config: Config, checkpoint: str, triggers: Sequence[Trigger] = ()) -> Config:
    """An evaluation's settings: prompts within the model's positions, room for a second pass if there are triggers, and
    of several reward functions the first, which says what is right.

    Raises:
        ConfigError: a model that cannot be read, or of another kind; the answers alone fill its positions.
    """
    from transformers import AutoConfig

    try:
        model = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # what is wrong with files from elsewhere surfaces as anything
        raise ConfigError(f"checkpoint {checkpoint} cannot be read: {one_line(error)}") from error
    family_of(model.model_type, f"checkpoint {checkpoint}")
    positions = model.get_text_config().max_position_embeddings  # prompt and answer together
    longest = config.rollout.max_new_tokens
    if triggers:
        longest = 2 * longest + max(len(trigger.token_ids) for trigger in triggers)
    if longest >= positions:
        raise ConfigError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a prompt: answers take "
            f"{longest} tokens and the model has {positions} positions; lower it"
        )
    data = dataclasses.replace(config.data, max_prompt_tokens=min(config.data.max_prompt_tokens, positions - longest))
    rollout = dataclasses.replace(config.rollout, max_new_tokens=longest)
    return dataclasses.replace(config, data=data, rollout=rollout, reward=first_alone(config.reward))
