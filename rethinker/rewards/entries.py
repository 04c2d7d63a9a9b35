"""The reward functions that the settings name, in order, before any of their code is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError

from rethinker import ranges
from rethinker.config import ConfigError, RewardConfig


def _not_zero(weight: float) -> float:
    if weight == 0:
        raise ValueError("must not be 0, which would judge for nothing; leave the entry out")
    return weight


def _label(name: str) -> str:
    if not name or not ranges.is_text(name):
        raise ValueError("must be a text on one line that is not empty")
    return name


NEEDS = {"boxed": "", "format": "", "overlong": "", "judge": "openai"}
"""The functions that ship (functions.py), and the package that one needs for itself."""

KEYS = {
    "function": ranges.PathOrName,
    "weight": Annotated[float, Field(strict=True, allow_inf_nan=False), AfterValidator(_not_zero)],
    "name": Annotated[str, AfterValidator(_label)],
    "concurrency": ranges.Count,
    "timeout_s": ranges.Seconds,
    "on_failure": Literal["zero", "stop"],
}
"""What an entry of reward.functions says of itself, by key the type; its other keys are arguments of the function."""


@dataclass(frozen=True)
class Entry:
    """One reward function, as the settings name it."""

    place: str
    """The entry in the settings, for messages: `reward.functions[1]`, or `reward` where reward.function names it."""
    function: str
    """A shipped function's name, or `path/to/file.py:function`."""
    name: str
    """What logs call it."""
    timeout_s: float
    """Deadline of one call, in seconds."""
    weight: float = 1.0
    """Factor of its value in the reward."""
    concurrency: int = 16
    """Most calls of an async function at a time."""
    on_failure: Literal["zero", "stop"] = "zero"
    """What a call that fails does: its responses get the value 0, or the run stops."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the function by name."""
    timeout_setting: str = "reward.timeout_s"
    """The setting that `timeout_s` comes from."""

    @property
    def named(self) -> str:
        """The setting that names the function, and its value."""
        return f"{self.place}.function={self.function}"


def reward_entries(config: RewardConfig) -> list[Entry]:
    """The run's reward functions: those of `reward.functions`, else the one of `reward.function`.

    The first one says which answers are right: see `samples.Group.right`.

    Raises:
        ConfigError: naming the entry and its key.
    """
    if not config.functions:
        entries = [Entry("reward", config.function, _name_of(config.function), config.timeout_s)]
    elif config.function != RewardConfig.function:
        raise ConfigError(
            f"reward.function={config.function} and reward.functions are two answers to one question; put it into "
            f"reward.functions as {{function: {config.function}}}, and leave reward.function out"
        )
    else:
        entries = [_entry(f"reward.functions[{i}]", given, config) for i, given in enumerate(config.functions)]
    for i, entry in enumerate(entries):
        if any(other.name == entry.name for other in entries[:i]):
            raise ConfigError(f"{entry.place}.name={entry.name} is another entry's; give this one a name of its own")
    if entries[0].function == "overlong":
        raise ConfigError(
            f"{entries[0].named} comes first and so says what is right, but its values are 0 at most; put the function "
            "that judges answers before it, as reward.functions: [{function: boxed}, {function: overlong}]"
        )
    return entries


def first_alone(config: RewardConfig) -> RewardConfig:
    """The same settings with the first function alone: what evaluations need."""
    return RewardConfig(**vars(config) | {"functions": config.functions[:1]})


def _entry(place: str, given: dict[Any, Any], config: RewardConfig) -> Entry:
    if "function" not in given:
        raise ConfigError(f"{place}={given} names no function; give it one, as {{function: boxed, weight: 1.0}}")
    for key in given:
        if not isinstance(key, str):
            raise ConfigError(f"{place}={given}: its key {key!r} must be a text")
    own = {key: _checked(place, key, value) for key, value in given.items() if key in KEYS}
    return Entry(
        place,
        **{"name": _name_of(own["function"]), "timeout_s": config.timeout_s} | own,
        options={key: value for key, value in given.items() if key not in KEYS},
        timeout_setting=f"{place}.timeout_s" if "timeout_s" in own else "reward.timeout_s",
    )


def _checked(place: str, key: str, value: Any) -> Any:
    try:
        return TypeAdapter(KEYS[key]).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"{place}.{key}={value!r} {ranges.problem_of(error.errors()[0])}") from None


def _name_of(function: str) -> str:
    return function.rpartition(":")[2]
