"""What answers the policy within a response: tools, forced rethinking, or an environment of the user's.

A response is then several turns. After each turn the environment gets its text and answers with an observation: text
and images that the policy reads before its next turn, a reward, or the end.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from rethinker.config import ConfigError, EnvironmentConfig
from rethinker.runtime.user_code import user_function
from rethinker.samples import Query

TOOLS = ("crop", "python")
"""What the policy may call, alone or together (tools.py)."""
ALONE = ("verify",)
"""What stands alone (verify.py), as an environment of the user's does."""


@dataclass
class Observation:
    """What an environment answers to a turn.

    `images` are PIL images, files in bytes, or paths; each stands at an `<image>` mark of the text, or all come first.
    `done` ends the response, and what else there is to read is not read. `reward` is the turn's. As "assistant" the
    text goes on with the policy's own turn, whose end token is taken away. `calls` counts the tool calls of the turn,
    and `failures` are the reasons, one word each, why some failed.
    """

    text: str = ""
    images: Sequence[Any] = ()
    done: bool = False
    reward: float = 0.0
    role: Literal["user", "assistant"] = "user"
    calls: int = 0
    failures: tuple[str, ...] = ()


class Environment(Protocol):
    """What a class of the user's must have; either may be `async def`. An instance is made without arguments in each
    process and serves many responses, so what belongs to a response is in its state."""

    def reset(self, query: Query) -> Any:
        """The state of a response that begins: anything that can be pickled."""

    def step(self, state: Any, text: str) -> Observation:
        """The answer to a turn. The state may be changed in place; the text is as the policy wrote it, special tokens
        included but its end token."""


class FunctionEnvironment:
    """A function `step(state, text)` alone, whose state begins as `{"query": query}`."""

    def __init__(self, step: Callable[[Any, str], Observation]) -> None:
        self.step = step

    def reset(self, query: Query) -> dict[str, Query]:
        return {"query": query}


def load(config: EnvironmentConfig) -> tuple[str, ...] | Callable[[], Environment]:
    """What `environment.use` names: the names of tools, ("verify",), or what makes an environment of the user's; ()
    without any.
    Nothing of the user's is called, but its file is run.

    Raises:
        ConfigError: what cannot stand together, no such name, file, class or function, or one that takes other
            arguments.
    """
    use, listed = config.use, ", ".join(config.use)
    if not use:
        return ()
    if len(set(use)) < len(use):
        raise ConfigError(f"environment.use=[{listed}] names one of them twice; name it once")
    if set(use) <= set(TOOLS):
        return tuple(use)
    if len(use) > 1:
        raise ConfigError(
            f"environment.use=[{listed}]: {' and '.join(TOOLS)} may stand together, {' and '.join(ALONE)} and an "
            "environment of yours stand alone; leave the others out"
        )
    (spec,) = use
    named = f"environment.use=[{spec}]"
    made = user_function("environment.use", spec, dict.fromkeys((*TOOLS, *ALONE), None))
    if made is None:
        return (spec,)
    methods = {"reset": ("query",), "step": ("state", "text")}
    if not inspect.isclass(made):
        _check_takes(f"{named}: it", made, methods["step"])
        return lambda: FunctionEnvironment(made)
    _check_takes(f"{named}: the class", made, ())
    for name, arguments in methods.items():
        if not callable(getattr(made, name, None)):
            raise ConfigError(f"{named}: the class has no method {name}; it needs {name}(self, {', '.join(arguments)})")
        bound = isinstance(inspect.getattr_static(made, name), classmethod | staticmethod)
        _check_takes(f"{named}: its {name}", getattr(made, name), arguments if bound else ("self", *arguments))
    return made


def _check_takes(what: str, function: Callable[..., Any], arguments: Sequence[str]) -> None:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        shown = f"({', '.join(arguments)})" if arguments else "no arguments"
        raise ConfigError(f"{what} must take {shown}; {error}") from error
    except ValueError as error:  # it has no signature that Python knows of
        raise ConfigError(f"{what} must be a function or class of Python's; {error}") from error
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigError(f"{what} yields, and is to return; write return")
