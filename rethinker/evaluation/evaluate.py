"""A model's greedy answers to benchmarks, judged; also with rethinking forced on all of them, or on the wrong ones.

Rethinking at test time: `forced` puts a trigger after every first answer and lets the model go on,
`oracle` only after wrong ones, which takes knowing the answers: an upper bound.
"""

from __future__ import annotations

import time
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from rethinker.algorithm.rethinking import Trigger, continue_after_trigger, make_triggers
from rethinker.config import Config
from rethinker.data.prompts import FIRST, PromptEncoder
from rethinker.environments.tools import schemas
from rethinker.evaluation import results
from rethinker.evaluation.answering import AnsweringModel, fit_model, judge, open_model, ranks_of_torchrun, sample
from rethinker.evaluation.benchmark import Benchmark
from rethinker.evaluation.results import accepted_answers, answered, conversed, unanswered
from rethinker.evaluation.settings import CHUNK, Mode, recorded
from rethinker.policy.loading import load_processor
from rethinker.runtime.display import progress
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Completion, Group, Query
from rethinker.version import versions

Task = tuple[Benchmark, tuple[list[Query], Counter[str]], Path]
"""A benchmark, its questions and the number of rows that it does not cover by reason, and the folder of its result."""


def run_benchmarks(config: Config, mode: Mode, limit: int | None, tasks: list[Task]) -> None:
    """Evaluate `config.policy.model` on `limit` questions of each benchmark; rank 0 writes and shows each result.

    Raises:
        ConfigError: a model that cannot be read or is too short for `rollout.max_new_tokens`, and whatever the engine
            or the checker reports.
    """
    folder = config.policy.model
    with ExitStack() as stack:
        ranks = stack.enter_context(ranks_of_torchrun(config.rollout.timeout_s))
        processor = load_processor(folder)
        triggers = make_triggers(processor.tokenizer, config.rethink.triggers)
        engine_config = fit_model(config, folder, triggers if mode != "normal" else ())
        encoder = PromptEncoder(processor, engine_config.data, schemas(config.environment))
        encoder.check(query for _, (queries, _), _ in tasks for query in queries[:FIRST])
        model = stack.enter_context(open_model(engine_config, folder, ranks, encoder))
        for benchmark, (queries, uncovered), output in tasks:
            start, before = time.perf_counter(), Counter(model.checker.failures)
            asked = sample(queries, limit)
            if ranks.is_main:
                print(f"{benchmark.title}: {len(asked)} questions", flush=True)
            longest = config.rollout.max_new_tokens
            rows = evaluate(asked, model, ranks, mode=mode, max_new_tokens=longest, triggers=triggers)
            failures = sum((Counter(share) for share in ranks.gather(dict(model.checker.failures - before))), Counter())
            if rows is None:
                continue
            result = {
                "benchmark": benchmark.name,
                "title": benchmark.title,
                "model": folder,
                "mode": mode,
                **results.summarize(rows),
                "failed_checks": dict(failures),
                "uncovered": dict(uncovered),
                "questions_in_benchmark": len(queries),
                "questions_published": benchmark.questions,
                "settings": recorded(config),
                "versions": versions(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "seconds": round(time.perf_counter() - start, 1),
            }
            results.write_result(output, result, rows)
            print(results.describe_result(result, output), flush=True)


def evaluate(
    queries: Sequence[Query],
    model: AnsweringModel,
    ranks: Ranks,
    *,
    mode: Mode,
    max_new_tokens: int,
    triggers: Sequence[Trigger] = (),
) -> list[dict[str, Any]] | None:
    """Answer every query greedily, the ranks sharing the work; on rank 0 a `results.ROW` each in order, None on others.

    Args:
        queries: the same on every rank; their images are decoded when their turn comes.
        max_new_tokens: longest first answer, and longest second pass. The engine must take twice that and the trigger.
        triggers: for the second pass; a query's is the same in every evaluation.

    Raises:
        ConfigError: an image that cannot be read, a failed check of a reward function whose on_failure is stop, and
            whatever the engine reports.
    """
    own = list(queries[ranks.rank :: ranks.world_size])
    chunks = -(-len(queries) // (ranks.world_size * CHUNK))  # the same on every rank: an engine may span ranks
    rows: list[dict[str, Any]] = []
    starts: Iterable[int] = range(0, chunks * CHUNK, CHUNK)
    for start in progress(starts, "answered", chunks) if ranks.is_main and chunks > 1 else starts:
        rows += _answer(own[start : start + CHUNK], model, mode, max_new_tokens, triggers)
        model.checker.check_working()
    shares = ranks.gather_to_main(rows)
    return shares and [shares[i % ranks.world_size][i // ranks.world_size] for i in range(len(queries))]


def _answer(
    queries: list[Query], model: AnsweringModel, mode: Mode, max_new_tokens: int, triggers: Sequence[Trigger]
) -> list[dict[str, Any]]:
    """Answers to some queries. Calls the engine a fixed number of times: other ranks may take part in it."""
    rows = [unanswered(query, model.encoder.misfit(query)) for query in queries]
    fit = [i for i, row in enumerate(rows) if row["left_out"] is None]
    asked = [queries[i] for i in fit]
    groups = model.answer(asked, max_new_tokens=max_new_tokens, accepted=accepted_answers)
    first: dict[int, Completion] = {}
    for i, group in zip(fit, groups, strict=True):
        first[i] = group.completions[0]
        rows[i] = answered(rows[i], first[i], group.rewards[0])
        rows[i] |= conversed(first[i]) if model.dialogue else {}
    if mode == "normal":
        return rows

    again = [i for i in fit if mode == "forced" or rows[i]["reward"] < 1.0]
    second = continue_after_trigger(
        model.rollout.generate,
        [model.encoder.encode(queries[i]) for i in again],
        [first[i] for i in again],
        [triggers[zlib.crc32(queries[i].id.encode()) % len(triggers)] for i in again],
        model.encoder.decode,
        max_new_tokens=2 * max_new_tokens + max(len(trigger.token_ids) for trigger in triggers),
        temperature=0.0,
        seed=0,
    )
    longer = {i: Group(queries[i], [y], 0) for i, y in zip(again, second, strict=True) if y is not None}
    judge(list(longer.values()), model.checker, accepted_answers)
    for i in again:
        group = longer.get(i)
        rows[i] = answered(rows[i], group.completions[0], group.rewards[0]) if group else rows[i] | {"no_room": True}
    return rows
