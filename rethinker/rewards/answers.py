r"""Whether a predicted answer equals the expected one: words, choices, quantities, lists, sets, mathematics.

The rules, on both sides in one spelling (`spelling.clean`):
1. Equal words are equal; case, spacing and a final period do not count. The case of symbols does: R is not r.
2. If the question has options, an answer stands for the option it names (see `choices`), whole answers only.
3. Quantities are exact (1,234 = 1 234 = 1.234e3, 0.5 = 1/2); a fraction or a root equals the decimal that it rounds to
   (`reward.rounding`). One side may leave the unit out; two different units are never equal, nor is 5 equal to
   5 million. Percent: 50% equals 0.5 (`reward.percent`). An answer of 50% accepts 50, too; an answer of 50 accepts 50%
   only if the question speaks of percent, and then one of 0.5 does not.
4. Lists: `(a, b)` and `[a, b]` are ordered and keep their brackets, which a prediction may leave out; `\{a, b\}` is not
   ordered; nor is a bare `a, b`, unless the question asks to order, rank, sort or arrange.
5. Texts of more than 2,000 characters, and lists of more than 64 items, are equal to the letter or not at all.
6. `x = 5` equals `5`, but `2x = 10` does not; equations are equal up to a constant factor; inequalities and intervals
   are sets of numbers.
7. What still looks like mathematics is computed (`mathematics`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rethinker.rewards.choices import LETTER, chosen, implied_options, options_of
from rethinker.rewards.lists import assignments, both_signs, list_items, matrix_rows, named_list, paired, split_list
from rethinker.rewards.mathematics import plain, same_equation, same_expression, spend, start_budget
from rethinker.rewards.quantities import parse_quantity, quantities_match, split_unit
from rethinker.rewards.questions import asks_for, asks_for_base, in_order_of
from rethinker.rewards.relations import (
    Intervals,
    as_intervals,
    is_name,
    names_a_set,
    names_answer,
    same_name,
    split_relation,
)
from rethinker.rewards.rules import DEFAULT_RULES, Rules
from rethinker.rewards.spelling import UNIT_MARK, clean, is_prose, same_words

# A longer prediction is an essay: it is right only if it is the answer to the letter.
LONGEST_PREDICTION = 1000
# So is any text beyond this, on either side: it is compared to the letter, since finding its parts takes its square.
LONGEST_TEXT = 2000
LONGEST_LIST = 64
# Items in all of sets within sets: every one is compared with every other.
MOST_PAIRED = 128
# What it takes to compare two texts, in operations of `mathematics`.
COST = 10

Equal = Callable[[str, str, Rules], "bool | None"]
Relation = tuple[list[str], list[str]]

_BOXED = re.compile(r"\\boxed\s*\{")
_SEPARATING = re.compile(
    r"(?:\s|[,;.$&、，。和或与]|\\\\|\\q?quad(?![a-z])|\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)+"
)
_IN_BASE = re.compile(r"\(?([0-9][0-9A-Fa-f]*|[A-Fa-f]+(?=\)?_\{?16))\)?_\{?\(?(\d+|two|three|five|eight|ten)\)?\}?")
_BASE_WORDS = {"two": "2", "three": "3", "five": "5", "eight": "8", "ten": "10"}
_SPACED_CAPITALS = re.compile(r"[A-Z](?: [A-Z])+")
_APPROXIMATELY = re.compile(
    r"^(?:=|\\approx ?|\\sim ?(?=\d)|about |approximately |约|大约)\s*|(?<=[\d\u4e00-\u9fff])(?<!上下)左右$"
)
_POINT = re.compile(r"[A-Z]'?(?=\([^()]*,[^()]*\)$)")


def extract_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}`, nested braces included; None if there is none or it never closes."""
    span = boxed_span(text)
    return span and text[_BOXED.match(text, span[0]).end() : span[1] - 1]


