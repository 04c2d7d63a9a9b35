r"""Right or wrong by a benchmark's own published rule, where that rule is mechanical: `METRICS`, by name.

A metric compares what the response's box holds with the expected answer. The published scorers find the answer in free
text (some ask GPT-4 to); here the box takes that step's place, so both sides are first freed of what only LaTeX and the
box need: `\text{}`, `\%`, dollar signs and quotes around the whole. The rule itself is the published one, with its
leniencies. Each docstring cites the file that its rule comes from; docs/evaluation.md compares.

Everything is string work and arithmetic on floats of short texts: no check of these needs a process of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

from rethinker.rewards.answers import clean, extract_boxed
from rethinker.rewards.quantities import parse_quantity
from rethinker.samples import Query

Metric = Callable[[str, str], "bool | None"]
"""Whether a prediction is the answer; None where the rule takes more than is here, so the boxed check decides."""

# Beyond this a text is right only to the letter.
LONGEST = 2000
# A longer text is no number. Brackets nest at most this deep, which Python's stack bears.
LONGEST_NUMBER = 100
# The published scorer of MEGA-Bench puts this number for pi.
PI = 3.14
# How far a prediction may be from a number of MEGA-Bench, of the answer's size.
WITHIN = 0.01

_WRAPPER = re.compile(r"\\(?:text\w*|math(?:rm|bf|it|sf)|mbox)\s*\{([^{}]*)\}")
_ESCAPED = re.compile(r"\\([%$#&_{}])")
_THIN_SPACE = re.compile(r"\\[,;:!]|(?<=\d)\{,\}(?=\d{3})")
_SIMPLE = re.compile(r"[ \-\n\t.]")
_LETTER = re.compile(r"\(?([A-Za-z])")
_ASSIGNED = re.compile(r"(?:=|≈|\\approx)\s*(.+)")
_MATH_BRACKETS = re.compile(r"\\[()\[\]]")
_UNITS = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*C?|°C?| C|[$¥]")
_PI = re.compile(r"\\pi(?![A-Za-z])|π")
_SPELLINGS = [
    (re.compile(r"\\(?:left|right)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]?frac(?![A-Za-z])\s*(\d)\s*(\d)"), r"\\frac(\1)(\2)"),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"(?<=\d)\s+(?=\d)"), ""),
    (re.compile(r"\\(?:times|cdot)(?![A-Za-z])|[×·⋅]"), "*"),
    (re.compile(r"\\div(?![A-Za-z])|÷"), "/"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"[−–]"), "-"),
    (re.compile(r"\{"), "("),
    (re.compile(r"\}"), ")"),
]
_TOKEN = re.compile(r"\s*(\\[A-Za-z]+|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])|\d+(?:\.\d*)?|\.\d+|[-+*/^()\[\]])")
# The phrases after which MMMU's scorer looks for the answer.
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = re.compile(r"-?(?:\b\d{1,3}(?:,\d{3})+\b|\d+(?:\.\d+)?e[+-]?\d+|(?:\d+\.\d+|\.\d+|\d+\b)(?!e[+-]?\d|[,\d]))")
# A line that ends in one of these after its cue has no answer there.
_TRIVIAL = ("", *":,.!?;'")


def published_verdict(predicted: str, answer: str, query: Query) -> bool | None:
    """The verdict of the metric that the query's benchmark names in `metadata["published_metric"]`, or None: no metric,
    or one that leaves this to the boxed check.

    Args:
        predicted: the content of the response's box.
        answer: the expected answer.
        query: whose metadata names the metric.
    """
    name = query.metadata.get("published_metric")
    metric = METRICS.get(name) if isinstance(name, str) else None
    return metric and metric(predicted, answer)


def exact_str_match(predicted: str, answer: str) -> bool:
    """Equal to the letter. Where the answer is one letter, the first letter of a longer prediction stands for it:
    `(B) Paris` and `B.` are B, and so is `Banana`.

    Source: TIGER-AI-Lab/MEGA-Bench, megabench/metrics/scoring/exact_str_match.py.
    """
    if len(answer) == 1 and answer.isalpha() and len(predicted) > 1 and (letter := _LETTER.match(predicted)):
        predicted = letter[1]
    return predicted == answer


def exact_str_match_case_insensitive(predicted: str, answer: str) -> bool:
    """The same in lower case.

    Source: TIGER-AI-Lab/MEGA-Bench, megabench/metrics/scoring/exact_str_match_case_insensitive.py.
    """
    return exact_str_match(predicted.lower(), answer.lower())


def simple_str_match(predicted: str, answer: str) -> bool:
    """The same in lower case and without spaces, hyphens, line ends, tabs and periods.

    Source: TIGER-AI-Lab/MEGA-Bench, megabench/metrics/scoring/simple_str_match.py.
    """
    return exact_str_match(_SIMPLE.sub("", predicted.lower()), _SIMPLE.sub("", answer.lower()))


def numerical_match(predicted: str, answer: str) -> bool:
    """Numbers agree within 1% of the answer's size, and texts that are no numbers as in `simple_str_match`.

    What follows the first `=` or `≈` counts. A number may be an expression of numbers, fractions, powers and pi (3.14);
    with a root or a function it is a text. Percent is a hundredth; `$`, `¥`, `°` and `°C` are left out, and a number
    with any other unit is a text. The published scorer also compares lists of numbers, which are texts here.

    Source: TIGER-AI-Lab/MEGA-Bench, megabench/metrics/scoring/general_numerical_match.py (`general_` and `boxed_`).
    """
    predicted, answer = (_assigned(_MATH_BRACKETS.sub("", side)) for side in (predicted, answer))
    number, expected = (
        None if "\\sqrt" in side else _number(_UNITS.sub("", side).replace("%", "/100"), PI)
        for side in (predicted, answer)
    )
    if number is None or expected is None:
        return simple_str_match(predicted, answer)
    margin = WITHIN * abs(expected)
    return expected - margin <= number <= expected + margin


def mathvista_integer(predicted: str, answer: str) -> bool:
    """The prediction cut to a whole number is the answer: 5.9 is 5.

    Source: lupantech/MathVista, evaluation/calculate_score.py, answer_type "integer".
    """
    return _mathvista(predicted, answer, int)


def mathvista_float(predicted: str, answer: str, decimals: int) -> bool:
    """The prediction rounded to the question's number of decimals is the answer: 1.24 is 1.2 at one decimal.

    Source: lupantech/MathVista, evaluation/calculate_score.py, answer_type "float" and `precision`.
    """
    return _mathvista(predicted, answer, lambda value: round(value, decimals))


def mmmu_open(predicted: str, answer: str) -> bool:
    """A number in the prediction is the answer, both rounded to two decimals; or the answer, which is no number, is
    part of the prediction in lower case.

    Only what follows "is", "so", "=" and the like counts, where the prediction has one of these.

    Source: MMMU-Benchmark/MMMU, eval/eval_utils.py: parse_open_response, eval_open.
    """
    expected = _two_decimals(answer)
    lines = predicted.strip().strip(".").lower().split("\n")
    found = []
    for i, line in enumerate(lines):
        cues = _CUES + ("=",) * (i == len(lines) - 1)
        tails = [line.rsplit(cue, 1)[1].strip() for cue in cues if cue in line]
        found += [tail for tail in [min(tails, key=len, default="")] if tail not in _TRIVIAL]
    found = found or ["\n".join(lines)]
    if isinstance(expected, float):
        return any(_two_decimals(text) == expected for part in found for text in (part, *_NUMBERS.findall(part)))
    if len(expected) == 1:  # a single letter is in most texts, so it stands at a space or alone
        return any(part == expected or f" {expected}" in part or f"{expected} " in part for part in found)
    return any(expected in part for part in found if not isinstance(_two_decimals(part), float))


def two_decimals(predicted: str, answer: str) -> bool | None:
    """Two numbers are equal at two decimals, where numbers are those of `numerical_match` and roots of them.

    The published scorers also work out functions, and compare texts and expressions, which the boxed check does here.

    Source: mathllm/MATH-V, evaluation/utils.py, is_equal; hychaochao/EMMA, evaluation/utils.py, is_equal.
    """
    number, expected = _number(predicted, math.pi), _number(answer, math.pi)
    return None if number is None or expected is None else round(number, 2) == round(expected, 2)


def _plain(text: str) -> str:
    """The text without LaTeX's dressing of text, and without quotes or dollar signs around the whole."""
    text = text.strip()
    for _ in range(3):  # wrappers nest, as in \textbf{\text{B}}
        text, found = _WRAPPER.subn(r"\1", text)
        if not found:
            break
    text = _THIN_SPACE.sub("", text).replace("\\ ", " ").replace("~", " ").strip()
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'$":
        text = text[1:-1].strip()
    return _ESCAPED.sub(r"\1", text)


