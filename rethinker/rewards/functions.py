r"""Reward functions: the built-in check of the last `\boxed{}`, or a function in a file of the user's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from rethinker.config import ConfigError
from rethinker.rewards.answers import compare, extract_boxed, math_equal
from rethinker.rewards.published import published_verdict
from rethinker.rewards.rules import DEFAULT_RULES, Rules
from rethinker.runtime.user_code import user_function
from rethinker.samples import Query

RewardFunction = Callable[[str, str, Query], float]


def context_of(query: Query) -> tuple[str, Any]:
    """(question, options) that an answer is read in."""
    return query.question, query.metadata.get("choices") or query.metadata.get("options")


def boxed_reward(response: str, answer: str, query: Query, rules: Rules = DEFAULT_RULES) -> float:
    r"""1.0 if the last `\boxed{}` of the response holds the answer, else 0.0; a response without a box scores 0.

    A question of a benchmark with a rule of its own is judged by that (`published`).

    Args:
        response: what the model wrote.
        answer: the expected answer, boxed or not; the rules are those of `answers`.
        query: where options are found, in `metadata["choices"]` or in the question.
        rules: how far rounded numbers, percent and degrees may go.
    """
    predicted, (question, choices) = extract_boxed(response), context_of(query)
    if predicted is None:
        return 0.0
    verdict = published_verdict(predicted, answer, query)
    if verdict is not None:
        return float(verdict)
    return float(compare(predicted, answer, question=question, choices=choices, rules=rules, equal=math_equal))


def load_reward(spec: str, rules: Rules = DEFAULT_RULES) -> RewardFunction:
    """The reward that `reward.function` names: `boxed`, or `path/to/file.py:function` taking (response, answer, query).

    Args:
        spec: `reward.function`.
        rules: those of `boxed`.

    Raises:
        ConfigError: no such file or function, a file that fails to import, or another signature.
    """
    function = user_function("reward.function", spec, {"boxed": partial(boxed_reward, rules=rules)})
    try:
        inspect.signature(function).bind("response", "answer", "query")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward.function={spec}: it must take (response, answer, query); {error}") from error
    return function