def boxed_span(text: str) -> tuple[int, int] | None:
    r"""Where the last `\boxed{...}` begins and ends in the text; None as for `extract_boxed`."""
    boxes = list(_BOXED.finditer(text))
    if not boxes:
        return None
    i, depth = boxes[-1].end(), 1
    while i < len(text):
        if text[i] == "\\":  # an escaped brace is a character of the answer, not a bracket
            i += 2
            continue
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return boxes[-1].start(), i + 1
        i += 1
    return None


def undecided(left: str, right: str, rules: Rules) -> bool | None:
    """An `equal` for `compare` that leaves mathematics open."""
    return None


def math_equal(predicted: str, answer: str, rules: Rules) -> bool:
    """Whether two cleaned texts are equal as formulas, or say the same as equations or inequalities."""
    if plain(predicted) == plain(answer):
        return True
    try:
        return _equal_formulas(predicted, answer, rules)
    except RecursionError:  # of a formula that is nested too deep
        return False


def _equal_formulas(predicted: str, answer: str, rules: Rules) -> bool:
    ours, theirs = split_relation(predicted), split_relation(answer)
    if not ours[1] and not theirs[1]:
        return same_expression(predicted, answer, rules)
    if len(ours[1]) != 1 or len(theirs[1]) != 1:
        return False
    left, right = (_upward(*side) for side in (ours, theirs))
    return left[1] == right[1] and same_equation(left[0], right[0], ordered=left[1] != "=")


def _upward(sides: list[str], signs: list[str]) -> tuple[tuple[str, str], str]:
    """The two sides of a relation, the smaller first, and its sign."""
    turned = {">": "<", "\\geq": "\\leq"}.get(signs[0])
    return ((sides[1], sides[0]), turned) if turned else ((sides[0], sides[1]), signs[0])


def compare(
    predicted: str, answer: str, *, question: str = "", choices: Any = None, rules: Rules = DEFAULT_RULES, equal: Equal
) -> bool | None:
    """Apply the rules of this module.

    Args:
        predicted: the content of the response's box.
        answer: the expected answer, boxed or not; of several boxes all are expected.
        question: where options, percent and ordering are looked for.
        choices: the options, if the data has them apart from the question (see `choices.options_of`).
        rules: how far rounded numbers, percent and degrees may go.
        equal: decides two mathematical expressions: `math_equal`, or `undecided` to leave them open.

    Returns:
        The verdict, or None where only `equal` could decide and it did not.
    """
    start_budget()
    predicted, answer = _unboxed(predicted), _unboxed(answer)
    if predicted.strip() == answer.strip():
        return bool(answer.strip())
    if len(predicted) > LONGEST_PREDICTION + len(answer) or len(answer) > LONGEST_TEXT:
        return False
    predicted, answer = clean(predicted), clean(answer)
    if not predicted or not answer:
        return False

    if asks_for("rounding", question):  # to the digits that are given
        rules = replace(rules, rounding=1.0)
    final = _Comparison(question, rules, equal)
    options = options_of(question, choices, lambda text: clean(text) if len(text) <= LONGEST_TEXT else text.strip())
    options = options or implied_options(answer, question)
    letter = LETTER.match(answer)
    if options or (letter and letter[1].isupper()):
        wanted = chosen(answer, options, _Comparison(question, rules, undecided).values)
        if wanted:
            named = chosen(predicted, options, final.values)
            return None if named is None else named == wanted
    return final.values(predicted, answer)


def _unboxed(text: str) -> str:
    r"""The text with what its boxes hold in their places, as 1/2 of \boxed{1}/\boxed{2}; of boxes among words, or with
    nothing between them but commas, the list of them."""
    if "\\boxed" not in text or len(text) > LONGEST_TEXT:
        return text
    contents, around = [], text  # "\0" in the place of each box
    while span := boxed_span(around):
        content = around[_BOXED.match(around, span[0]).end() : span[1] - 1]
        nested = content.count("\0")
        for inner in contents[:nested]:
            content = content.replace("\0", inner, 1)
        contents = [content, *contents[nested:]]
        around = f"{around[: span[0]]}\0{around[span[1] :]}"
    between = _SEPARATING.sub("", around.replace("\0", " "))
    if contents and (not between or is_prose(clean(between))):
        return ", ".join(contents)
    for content in contents:
        around = around.replace("\0", content, 1)
    return around


