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
from rethinker.rewards.lists import both_signs, list_items, matrix_rows, named_list, paired, split_list
from rethinker.rewards.mathematics import plain, same_equation, same_expression, start_budget
from rethinker.rewards.quantities import parse_quantity, quantities_match, split_unit
from rethinker.rewards.relations import as_intervals, is_name, names_a_set, split_relation
from rethinker.rewards.rules import DEFAULT_RULES, Rules
from rethinker.rewards.spelling import UNIT_MARK, clean, is_prose, same_words

# A longer prediction is an essay: it is right only if it is the answer to the letter.
LONGEST_PREDICTION = 1000
# So is any text beyond this, on either side: it is compared to the letter, since finding its parts takes its square.
LONGEST_TEXT = 2000
LONGEST_LIST = 64
# Items in all of sets within sets: every one is compared with every other.
MOST_PAIRED = 128

Equal = Callable[[str, str, Rules], "bool | None"]
Relation = tuple[list[str], list[str]]

_BOXED = re.compile(r"\\boxed\s*\{")
_ASKS_FOR_ORDER = re.compile(
    r"\b(?:arrange|rank|sort|list the steps)\b(?! of)|\border (?:the|these|them|from|by)\b"
    r"|\bin (?:an? |the )?(?:(?:\w+ing|alphabetical|chronological|numerical|correct|right|reverse) )?order\b(?! to)"
    r"|\bfrom (?:the )?(?:least|greatest|smallest|largest|lowest|highest|shortest|longest|lightest|heaviest|oldest"
    r"|youngest|first|left|top)\b.{0,40}\bto\b|\bsequence of (?:steps|events|letters|moves)\b|排序|排列|顺序",
    re.IGNORECASE,
)
_ASKS_FOR_PLACE = re.compile(r"\b(?:box|bbox|bounding|coordinates?|points?|position|pixels?|locat\w+|vector)\b", re.I)
_ASKS_FOR_BASE = re.compile(r"\bbase\b|\bbinary\b|\bhexadecimal\b|\boctal\b|进制", re.IGNORECASE)
_ASKS_FOR_ROUNDING = re.compile(
    r"\bround|\bnearest\b|\bdecimal places?\b|\bsignificant\b|\bapproximat|保留", re.IGNORECASE
)
_ASKS_FOR_RATIO = re.compile(r"\bratios?\b|\bproportion|比", re.IGNORECASE)
_ASKS_FOR_SEGMENT = re.compile(r"\b(?:segment|line)s?\b", re.IGNORECASE)
_IN_BASE = re.compile(r"\(?([0-9A-Fa-f]+)\)?_(?:\{(\d+)\}|(\d+))")
_APPROXIMATELY = re.compile(r"^(?:\\approx ?|\\sim ?|about |approximately )")
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

    if _ASKS_FOR_ROUNDING.search(question):  # to the digits that are given
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


def _unboxed(answer: str) -> str:
    r"""What a boxed answer holds; \boxed{1},\boxed{2} as the list of both."""
    if "\\boxed" not in answer:
        return answer
    contents, rest = [], answer
    while span := boxed_span(rest):
        contents.insert(0, rest[_BOXED.match(rest, span[0]).end() : span[1] - 1])
        rest = rest[: span[0]] + "\0" + rest[span[1] :]
    if len(contents) > 1 and re.fullmatch(r"[\s\0,;.$、，和]*(?:(?:and|or)?[\s\0,;.$、，和]*)*", rest):
        return ", ".join(contents)
    return contents[-1] if contents else answer