def _assigned(text: str) -> str:
    found = _ASSIGNED.search(text)
    return found[1].strip() if found else text


def _mathvista(predicted: str, answer: str, rounded: Callable[[float], float]) -> bool:
    """Whether a rounded number is the answer; any unit counts as none, as GPT-4 extracts the number alone."""
    quantity = parse_quantity(clean(_assigned(predicted)))
    try:
        return quantity is not None and rounded(float(quantity.value)) == float(answer)
    except (ValueError, OverflowError):
        return False


def _two_decimals(text: str) -> float | str:
    """A number rounded to two decimals, or the text in lower case."""
    try:
        return round(float(text.replace(",", "")), 2)
    except ValueError:
        return text.strip().lower()


def _number(text: str, pi: float) -> float | None:
    """The value of an expression of numbers alone, or None."""
    text = _PI.sub(f"({pi})", text.strip())
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    if len(text) > LONGEST_NUMBER:
        return None
    tokens, end = [], 0
    while found := _TOKEN.match(text, end):
        tokens.append(found[1])
        end = found.end()
    if not tokens or text[end:].strip():
        return None
    try:
        value = _sum(tokens)
    except (ValueError, IndexError, ArithmeticError):
        return None
    return value if not tokens and isinstance(value, float) and math.isfinite(value) else None