@dataclass(frozen=True)
class _Comparison:
    """Rules 1 and 3 to 7 on two cleaned texts; None where only `equal` could decide and did not."""

    question: str
    rules: Rules
    equal: Equal

    def values(self, predicted: str, answer: str, depth: int = 0) -> bool | None:
        """Whether two values are equal."""
        spend(COST)
        predicted, answer = (_APPROXIMATELY.sub("", side) for side in (predicted, answer))
        if predicted == answer:
            return True
        if max(len(predicted), len(answer)) > LONGEST_TEXT:
            return False
        left, right = parse_quantity(predicted), parse_quantity(answer)
        if left is not None and right is not None:  # before the words: 5 mW is not 5 MW
            return quantities_match(left, right, self.question, self.rules)
        if same_words(predicted, answer):
            return True
        bases = _IN_BASE.fullmatch(predicted), _IN_BASE.fullmatch(answer)
        if any(bases):
            return self._bases(predicted, answer, *bases)
        if depth > 3 or (_SPACED_CAPITALS.fullmatch(predicted) and _SPACED_CAPITALS.fullmatch(answer)):
            return False  # A B C is a sequence of names, not their product
        structured, verdict = self._parts(predicted, answer, depth + 1)
        if structured:
            return verdict

        predicted, unit = split_unit(predicted) or (predicted, "")
        answer, expected_unit = split_unit(answer) or (answer, "")
        if unit != expected_unit and ((unit and expected_unit) or "%" in (unit, expected_unit)):
            return False
        if ":" in predicted or ":" in answer:
            return self._ratios(predicted, answer, depth + 1)
        if is_prose(predicted) or is_prose(answer) or _is_point_name(predicted) or _is_point_name(answer):
            turned = predicted == answer[::-1] and len(answer) == 2 and asks_for("segment", self.question)
            return predicted == answer or (turned and _is_point_name(answer))
        if "°" in (unit, expected_unit) and unit != expected_unit:  # the unit is a factor when compared with radians
            predicted, answer = predicted + "°" * (unit == "°"), answer + "°" * (expected_unit == "°")
        return self.equal(predicted.replace(UNIT_MARK, ""), answer.replace(UNIT_MARK, ""), self.rules)

    def _parts(self, predicted: str, answer: str, depth: int) -> tuple[bool, bool | None]:
        """Whether one of the two has parts (a set, a list, a relation, a matrix), and then the verdict on these."""
        if names_a_set(predicted) or names_a_set(answer):
            ours, theirs = as_intervals(predicted), as_intervals(answer)
            if ours and theirs:
                return True, self._sets(ours, theirs, depth)
        (our_name, ours), (their_name, theirs) = named_list(predicted, self._is_name), named_list(answer, is_name)
        if our_name or their_name:
            same = not (our_name and their_name) or our_name == their_name
            return True, same and self.values(ours, theirs, depth)
        ours, theirs = assignments(predicted, self._is_name), assignments(answer, is_name)
        if ours or theirs:
            return True, self._assignments(ours, theirs, predicted, answer, depth)
        relations = split_relation(predicted), split_relation(answer)
        if any(signs for _, signs in relations) and len(split_list(predicted)) == len(split_list(answer)) == 1:
            return True, self._relations(*relations, predicted, answer, depth)
        predicted, answer = (_POINT.sub("", side) for side in (predicted, answer))
        ours, theirs = (list_items(both_signs(side)) for side in (predicted, answer))
        if ours or theirs:
            return True, self._lists(ours or ("", [predicted]), theirs or ("", [answer]), depth)
        ours, theirs = matrix_rows(predicted), matrix_rows(answer)
        if ours or theirs:
            return True, bool(ours and theirs) and self._lists(ours, theirs, depth)
        return False, None

    def _assignments(
        self, ours: list[tuple[str, str]], theirs: list[tuple[str, str]], predicted: str, answer: str, depth: int
    ) -> bool | None:
        """x=1, y=2 against the same in any order, or against values alone, which are in the order of the names."""
        if ours and theirs:
            by_name = dict(theirs)
            if by_name.keys() != dict(ours).keys():
                return False
            return self._all(self.values(value, by_name[name], depth) for name, value in ours)
        given = dict(ours)
        ours = ("()", [given[n] for n in in_order_of(list(given), self.question)]) if ours else list_items(predicted)
        theirs = ("()", [value for _, value in theirs]) if theirs else list_items(answer)
        return bool(ours and theirs) and self._lists(ours, theirs, depth)

    def _ratios(self, predicted: str, answer: str, depth: int) -> bool | None:
        """2:3 is no fraction, and no 4:6, unless the question asks for a ratio."""
        ours, theirs = (re.sub(r"(?<=\d) to (?=\d)", ":", side).split(":") for side in (predicted, answer))
        by_parts = partial(self._all, map(partial(self.values, depth=depth), ours, theirs))
        if not asks_for("ratio", self.question):
            return len(ours) == len(theirs) and by_parts()
        if {len(ours), len(theirs)} == {1, 2}:
            fractions = (side[0] if len(side) == 1 else f"\\frac{{{side[0]}}}{{{side[1]}}}" for side in (ours, theirs))
            return self.values(*fractions, depth)
        if len(ours) != len(theirs):
            return False
        if any(quantity and quantity.value == 0 for quantity in map(parse_quantity, (*ours, *theirs))):
            return by_parts()
        products = ((f"({ours[0]})({b})", f"({theirs[0]})({a})") for a, b in zip(ours[1:], theirs[1:], strict=True))
        return self._all(self.values(left, right, depth) for left, right in products)

    def _bases(self, predicted: str, answer: str, ours: re.Match[str] | None, theirs: re.Match[str] | None) -> bool:
        """101_2: digits and base; the base may be left out if the question names it, and 10 at any time."""
        if ours and theirs:
            same = _BASE_WORDS.get(ours[2], ours[2]) == _BASE_WORDS.get(theirs[2], theirs[2])
            return same and ours[1].casefold() == theirs[1].casefold()
        based, other = (ours, answer) if ours else (theirs, predicted)
        base = _BASE_WORDS.get(based[2], based[2])
        return based[1] == other and (base == "10" or asks_for_base(base, self.question))

    def _relations(self, ours: Relation, theirs: Relation, predicted: str, answer: str, depth: int) -> bool | None:
        """Rule 6 on the sides and signs of both, at least one of them a relation."""
        (sides, signs), (expected, expected_signs) = ours, theirs
        if {*signs, *expected_signs} - {"=", "\\approx"}:
            return self.equal(predicted, answer, self.rules) if signs and expected_signs else False
        if not signs:
            approximate = "\\approx" in expected_signs
            if not approximate and (not is_name(expected[0]) or re.fullmatch("[A-Za-z]", expected[-1])):
                return False  # a=b says that two are equal
            verdicts = [self.values(predicted, side, depth) for side in (expected if approximate else expected[-1:])]
            return True if True in verdicts else None if None in verdicts else False
        if expected_signs:
            if same_name(sides[0], expected[0]):
                steps = [side for side in sides[1:-1] if not self._is_name(side)]
                return self._all(self.values(side, expected[-1], depth) for side in (*steps, sides[-1]))
            return self.equal(predicted, answer, self.rules)
        # Every step of the prediction that is no name must be the answer: x = 3*4 = 12, but not 2x = 10. Of steps with
        # approximations among them one must be it, and the others be its roundings.
        steps = [side for side in sides if not self._is_name(side)] or sides[-1:]
        letters = [side for side in sides if len(side) == 1 and side not in steps]
        if any(
            re.search(rf"(?<![A-Za-z\\]){re.escape(letter)}(?![A-Za-z])", step) for letter in letters for step in steps
        ):
            return False  # x = 2x+3 is an equation
        exact = [self.values(side, answer, depth) for side in steps]
        if "\\approx" not in signs or True not in exact:
            return self._all(exact)
        others = [side for side, verdict in zip(steps, exact, strict=True) if verdict is not True]
        return self._all(self._rounds(side, answer, depth) for side in others)

    def _rounds(self, side: str, answer: str, depth: int) -> bool | None:
        """Whether a number is one of which the answer is the rounding, or the other way round."""
        numbers = parse_quantity(side), parse_quantity(answer)
        if None not in numbers:
            step = max(number.step or (number.value.denominator == 1) for number in numbers)
            return 2 * abs(numbers[0].value - numbers[1].value) <= step
        return replace(self, rules=replace(self.rules, rounding=1.0)).values(side, answer, depth)

    def _is_name(self, text: str) -> bool:
        """Whether a side of the prediction's equation only names the answer, and not another quantity."""
        return names_answer(text, self.question)

    def _sets(self, ours: Intervals, theirs: Intervals, depth: int) -> bool | None:
        """Rule 6 on the variables, where they are named, and the intervals of both."""
        if (ours[0] and theirs[0] and ours[0] != theirs[0]) or len(ours[1]) != len(theirs[1]):
            return False

        def same(left: tuple[str, ...], right: tuple[str, ...]) -> bool | None:
            if (left[0], left[3]) != (right[0], right[3]):
                return False
            return self._all(self.values(clean(left[i]), clean(right[i]), depth) for i in (1, 2))

        return paired(ours[1], theirs[1], same)

    def _lists(self, ours: tuple[str, list[str]], theirs: tuple[str, list[str]], depth: int) -> bool | None:
        """Rule 4 on the prediction's and the answer's brackets and items."""
        (our_brackets, predicted), (brackets, answer) = ours, theirs
        if len(predicted) != len(answer) or len(answer) > LONGEST_LIST:
            return False
        place = asks_for("place", self.question) and not asks_for("interval", self.question)
        if {our_brackets, brackets} == {"()", "[]"} and (len(answer) != 2 or place):
            our_brackets = brackets  # coordinates, not an interval
        if our_brackets and our_brackets not in ((brackets,) if brackets else ("()", "[]", "{}")):
            return False
        kind = brackets or our_brackets
        if kind == "{}" or (kind == "" and not self._in_order(answer)):
            # Of sets within sets every item of the one is compared with every item of the other.
            nested = [side for side in (predicted, answer) if any("\\{" in item for item in side)]
            if any(sum(map(",".join(side).count, ",;")) > MOST_PAIRED for side in nested):
                return False
            return paired(predicted, answer, partial(self.values, depth=depth))
        return self._all(self.values(p, a, depth) for p, a in zip(predicted, answer, strict=True))

    def _in_order(self, answer: list[str]) -> bool:
        """Whether the order of a bare list counts: the question asks for one, and the numbers expected are in one.

        What was put in order may have numbers itself: those are in any.
        """
        if asks_for("places", self.question) or asks_for("arrangement", self.question):
            return True
        if not asks_for("order", self.question):
            return False
        numbers = [parse_quantity(item) for item in answer]
        if None in numbers:
            return True
        values = [number.value for number in numbers]
        return values in (sorted(values), sorted(values, reverse=True))

    @staticmethod
    def _all(verdicts: Iterable[bool | None]) -> bool | None:
        """Whether all hold; None if that hangs on open ones."""
        undecided_ones = False
        for verdict in verdicts:
            if verdict is False:
                return False
            undecided_ones |= verdict is None
        return None if undecided_ones else True


def _is_point_name(text: str) -> bool:
    """Whether a text is a name of points such as AD: as a whole it is compared to the letter."""
    return len(text) > 1 and text.isascii() and text.isalpha() and text.isupper()
