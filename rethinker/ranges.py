"""The types of settings with the values that each may have: a range stands in an `Annotated` type of config.py."""

from __future__ import annotations

import math
import os
import types
import typing
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

MOST_IMAGE_PIXELS = 178_956_970  # above twice its own threshold Pillow opens no image


@dataclass(frozen=True)
class Range:
    """Which values of its type a setting may have, in words and as a test. NaN fails every comparison."""

    words: str
    holds: Callable[[Any], bool]


def range_of(hint: Any) -> Range | None:
    """The range in a type, also in the first part of `Count | None`."""
    parts = (hint, *typing.get_args(hint))
    return next((range_ for part in parts for range_ in getattr(part, "__metadata__", ())), None)


def in_words(hint: Any) -> str:
    """A type as a user would say it: `int | None` is "an integer or null"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, arguments))
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin is tuple:
        return f"a list of {len(arguments)} values, each {in_words(arguments[0])}"
    if origin is list:
        return f"a list, each entry {in_words(arguments[0])}"
    if origin is dict:
        return f"a mapping whose values are each {in_words(arguments[1])}"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return words.get(hint, "a mapping")


def is_text(text: str) -> bool:
    """Whether a text can be shown and written: no line breaks, no escape sequences, no half characters."""
    return not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text)


def is_plain_name(name: str) -> bool:
    """Whether a folder of this name stays where it is made, on every file system and in every terminal."""
    plain = bool(name) and name[0] != "." and "\\" not in name and name == Path(name).name
    return plain and is_text(name) and len(name.encode()) <= 200


def is_path(name: str) -> bool:
    """Whether a file of this name can exist."""
    if not is_text(name) or len(name.encode()) > 4000 or any(len(p.encode()) > 255 for p in name.split("/")):
        return False
    return not name.startswith("~") or os.path.expanduser(name) != name  # ~nobody is no folder


_FROM_0_TO_1 = Range("from 0 to 1", lambda value: 0 <= value <= 1)

Count = Annotated[int, Range("at least 1", lambda value: value >= 1)]
Natural = Annotated[int, Range("at least 0", lambda value: value >= 0)]
Seed = Annotated[int, Range("from 0 to 4294967295", lambda value: 0 <= value < 2**32)]  # NumPy's
Capacity = Annotated[int, Range("from 1 to 2147483648", lambda value: 1 <= value <= 2**31)]  # of a sum tree
Processes = Annotated[int, Range("from 1 to 1024", lambda value: 1 <= value <= 1024)]
ZeroOrOne = Annotated[int, _FROM_0_TO_1]
ImagePixels = Annotated[
    int,
    Range(f"from 1 to {MOST_IMAGE_PIXELS}, the most that Pillow opens", lambda value: 1 <= value <= MOST_IMAGE_PIXELS),
]
Positive = Annotated[float, Range("positive and finite", lambda value: 0 < value < math.inf)]
NotNegative = Annotated[float, Range("at least 0 and finite", lambda value: 0 <= value < math.inf)]
AboveOne = Annotated[float, Range("above 1", lambda value: value > 1)]
Share = Annotated[float, _FROM_0_TO_1]
PositiveShare = Annotated[float, Range("above 0 and at most 1", lambda value: 0 < value <= 1)]
Fraction = Annotated[float, Range("above 0 and below 1", lambda value: 0 < value < 1)]
Betas = Annotated[
    tuple[float, float],
    Range("two numbers of at least 0 and below 1", lambda betas: all(0 <= beta < 1 for beta in betas)),
]
Weights = Annotated[
    dict[str, float],
    Range(
        "weights of at least 0, one of them positive",
        lambda weights: not weights or (all(w >= 0 for w in weights.values()) and sum(weights.values()) > 0),
    ),
]
FolderName = Annotated[
    str, Range("a plain folder name of at most 200 bytes, without / and not starting with a dot", is_plain_name)
]
Folder = Annotated[str, Range("the name of a folder", lambda name: bool(name) and is_path(name))]
PathOrName = Annotated[str, Range("a path or name that can exist: printable, no part longer than 255 bytes", is_path)]