# The grammar of expressions; each function takes its part from the front of the tokens and returns its value.


def _sum(tokens: list[str]) -> float:
    value = _product(tokens)
    while tokens and tokens[0] in "+-":
        sign = 1 if tokens.pop(0) == "+" else -1
        value += sign * _product(tokens)
    return value


def _product(tokens: list[str]) -> float:
    value = _signed(tokens)
    while tokens and (tokens[0] in "*/(" or tokens[0][0] == "\\"):  # 2\sqrt{3} and 2(3) are products
        sign = tokens.pop(0) if tokens[0] in "*/" else "*"
        factor = _signed(tokens)
        value = value * factor if sign == "*" else value / factor
    return value


def _signed(tokens: list[str]) -> float:
    if tokens[0] in "+-":
        return _signed(tokens) if tokens.pop(0) == "+" else -_signed(tokens)
    base = _atom(tokens)
    while tokens and tokens[0] == "^":  # from left to right, as published
        tokens.pop(0)
        sign = -1 if tokens[0] == "-" and tokens.pop(0) else 1
        base **= sign * _atom(tokens)
    return base


def _atom(tokens: list[str]) -> float:
    token = tokens.pop(0)
    if token in "([":
        value = _sum(tokens)
        if tokens.pop(0) != {"(": ")", "[": "]"}[token]:
            raise ValueError("a bracket that is not closed")
        return value
    if token == "\\frac":
        return _atom(tokens) / _atom(tokens)
    if token == "\\sqrt":
        degree = _atom(tokens) if tokens[0] == "[" else 2.0
        return _atom(tokens) ** (1 / degree)
    return float(token.replace(",", ""))  # ValueError for any other token


def _on_boxes(rule: Metric) -> Metric:
    """The rule on plain texts; an empty box is never right, and a long text only to the letter."""

    def metric(predicted: str, answer: str) -> bool | None:
        answer = extract_boxed(answer) or answer
        if max(len(predicted), len(answer)) > LONGEST:
            return predicted.strip() == answer.strip()
        predicted, answer = _plain(predicted), _plain(answer)
        return rule(predicted, answer) if predicted else False

    return metric


# Those of MEGA-Bench that say right or wrong of one text or number.
MEGABENCH: dict[str, Metric] = {
    "exact_str_match": _on_boxes(exact_str_match),
    "exact_str_match_case_insensitive": _on_boxes(exact_str_match_case_insensitive),
    "simple_str_match": _on_boxes(simple_str_match),
    "general_single_numerical_match": _on_boxes(numerical_match),
    "boxed_single_numerical_match": _on_boxes(numerical_match),
}
METRICS: dict[str, Metric] = {
    **MEGABENCH,
    "mathvista_integer": _on_boxes(mathvista_integer),
    **{f"mathvista_float_{n}": _on_boxes(partial(mathvista_float, decimals=n)) for n in range(10)},
    "mmmu_open": _on_boxes(mmmu_open),
    "two_decimals": _on_boxes(two_decimals),
}
