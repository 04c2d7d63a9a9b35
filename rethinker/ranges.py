"""The types of settings with the values that each may have, as pydantic checks them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WrapValidator

SERVER = r"https?://([\w.-]+|\[[\da-fA-F:]+\])(:\d+)?"
"""An address without a path, as a regular expression."""
MOST_IMAGE_PIXELS = 178_956_970  # above twice its own threshold Pillow opens no image


def is_text(text: str) -> bool:
    """Whether a text can be shown and written: no line breaks, no escape sequences, no half characters."""
    return not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text)


def _plain_name(name: str) -> str:
    """A folder of this name stays where it is made, on every file system and in every terminal."""
    plain = bool(name) and name[0] != "." and "\\" not in name and name == Path(name).name
    if not (plain and is_text(name) and len(name.encode()) <= 200):
        raise ValueError("must be a plain folder name of at most 200 bytes, without / and not starting with a dot")
    return name


def _path(name: str) -> str:
    """A name that a file can have; ~nobody is no folder."""
    usual = is_text(name) and len(name.encode()) <= 4000 and all(len(p.encode()) <= 255 for p in name.split("/"))
    if not usual or (name.startswith("~") and os.path.expanduser(name) == name):
        raise ValueError("must be a path or name that can exist: printable, no part longer than 255 bytes")
    return name


def _steps(spec: str) -> str:
    first, _, end = spec.partition(":")
    if not (first.isdecimal() and end.isdecimal() and 0 < int(first) < int(end)):
        raise ValueError("must be first:end with 0 < first < end, as 3:5 for steps 3 and 4")
    return spec


def _address(url: str) -> str:
    if not re.fullmatch(f"{SERVER}/?", url):
        raise ValueError("must be an address like http://127.0.0.1:8100, with a number as its port and no path")
    return url


def _or_auto(value: Any, number: Callable[[Any], float]) -> Any:
    """Not a union: of a value that none of its types takes pydantic would name the first alone."""
    if isinstance(value, str) and value != "auto":
        raise ValueError("must be auto or a number")
    return value if value == "auto" else number(value)


def _correction(value: Any) -> Any:
    """A number was the cap of what is now called token_truncate."""
    if isinstance(value, int | float):
        bound = float(value) if value > 1 else 2.0
        raise ValueError(
            f"is the number of an older release: write algorithm.rollout_correction=token_truncate with "
            f"algorithm.correction_high={bound}"
        )
    return value


def problem_of(error: Mapping[str, Any]) -> str:
    """What one of pydantic's errors asks for, in the words of the others: `must be greater than 0`."""
    return re.sub(r"^\w+ should", "must", error["msg"].removeprefix("Value error, "))


Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]  # NumPy's
Capacity = Annotated[int, Field(strict=True, ge=1, le=2**31)]  # of a sum tree
Processes = Annotated[int, Field(strict=True, ge=1, le=1024)]
ZeroOrOne = Annotated[int, Field(strict=True, ge=0, le=1)]
ImagePixels = Annotated[int, Field(strict=True, ge=1, le=MOST_IMAGE_PIXELS)]
Seconds = Annotated[float, Field(strict=True, gt=0, le=1e9)]  # what timers take
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
PositiveOrAuto = Annotated[Positive, WrapValidator(_or_auto)]
NotNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
AboveOne = Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
PositiveShare = Annotated[float, Field(strict=True, gt=0, le=1)]
Fraction = Annotated[float, Field(strict=True, gt=0, lt=1)]
Beta = Annotated[float, Field(strict=True, ge=0, lt=1)]
FolderName = Annotated[str, AfterValidator(_plain_name)]
Folder = Annotated[str, Field(min_length=1), AfterValidator(_path)]
PathOrName = Annotated[str, AfterValidator(_path)]
Address = Annotated[str, AfterValidator(_address)]
Steps = Annotated[str, AfterValidator(_steps)]
RolloutCorrection = Annotated[
    Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"],
    BeforeValidator(_correction),
]