@dataclass(frozen=True)
class _Comparison:
    """Rules 1 and 3 to 7 on two cleaned texts; None where only `equal` could decide and did not."""

    question: str
    rules: Rules
    equal: Equal

    def values(self, predicted: str, answer: str, depth: int = 0) -> bool | None:
        """Whether two values are equal."""
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
        if depth > 3:
            return False

        if names_a_set(predicted) or names_a_set(answer):
            ours, theirs = as_intervals(predicted), as_intervals(answer)
            if ours and theirs:
                return self._sets(ours, theirs, depth + 1)
        (our_name, ours), (their_name, theirs) = (named_list(side, self.question) for side in (predicted, answer))
        if our_name or their_name:
            same = not (our_name and their_name) or our_name == their_name
            return same and self.values(ours, theirs, depth + 1)
        if len(split_list(predicted)) == len(split_list(answer)) == 1 and (
            split_relation(predicted)[1] or split_relation(answer)[1]
        ):
            return self._relations(split_relation(predicted), split_relation(answer), predicted, answer, depth + 1)
        predicted, answer = (_POINT.sub("", side) for side in (predicted, answer))
        ours, theirs = (list_items(both_signs(side)) for side in (predicted, answer))
        if ours or theirs:
            return self._lists(ours or ("", [predicted]), theirs or ("", [answer]), depth + 1)
        ours, theirs = matrix_rows(predicted), matrix_rows(answer)
        if ours or theirs:
            return bool(ours and theirs) and self._lists(ours, theirs, depth + 1)

        predicted, unit = split_unit(predicted) or (predicted, "")
        answer, expected_unit = split_unit(answer) or (answer, "")
        if unit and expected_unit and unit != expected_unit:
            return False
        if "%" in (unit, expected_unit) and unit != expected_unit:
            return False
        if ":" in predicted or ":" in answer:
            return self._ratios(predicted, answer, depth + 1)
        if is_prose(predicted) or is_prose(answer) or _is_point_name(predicted) or _is_point_name(answer):
            turned = predicted == answer[::-1] and len(answer) == 2 and _ASKS_FOR_SEGMENT.search(self.question)
            return predicted == answer or bool(turned and _is_point_name(answer))
        if "°" in (unit, expected_unit) and unit != expected_unit:  # the unit is a factor when compared with radians
            predicted, answer = predicted + "°" * (unit == "°"), answer + "°" * (expected_unit == "°")
        return self.equal(predicted.replace(UNIT_MARK, ""), answer.replace(UNIT_MARK, ""), self.rules)

    def _ratios(self, predicted: str, answer: str, depth: int) -> bool | None:
        """2:3 is no fraction, and no 4:6, unless the question asks for a ratio."""
        ours, theirs = (re.sub(r"(?<=\d) to (?=\d)", ":", side).split(":") for side in (predicted, answer))
        if not _ASKS_FOR_RATIO.search(self.question):
            return len(ours) == len(theirs) and self._all(map(partial(self.values, depth=depth), ours, theirs))
        if {len(ours), len(theirs)} == {1, 2}:
            ours, theirs = (
                side[0] if len(side) == 1 else f"\\frac{{{side[0]}}}{{{side[1]}}}" for side in (ours, theirs)
            )
            return self.values(ours, theirs, depth)
        if len(ours) != len(theirs):
            return False
        products = ((f"({ours[0]})({b})", f"({theirs[0]})({a})") for a, b in zip(ours[1:], theirs[1:], strict=True))
        return self._all(self.values(left, right, depth) for left, right in products)

    def _bases(self, predicted: str, answer: str, ours: re.Match[str] | None, theirs: re.Match[str] | None) -> bool:
        """101_2: digits and base; the base may be left out if the question names it, and 10 at any time."""
        if ours and theirs:
            return ours[1].casefold() == theirs[1].casefold() and (ours[2] or ours[3]) == (theirs[2] or theirs[3])
        based, plain = (ours, answer) if ours else (theirs, predicted)
        named = (based[2] or based[3]) == "10" or (theirs is not None and _ASKS_FOR_BASE.search(self.question))
        return bool(named) and based[1] == plain

    def _relations(self, ours: Relation, theirs: Relation, predicted: str, answer: str, depth: int) -> bool | None:
        """Rule 6 on the sides and signs of both, at least one of them a relation."""
        (sides, signs), (expected, expected_signs) = ours, theirs
        if {*signs, *expected_signs} - {"=", "\\approx"}:
            return self.equal(predicted, answer, self.rules) if signs and expected_signs else False
        if not signs:
            if not is_name(expected[0], self.question) and "\\approx" not in expected_signs:
                return False
            accepted = expected if "\\approx" in expected_signs else expected[-1:]
            verdicts = [self.values(predicted, side, depth) for side in accepted]
            return True if True in verdicts else None if None in verdicts else False
        if expected_signs:
            if "".join(sides[0].split()) == "".join(expected[0].split()) and is_name(sides[0], self.question):
                return self.values(sides[-1], expected[-1], depth)
            return self.equal(predicted, answer, self.rules)
        # Every step of the prediction that is no name must be the answer: x = 3*4 = 12, but not 2x = 10.
        loose = replace(self, rules=replace(self.rules, rounding=1.0))
        values = [
            (sign, side) for sign, side in zip(("=", *signs), sides, strict=True) if not is_name(side, self.question)
        ]
        (_, first), *others = values or [("=", sides[-1])]
        further = ((loose if sign == "\\approx" else self).values(side, answer, depth) for sign, side in others)
        return self._all((self.values(first, answer, depth), *further))

    def _sets(self, ours: Any, theirs: Any, depth: int) -> bool | None:
        if ours[0] and theirs[0] and ours[0] != theirs[0]:
            return False
        if len(ours[1]) != len(theirs[1]):
            return False

        def same(left: tuple[str, ...], right: tuple[str, ...]) -> bool | None:
            if (left[0], left[3]) != (right[0], right[3]):
                return False
            return self._all(self.values(clean(left[i]), clean(right[i]), depth) for i in (1, 2))

        return paired(ours[1], theirs[1], same)

    @staticmethod
    def _all(verdicts: Iterable[bool | None]) -> bool | None:
        """Whether all hold; None if that hangs on open ones."""
        undecided_ones = False
        for verdict in verdicts:
            if verdict is False:
                return False
            undecided_ones |= verdict is None
        return None if undecided_ones else True

    def _lists(self, ours: tuple[str, list[str]], theirs: tuple[str, list[str]], depth: int) -> bool | None:
        """Rule 4 on the prediction's and the answer's brackets and items."""
        (our_brackets, predicted), (brackets, answer) = ours, theirs
        if len(predicted) != len(answer) or len(answer) > LONGEST_LIST:
            return False
        if {our_brackets, brackets} == {"()", "[]"} and (len(answer) != 2 or _ASKS_FOR_PLACE.search(self.question)):
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
        """Whether the order of a bare list counts: the question asks for one, and the numbers expected are in one."""
        if not _ASKS_FOR_ORDER.search(self.question):
            return False
        numbers = [parse_quantity(item) for item in answer]
        if None in numbers:
            return True
        values = [number.value for number in numbers]
        return values in (sorted(values), sorted(values, reverse=True))


def _is_point_name(text: str) -> bool:
    """Whether a text is a name of points such as AD: as a whole it is compared to the letter."""
    return len(text) > 1 and text.isascii() and text.isalpha() and text.isupper()
