r"""Lists, sets and matrices: the parts of an answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rethinker.rewards.quantities import parse_quantity
from rethinker.rewards.spelling import THOUSANDS, clean, closing, split_outside

_SEPARATORS = re.compile(
    r"[,;]\s*(?:(?:and|or)(?![A-Za-z])\s*)?|\s+(?:and|or)(?![A-Za-z])\s*|(?<=\))(?:and|or)(?=\()"
    r"|(?<=[\d)}])\s*[和或与]\s*"
)
_STATEMENTS = re.compile(r"(?:\(\d\)){2,}")  # (1)(3): those that are true
_TUPLES = re.compile(r"\(([^()=]+)\)=\(([^=]+)\)")
_MATRIX = re.compile(r"\\begin\{([a-z]*matrix|array)\}(?:\{[^{}]*\})?(.*)\\end\{\1\}", re.DOTALL)
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-z])\s*")


def split_list(text: str) -> list[str]:
    """The parts of a text between commas, semicolons, "and" and "or" that stand in no bracket."""
    if ", " in text:  # then a bare comma within digits separates thousands
        text = THOUSANDS.sub("", text)
    return [part for part in split_outside(text, _SEPARATORS)[0] if part not in ("", "and", "or")]


def list_items(text: str) -> tuple[str, list[str]] | None:
    r"""A list's brackets ("", "()", "[)", "{}", ...) and items, or None for anything else."""
    if "\\begin" in text or parse_quantity(text) is not None:
        return None
    if _STATEMENTS.fullmatch(text):
        return "", re.findall(r"\(\d\)", text)
    if numbered := _numbered_parts(text):
        return "()", numbered
    brackets, inner = "", text
    if text[:2] == "\\{" and text[-2:] == "\\}" and closing(text) == len(text) - 1:
        brackets, inner = "{}", text[2:-2]
    elif text[:1] in ("(", "[") and closing(text) == len(text) - 1:
        brackets, inner = text[0] + text[-1], text[1:-1]
    items = split_list(inner)
    if brackets == "()" and len(items) == 1:
        return "", items
    return (brackets, items) if brackets or len(items) > 1 else None


def _numbered_parts(text: str) -> list[str]:
    """The answers to the parts of a question, `(1) 3; (2) 4`; [] without such numbers."""
    marks = [f"({number})" for number in range(1, 6)]
    count = next((i for i, mark in enumerate(marks) if mark not in text), len(marks))
    if count < 2 or not text.startswith(marks[0]):
        return []
    found = re.fullmatch("".join(rf"{re.escape(mark)}\s*([^;]+?)[\s,;]*" for mark in marks[:count]), text)
    return list(found.groups()) if found else []


def named_list(text: str, names: Callable[[str], bool]) -> tuple[str, str]:
    """The name and the rest of a list such as x = 1, 2; without a name the whole text is the rest."""
    name, equals, rest = text.partition("=")
    if not equals or "=" in rest or "," in name or len(split_list(text)) == 1 or not names(name):
        return "", text
    return name.strip(), rest.strip()


def assignments(text: str, names: Callable[[str], bool]) -> list[tuple[str, str]]:
    """The names and values of `x=1, y=2`, or of (x,y)=(1,2); [] of anything else, and where a name has several."""
    if pair := _TUPLES.fullmatch(text):
        sides = [split_list(side) for side in pair.groups()]
        found = list(zip(*sides, strict=True)) if len(sides[0]) == len(sides[1]) else []
    else:
        found = [(name.strip(), value.strip()) for name, _, value in (part.partition("=") for part in split_list(text))]
    distinct = len({name for name, _ in found}) == len(found) > 1
    return found if distinct and all(value and "=" not in value and names(name) for name, value in found) else []


def both_signs(text: str) -> str:
    r"""\pm 2 as -2, 2: every item of a bare list is written once with each sign."""
    if not _PLUS_MINUS.search(text):
        return text
    signed = []
    for item in split_list(text):
        if len(_PLUS_MINUS.findall(item)) == 1:
            upper = _PLUS_MINUS.sub(lambda found: "+" if found[1] == "pm" else "-", item)
            lower = _PLUS_MINUS.sub(lambda found: "-" if found[1] == "pm" else "+", item)
            signed += [upper.removeprefix("+"), lower.removeprefix("+")]
        else:
            signed.append(item)
    return ",".join(signed)


def matrix_rows(text: str) -> tuple[str, list[str]] | None:
    """The kind and the rows of a matrix, each row as an ordered list."""
    if text[:1] in "([" and closing(text) == len(text) - 1:  # \left[\begin{array}...
        text = text[1:-1]
    found = _MATRIX.fullmatch(text)
    if found is None:
        return None
    rows = [row for row in re.split(r"\\\\|\\cr(?![a-z])", found[2]) if row.strip()]
    kind = "||" if found[1] == "vmatrix" else "[]"
    return kind, ["[" + ",".join(clean(entry) for entry in row.split("&")) + "]" for row in rows]


def paired(predicted: list[Any], answer: list[Any], same: Callable[[Any, Any], bool | None]) -> bool | None:
    """Whether the two lists pair up in some order; None if that hangs on open comparisons."""
    verdicts = [[same(p, a) for a in answer] for p in predicted]

    def pairs_up(accepted: tuple[bool | None, ...]) -> bool:
        partner: dict[int, int] = {}

        def place(i: int, tried: set[int]) -> bool:
            for j, verdict in enumerate(verdicts[i]):
                if verdict in accepted and j not in tried:
                    tried.add(j)
                    if j not in partner or place(partner[j], tried):
                        partner[j] = i
                        return True
            return False

        return all(place(i, set()) for i in range(len(verdicts)))

    if pairs_up((True,)):
        return True
    return None if pairs_up((True, None)) else False
