r"""Equations, inequalities and intervals: what an answer says of a variable, and the sets of numbers that it names."""

from __future__ import annotations

import re
from functools import lru_cache

from rethinker.rewards.questions import asked_name, asks_for, asks_for_expression, asks_for_word, contains
from rethinker.rewards.spelling import closing, split_outside

_SIGNS = re.compile(r"\\(?:leq|geq|neq|approx|equiv|sim)(?![A-Za-z])|[=<>]")
_SUBSCRIPT = r"(?:_(?:\{[^{}]*(?:\{[^{}]*\})?[^{}]*\}|\\?\w+?(?![A-Za-z]\w)|\w))?"
_LETTER = rf"(?:\\Delta )?(?:[A-Za-z]|\\(?!frac|sqrt|pi\b|infty)[A-Za-z]+(?![A-Za-z])|[\u0391-\u03c9])'*{_SUBSCRIPT}"
# A letter before a bracket is a function where it is one by custom: x(x+1) is a product, f(x+1) and V(r) are none.
_CALL = (
    r"(?:[fgFG](?:\^\{-1\})?'*|\\(?:phi|Phi|varphi|psi|Psi)) ?\([^()]*(?:\([^()]*\))?[^()]*\)"
    r"|[hHEVSTuvpyWQ] ?\((?:\d+|[a-zA-Z]|n[+-]1)\)|P ?\([^()]*\)|n ?\([A-Z](?: ?\\c[au]p ?[A-Z])?\)"
    r"|\\(?:sin|cos|tan) ?(?:\\?[A-Za-z]+|\(\\?[A-Za-z]+\))"
)
_POINTS = r"(?:[A-Z][A-Z']{0,5}|[a-z])"
NAME = re.compile(
    rf"(?:{_LETTER}|{_CALL}"  # x, x_1, S_{{\triangle ABC}}, f(x), P(A)
    rf"|(?:m\s*)?\\angle ?(?:{_POINTS})?\d?|\[[A-Z]{{3,4}}\]|\\(?:triangle|odot) ?{_POINTS}"
    rf"|[A-Z]{{2,4}}'?|\|[A-Z]{{2}}\|"
    rf"|\\(?:vec|hat|bar|overline|overrightarrow|widehat|mathcal)\{{[^{{}}]*\}}{_SUBSCRIPT}"
    r"|\\frac\{d\w?\}\{d\w\}"
    r")"
)
_WORDS = re.compile(
    r"(?:(?:the|length|area|perimeter|volume|value|angle|measure|total|answer|number|probability|ratio|sum|of|in|is"
    r"|triangle|circle|square|rectangle|side|radius|diameter|height|width|distance|time|speed|cost|price|age"
    r"|[A-Z]{1,4}(?![A-Z])|面积|周长|体积) ?)+"
)
_QUOTIENT = re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}|([^/:]+)[/:]([^/:]+)")
_TUPLE = re.compile(r"\(([^()]+)\)")
_FLIPPED = {"<": ">", ">": "<", "\\leq": "\\geq", "\\geq": "\\leq", "\\neq": "\\neq"}
_BUILDER = re.compile(
    r"\\\{\s*(\w+)\s*(?:\\in ?\\reals\s*)?(?:\||:|\\mid(?![a-z]))(.*)\\\}|(\w+)(?:\||\\mid(?![a-z]))(\3.*)", re.DOTALL
)
_MEMBER = re.compile(rf"({_LETTER})\s*\\in(?![a-z])\s*(.*)", re.DOTALL)
_OR = re.compile(r"\s+or\s+|\s*\\(?:lor|vee)(?![a-z])\s*")
_AND = re.compile(r"([^,]+?)(?:\s+and\s*|\s*\\land(?![a-z])\s*)([^,]+)")
_COMMA = re.compile("[,;]")
_CUP = re.compile(r"\\cup(?![a-z])")

Interval = tuple[str, str, str, str]
"""Bracket, lower end, upper end, bracket: ("(", "-\\infty", "5", "]")."""
Intervals = tuple["str | None", list[Interval]]
"""The variable, if it is named, and its intervals."""


def split_relation(text: str) -> tuple[list[str], list[str]]:
    """The sides of a cleaned text and the relation signs between them, which stand in no bracket."""
    return split_outside(text, _SIGNS)


def is_name(text: str) -> bool:
    """Whether a side of an equation only names the other: x, S_{ABC}, f(x), (x,y), AB/CD, words."""
    text = text.strip()
    if NAME.fullmatch(text) or _WORDS.fullmatch(text):
        return True
    names, ratio = _TUPLE.fullmatch(text), _QUOTIENT.fullmatch(text)
    parts = names[1].split(",") if names else [part for part in ratio.groups() if part] if ratio else []
    return bool(parts) and all(NAME.fullmatch(part.strip()) for part in parts)


def names_answer(text: str, question: str) -> bool:
    """Whether a side of a prediction's equation names what the question asks for, rather than something else.

    Any expression does that the question asks for; else a quotient of names does where the question has it, words do
    where it has them, and a letter does unless the question asks for another.
    """
    text = text.strip()
    if asks_for_expression(text, question):
        return True
    if not is_name(text):
        return False
    if text.startswith(("\\sin", "\\cos", "\\tan")):
        return False  # of some angle
    if ratio := _QUOTIENT.fullmatch(text):
        parts = [part for part in ratio.groups() if part]
        others = [
            form.format(*pair) for form in ("\\frac{{{}}}{{{}}}", "{}:{}", "{}/{}") for pair in (parts, parts[::-1])
        ]
        clear = asks_for("ratio", question) and not any(contains(other, question) for other in others)
        return contains(text, question) or clear
    if _WORDS.fullmatch(text) and not NAME.fullmatch(text):
        nouns = [word for word in text.casefold().split() if word not in ("the", "of", "in", "is")]
        return not question or (bool(nouns) and asks_for_word(nouns[0], question))
    asked = asked_name(question)
    return asked is None or _kind(text) != _kind(asked) or _canonical(text) == _canonical(asked)


