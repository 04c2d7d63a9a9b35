r"""Reward functions: the built-in check of the last `\boxed{}`, or a function in a file of the user's."""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError, nearest, one_line
from rethinker.rewards.answers import compare, extract_boxed, math_equal
from rethinker.samples import Query

RewardFunction = Callable[[str, str, Query], float]


def context_of(query: Query | None) -> tuple[str, Any]:
    """(question, options) that an answer is read in."""
    if query is None:
        return "", None
    return query.question, query.metadata.get("choices") or query.metadata.get("options")


def boxed_reward(response: str, answer: str, query: Query | None = None) -> float:
    r"""1.0 if the last `\boxed{}` of the response holds the answer, else 0.0; a response without a box scores 0.

    It may take arbitrarily long on hard mathematics, and raise whatever sympy raises on odd input: training asks an
    AnswerChecker, which bounds and counts both.

    Args:
        response: what the model wrote.
        answer: the expected answer, boxed or not; the rules are those of `answers`.
        query: where options are found, in `metadata["choices"]` or in the question.
    """
    predicted, (question, choices) = extract_boxed(response), context_of(query)
    if predicted is None:
        return 0.0
    return float(compare(predicted, answer, question=question, choices=choices, equal=math_equal))


def load_reward(spec: str) -> RewardFunction:
    """The reward that `reward.function` names: `boxed`, or `path/to/file.py:function` taking (response, answer, query).

    Raises:
        ConfigError: no such file or function, a file that fails to import, or another signature.
    """
    if spec == "boxed":
        return boxed_reward
    file, colon, name = spec.rpartition(":")
    if not colon or not file.endswith(".py"):
        raise ConfigError(f"reward.function={spec}: give boxed, or path/to/file.py:function")
    path = Path(os.path.expanduser(file))
    if not os.path.isfile(path):
        raise ConfigError(f"reward.function={spec}: there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"reward.function={spec}: {path} fails to import ({one_line(error)})") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        hint = f"; did you mean {nearest(name, names) or names[0]}?" if names else ""
        raise ConfigError(f"reward.function={spec}: {path} has no function {name!r}{hint}")
    try:
        inspect.signature(function).bind("response", "answer", "query")
    except TypeError as error:
        raise ConfigError(f"reward.function={spec}: it must take (response, answer, query); {error}") from error
    except ValueError:  # a builtin without a signature
        pass
    return function
