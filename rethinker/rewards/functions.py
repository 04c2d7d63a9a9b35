r"""Reward functions: those that ship, and functions in files of the user's; their kinds, options and facts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from rethinker.config import ConfigError, RewardConfig, nearest
from rethinker.rewards.answers import compare, extract_boxed, math_equal
from rethinker.rewards.entries import KEYS, Entry, reward_entries
from rethinker.rewards.judge import check_judge, judge, trial
from rethinker.rewards.published import published_verdict
from rethinker.rewards.rules import DEFAULT_RULES, Rules, rules_of
from rethinker.runtime.user_code import user_function
from rethinker.samples import Query

FACTS = ("tokens", "truncated", "max_tokens", "images")
"""What a function may ask for by the names of its parameters: the response's length in tokens, with all that
rollout.max_new_tokens counts, whether that limit ended it, rollout.max_new_tokens itself, and the query's images as PNG
files in bytes, upright RGB as the model sees them."""

ONE_BOX = r"(?!(?:.*\\boxed){2})\s*(?!\\boxed)\S.*\\boxed\s*\{.*\}.*"
r"""Exactly one `\boxed{}`, with text before it."""


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


def format_reward(response: str, answer: str, query: Query, *, pattern: str = ONE_BOX) -> float:
    """1.0 if the whole response matches a regular expression, in which a dot is any character, else 0.0."""
    return float(re.fullmatch(pattern, response, re.DOTALL) is not None)


def overlong_reward(
    response: str, answer: str, query: Query, *, tokens: int, max_tokens: int, buffer: int | None = None
) -> float:
    """Soft overlong punishment: 0 up to `max_tokens` - `buffer` tokens, from there linearly down to -1 at `max_tokens`.

    Source: DAPO (arXiv 2503.14476), equation 13. `buffer` is a quarter of max_tokens, rounded up, unless it is given.
    """
    buffer = -(-max_tokens // 4) if buffer is None else buffer
    return max(-1.0, min(0.0, (max_tokens - buffer - tokens) / buffer))


def _check_format(max_tokens: int | None, pattern: str = ONE_BOX) -> None:
    try:
        re.compile(pattern, re.DOTALL)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"pattern={pattern!r} is no regular expression: {error}") from error


def _check_overlong(max_tokens: int | None, buffer: int | None = None) -> None:
    if buffer is None:
        return
    if type(buffer) is not int or buffer < 1 or buffer > (max_tokens or buffer):
        limit = "" if max_tokens is None else f", at most rollout.max_new_tokens ({max_tokens})"
        raise ValueError(f"buffer={buffer!r} must be a number of tokens, at least 1{limit}")


SHIPPED: dict[str, Callable[..., Any]] = {
    "boxed": boxed_reward,
    "format": format_reward,
    "overlong": overlong_reward,
    "judge": judge,
}
CHECKS: dict[str, Callable[..., None]] = {"format": _check_format, "overlong": _check_overlong, "judge": check_judge}
"""Of shipped functions: called with rollout.max_new_tokens (None where it is not known) and the entry's options, they
raise ValueError, `option=value and what is wrong with it`."""
TRIALS: dict[str, Callable[[], tuple[str, str, Query, dict[str, Any]]]] = {"judge": trial}
"""Of shipped functions that need what is elsewhere: (response, answer, query, facts) that they can judge if it is
there."""


@dataclass(frozen=True)
class RewardFunction:
    """A reward function with its options; `call` takes (response, answer, query) and the facts by name, or lists of
    each if `kind` is batch."""

    entry: Entry
    call: Callable[..., Any]
    kind: Literal["single", "batch", "async"]
    facts: tuple[str, ...]


def reward_weights(config: RewardConfig) -> dict[str, float]:
    """The weight of each reward function by its name, in their order."""
    return {entry.name: entry.weight for entry in reward_entries(config)}


def checking_processes(config: RewardConfig) -> int:
    """The most processes that a rank judges in: the workers, and one for each async function. Of a function in a file
    only its code says whether it is; it counts, but for one where there is no other to need the workers."""
    shipped = [SHIPPED.get(entry.function) for entry in reward_entries(config)]
    return config.workers + min(len(shipped) - 1, sum(not f or inspect.iscoroutinefunction(f) for f in shipped))


def load_rewards(config: RewardConfig, max_tokens: int | None = None) -> list[RewardFunction]:
    """The run's reward functions, their options checked; `max_tokens` is rollout.max_new_tokens.

    Raises:
        ConfigError: a mistake in an entry; no such file or function, a file that fails to import, a signature that is
            none of a reward function's; an option that the function does not take.
    """
    return [load_reward(entry, rules_of(config), max_tokens) for entry in reward_entries(config)]


def load_reward(entry: Entry, rules: Rules = DEFAULT_RULES, max_tokens: int | None = None) -> RewardFunction:
    """One of them. `rules` are those of `boxed`.

    Raises:
        ConfigError: as `load_rewards`.
    """
    function = user_function(f"{entry.place}.function", entry.function, SHIPPED)
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{entry.named}: it must take (response, answer, query); {error}") from error
    if function is boxed_reward:  # its rules are settings of their own
        function, parameters = partial(function, rules=rules), {k: p for k, p in parameters.items() if k != "rules"}
    kind = _kind(entry, function, list(parameters)[:3])
    further = [p for p in list(parameters.values())[3:] if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    further += [p for p in list(parameters.values())[:3] if p.kind is p.KEYWORD_ONLY]
    facts = tuple(p.name for p in further if p.name in FACTS)
    if taken := [p.name for p in further if p.name in KEYS]:
        raise ConfigError(
            f"{entry.named}: {taken[0]} is a key of every entry, so that its parameter {taken[0]} would never get a "
            "value; give the parameter another name"
        )
    takes = [p.name for p in further if p.name not in FACTS]
    _check_options(entry, takes, open_ended=any(p.kind is p.VAR_KEYWORD for p in parameters.values()))
    if check := CHECKS.get(entry.function):
        try:
            check(max_tokens, **entry.options)
        except ValueError as error:
            if entry.place == "reward":
                raise ConfigError(
                    f"{entry.named}: {error}; options stand in an entry of reward.functions, as [{{function: "
                    f"{entry.function}, ...}}]"
                ) from error
            raise ConfigError(f"{entry.place}.{error}") from error
    try:
        inspect.signature(function).bind("response", "answer", "query", **entry.options, **dict.fromkeys(facts))
    except TypeError as error:
        raise ConfigError(
            f"{entry.named}: it must take (response, answer, query), or (responses, answers, queries), and beside them "
            f"only facts ({', '.join(FACTS)}) and options that its entry gives; {error}"
        ) from error
    return RewardFunction(entry, partial(function, **entry.options), kind, facts)


def _kind(entry: Entry, function: Callable[..., Any], first: Sequence[str]) -> Literal["single", "batch", "async"]:
    """How a function is called: by whether it is `async def`, and by the names of its first three parameters."""
    batch = ["responses", "answers", "queries"]
    plural = [name in batch for name in first]
    is_async = any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"{entry.named}: it yields, and is to return what a response is worth; write return")
    if facts := [name for name in first if name in FACTS]:
        raise ConfigError(
            f"{entry.named}: its first three parameters get the response, the answer and the query, whatever they are "
            f"called; put {', '.join(facts)} behind them"
        )
    if any(plural) and (is_async or list(first) != batch):
        raise ConfigError(
            f"{entry.named}: a function of a batch takes (responses, answers, queries) and is not async; it takes "
            f"{'async ' * is_async}({', '.join(first)})"
        )
    return "async" if is_async else "batch" if any(plural) else "single"


def _check_options(entry: Entry, takes: Sequence[str], open_ended: bool) -> None:
    """The options of an entry are arguments of its function, and none of them is a fact."""
    for key in entry.options:
        if key in FACTS:
            raise ConfigError(f"{entry.place}.{key} is a fact that a function asks for, not an option; remove it")
        if key not in takes and not open_ended:
            known = [*takes, *(key for key in KEYS if key != "function")]
            close = nearest(key, known)
            hint = f"did you mean {close}?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"{entry.place}.{key}: {entry.function} takes no such option: {hint}")


def call_with(function: RewardFunction, asked: Sequence[tuple[str, str, Query, Mapping[str, Any]]]) -> Any:
    """What a function says of some responses, one unless it takes a batch: a number, a coroutine of one, or a list."""
    if function.kind != "batch":
        ((response, answer, query, facts),) = asked
        return function.call(response, answer, query, **facts)
    responses, answers, queries, facts = map(list, zip(*asked, strict=True))
    return function.call(responses, answers, queries, **{name: [of[name] for of in facts] for name in function.facts})