def _kind(name: str) -> str:
    """What a name is of: an angle, points, a value of a function, an element of a sequence, a letter."""
    name = name.removeprefix("m")
    if name.startswith("\\angle"):
        return "angle"
    found = re.match(r"[A-Za-z](?=[(_])|[A-Z]{2}", name)
    return found[0] if found and len(found[0]) == 1 else "points" if found else "letter"


def _canonical(name: str) -> str:
    """The name as it is compared: an angle by its vertex, a segment without its direction."""
    bare = re.sub(r"[\s{}]", "", name.removeprefix("m"))
    if bare.startswith("\\angle"):
        points = bare.removeprefix("\\angle")
        return points[1] if len(points) == 3 else points
    return "".join(sorted(bare)) if re.fullmatch("[A-Z]{2}", bare) else bare


def same_name(left: str, right: str) -> bool:
    """Whether two left sides name the same: spaces do not count, and y is f(x)."""
    left, right = ("".join(side.split()) for side in (left, right))
    return is_name(left) and (left == right or {"y", "f(x)"} == {left, right})


def as_intervals(text: str) -> Intervals | None:
    r"""The intervals of a set of numbers; None for what is none.

    Reads (a,b], unions, a<x<b, x\neq a, `x<a or x>b`, {x | ...}, x \in ..., and the real numbers.
    """
    builder = _BUILDER.fullmatch(text)
    if builder:
        inside = as_intervals((builder[2] or builder[4]).strip())
        return None if inside is None or inside[0] not in (None, builder[1] or builder[3]) else (None, inside[1])
    member = _MEMBER.fullmatch(text)
    if member:
        inside = as_intervals(member[2].strip())
        return inside and (member[1], inside[1])
    if text in ("\\reals", "\\reals "):
        return None, [("(", "-\\infty", "\\infty", ")")]
    parts = [part.strip() for part in _CUP.split(text)]
    if len(parts) > 1:
        found = [_bracketed(part) for part in parts]
        return None if None in found else (None, found)
    alternatives = _OR.split(text)
    if len(alternatives) > 1:
        found = [as_intervals(part.strip()) for part in alternatives]
        if None in found or len({variable for variable, _ in found}) > 1:
            return None
        return found[0][0], [interval for _, intervals in found for interval in intervals]
    bracketed = _bracketed(text)
    if bracketed:
        return None, [bracketed]
    if both := _AND.fullmatch(text):
        return _between(*(_of_relation(side.strip()) for side in both.groups()))
    return _of_relation(text)


def _between(left: Intervals | None, right: Intervals | None) -> Intervals | None:
    """x>a and x<b as the interval between."""
    if left is None or right is None or left[0] != right[0] or len(left[1]) != 1 or len(right[1]) != 1:
        return None
    (above,), (below,) = (left[1], right[1]) if left[1][0][2] == "\\infty" else (right[1], left[1])
    if above[2] != "\\infty" or below[1] != "-\\infty":
        return None
    return left[0], [(above[0], above[1], below[2], below[3])]


def _bracketed(text: str) -> Interval | None:
    if text[:1] not in ("(", "[") or text[-1:] not in (")", "]") or closing(text) != len(text) - 1:
        return None
    ends, _ = split_outside(text[1:-1], _COMMA)
    if len(ends) != 2 or not all(ends):
        return None
    return (text[0], ends[0], ends[1].removeprefix("+"), text[-1])


def _of_relation(text: str) -> tuple[str, list[Interval]] | None:
    """The intervals of an inequality, or a chain of two, about a variable that stands alone."""
    sides, signs = split_relation(text)
    if not signs or any(sign not in _FLIPPED for sign in signs) or len(sides) > 3:
        return None
    if len(sides) == 2:
        alone = [bool(_VARIABLE.fullmatch(side)) for side in sides]
        if alone == [False, True]:
            sides, signs = sides[::-1], [_FLIPPED[signs[0]]]
        elif alone != [True, False]:
            return None
        (variable, end), sign = sides, signs[0]
        below, above = ("(", "-\\infty", end, ")"), ("(", end, "\\infty", ")")
        closed = {"\\leq": ("(", "-\\infty", end, "]"), "\\geq": ("[", end, "\\infty", ")")}
        return variable, [below, above] if sign == "\\neq" else [{"<": below, ">": above}.get(sign) or closed[sign]]
    low, variable, high = sides
    if not NAME.fullmatch(variable) or "\\neq" in signs or (signs[0] in "<\\leq") != (signs[1] in "<\\leq"):
        return None
    if signs[0] not in ("<", "\\leq"):
        low, high, signs = high, low, [_FLIPPED[sign] for sign in signs[::-1]]
    brackets = "(" if signs[0] == "<" else "[", ")" if signs[1] == "<" else "]"
    return variable, [(brackets[0], low, high, brackets[1])]


_VARIABLE = re.compile(_LETTER)


@lru_cache(maxsize=4096)
def names_a_set(text: str) -> bool:
    """Whether a text can only be a set of numbers, and not a pair such as (1,2)."""
    return as_intervals(text) is not None and _bracketed(text) is None
