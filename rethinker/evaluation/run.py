"""An evaluation with its parts: the model loaded once, every benchmark answered, its result written and shown."""

from __future__ import annotations

import dataclasses
import os
import random
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from rethinker.algorithm.rethinking import Trigger, make_triggers
from rethinker.config import Config, ConfigError
from rethinker.data.prompts import PromptEncoder
from rethinker.evaluation import Mode
from rethinker.evaluation.benchmark import Benchmark
from rethinker.evaluation.command import RECORDED
from rethinker.evaluation.evaluate import evaluate
from rethinker.evaluation.results import describe_result, summarize, write_result
from rethinker.families import family_of
from rethinker.policy.model import load_processor
from rethinker.rewards.checker import AnswerChecker
from rethinker.rollout.backends import make_engine
from rethinker.runtime import distributed
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Query
from rethinker.version import versions

Task = tuple[Benchmark, tuple[list[Query], Counter[str]], Path]


def run_benchmarks(config: Config, mode: Mode, limit: int | None, tasks: list[Task]) -> list[dict[str, Any]]:
    """Evaluate `config.policy.model` on benchmarks, one after the other.

    Args:
        config: from `command.eval_config`.
        mode: see `evaluate`.
        limit: of the questions of each benchmark.
        tasks: benchmark, its questions and uncovered rows, and the folder of its result.

    Returns:
        What each `result.json` holds; [] on ranks other than 0.

    Raises:
        ConfigError: a model that cannot be read or is too short for `rollout.max_new_tokens`, and whatever the engine
            or the checker refuses.
    """
    results = []
    with ExitStack() as stack:
        ranks = Ranks(0, 1, 0)
        if "RANK" in os.environ:
            ranks = distributed.start(config.rollout.timeout_s)
            stack.callback(distributed.stop)
        checker = stack.enter_context(AnswerChecker(config.reward))
        positions = positions_of(config.policy.model)
        processor = load_processor(config.policy.model)
        triggers = make_triggers(processor.tokenizer, config.rethink.triggers)
        engine_config = fit_model(config, positions, triggers if mode != "normal" else [])
        encoder = PromptEncoder(processor, engine_config.data)
        rollout = make_engine(
            engine_config,
            config.policy.model,
            rank=ranks.rank,
            world_size=ranks.world_size,
            local_rank=ranks.local_rank,
        )
        stack.callback(rollout.close)
        for benchmark, (queries, uncovered), folder in tasks:
            start, before = time.perf_counter(), Counter(checker.failures)
            asked = sample(queries, limit)
            if ranks.is_main:
                print(f"{benchmark.title}: {len(asked)} questions", flush=True)
            answers = evaluate(
                asked,
                rollout,
                encoder,
                checker,
                ranks,
                mode=mode,
                max_new_tokens=config.rollout.max_new_tokens,
                triggers=triggers,
            )
            failures = sum((Counter(share) for share in ranks.gather(dict(checker.failures - before))), Counter())
            if answers is None:
                continue
            result = {
                "benchmark": benchmark.name,
                "title": benchmark.title,
                "model": config.policy.model,
                "mode": mode,
                "second_pass": None,
                **summarize(asked, answers),
                "failed_checks": dict(failures),
                "uncovered": dict(uncovered),
                "questions_in_benchmark": len(queries),
                "questions_published": benchmark.questions,
                "questions_limit": limit if len(asked) < len(queries) else None,
                "settings": {key: _setting(config, key) for key in RECORDED},
                "versions": versions(),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "seconds": round(time.perf_counter() - start, 1),
            }
            write_result(folder, result, asked, answers)
            print(describe_result(result, folder), flush=True)
            results.append(result)
    return results


def sample(queries: list[Query], limit: int | None) -> list[Query]:
    """The first `limit` of a seeded shuffle, in the benchmark's order; all without a limit."""
    if limit is None or limit >= len(queries):
        return queries
    return [queries[i] for i in sorted(random.Random(0).sample(range(len(queries)), limit))]


def positions_of(checkpoint: str) -> int:
    """How many tokens the model can take, prompt and answer together.

    Raises:
        ConfigError: a model that cannot be read, or of another kind.
    """
    from transformers import AutoConfig

    try:
        model = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # what is wrong with files from elsewhere surfaces as anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"checkpoint {checkpoint} cannot be read: {reason}") from error
    family_of(model.model_type, f"checkpoint {checkpoint}")
    return model.get_text_config().max_position_embeddings


def fit_model(config: Config, positions: int, triggers: list[Trigger]) -> Config:
    """The engine's settings: room for a second pass if there are triggers, and prompts within the model's positions.

    Raises:
        ConfigError: the answers alone fill the positions.
    """
    longest = config.rollout.max_new_tokens
    if triggers:
        longest = 2 * longest + max(len(trigger.token_ids) for trigger in triggers)
    if longest >= positions:
        raise ConfigError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room for a prompt: answers take "
            f"{longest} tokens and the model has {positions} positions; lower it"
        )
    prompt = min(config.data.max_prompt_tokens, positions - longest)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, max_prompt_tokens=prompt),
        rollout=dataclasses.replace(config.rollout, max_new_tokens=longest),
    )


def _setting(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)
