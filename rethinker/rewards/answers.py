r"""Whether a predicted answer equals the expected one: words, choices, quantities, lists, mathematics.

The rules, on both sides freed of LaTeX dressing such as `$..$` and `\text{}`:
1. Equal words are equal; case, spacing and a final period do not count.
2. If the question has options, an answer stands for the option it names (see `choices`), whole answers only.
3. Quantities are exact (1,234 = 1234 = 1.234e3, 0.5 = 1/2); a fraction equals its decimal when they agree to 2e-6. One
   side may leave the unit out; two different units are never equal, nor is 5 equal to 5 million.
   Percent: an answer of 50% accepts 50%, 50 and 0.5. An answer of 50 accepts 50% only if the question speaks of
   percent, and an answer of 0.5 does not accept 50%.
4. Lists: `(a, b)` and `[a, b]` are ordered and keep their brackets, which a prediction may leave out; `\{a, b\}` is not
   ordered; nor is a bare `a, b`, unless the question asks to order, rank, sort or arrange.
5. Texts of more than 2,000 characters, and lists of more than 64 items, are equal to the letter or not at all.
6. `x = 5` equals `5`. What still looks like mathematics is left to math-verify: it can take arbitrarily long, so
   callers bound it from outside (`checker.AnswerChecker`).

Only the standard library is imported until rule 6 is reached, so a checking process starts light.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from rethinker.rewards.choices import LETTER, chosen, options_of
from rethinker.rewards.quantities import parse_quantity, quantities_match, split_unit

# A longer prediction is an essay: it is right only if it is the answer to the letter.
LONGEST_PREDICTION = 1000
# So is any text beyond this, on either side: it is compared to the letter, since finding its parts takes its square.
LONGEST_TEXT = 2000
LONGEST_LIST = 64
# Items in all of sets within sets: every one is compared with every other.
MOST_PAIRED = 128

Equal = Callable[[str, str], "bool | None"]

_BOXED = re.compile(r"\\boxed\s*\{")
_WRAPPERS = re.compile(
    r"\\(?:text|textbf|textit|textrm|texttt|mathrm|mathbf|mathit|mathsf|mbox|operatorname|bm|boldsymbol|emph)\s*\{([^{}]*)\}"
)
_SPELLINGS = [  # LaTeX and Unicode spellings of the same thing
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"(?<=\d)(?:\{,\}|,\\!)(?=\d)"), ","),
    (re.compile(r"(?<=\d)\\[,!;](?=\d)"), ""),
    (re.compile(r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z])"), "°"),
    (re.compile(r"\\le(?![A-Za-z])|≤"), r"\\leq "),
    (re.compile(r"\\ge(?![A-Za-z])|≥"), r"\\geq "),
    (re.compile(r"[−–—]"), "-"),
    (re.compile(r"×"), r"\\times "),
    (re.compile(r"[·⋅]"), r"\\cdot "),
    (re.compile(r"÷"), "/"),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"∞|(?<![A-Za-z\\])infinity(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"√\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"√\s*(\d+|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"²"), "^2"),
    (re.compile(r"³"), "^3"),
]
_IDLE_SPACES = re.compile(r"\s*([=+\-*/^:;<>|])\s*|([(\[{])\s+|\s+([)\]}])|\s+(\{)")
_COMMA_SPACES = re.compile(r"\s+,\s*|(?<!\d),\s+|,\s+(?!\d)")  # but "1, 234" are two numbers and "1,234" is one
_SUBSCRIPTS = re.compile(r"_(?:\{(\w+)\}|(\w))")  # H_2O is H2O
_ASKS_FOR_ORDER = re.compile(r"\b(?:order|rank|sort|arrang|sequence)", re.IGNORECASE)
_ASSIGNMENT = re.compile(
    r"([A-Za-z]\w{0,2}|[A-Za-z]\([a-z]\)|\\[a-z]+(?:_\w)?|\\angle ?[A-Z]{1,3})\s*(?:=|\\in(?![a-z]))\s*([^=]+)",
    re.DOTALL,
)
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_SEPARATORS = re.compile(r"[,;]|\s+(?:and|or)\s+")
_ENVIRONMENTS = re.compile(r"\\(?:begin|end)\{[a-z]+\*?\}")
# Words that mathematics is written with; any other word of three letters or more is prose.
_MATH_WORDS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log exp lim max min sqrt gcd lcm det mod inf".split()
)
_SHORT_WORDS = frozenset("no on in up to of or at it is us we he me my by if so as an do go am pm ok".split())


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


def undecided(left: str, right: str) -> bool | None:
    """An `equal` for `compare` that leaves mathematics open."""
    return None


def math_equal(predicted: str, answer: str) -> bool:
    """Whether math-verify holds two expressions equal. May take arbitrarily long: run it where it can be killed."""
    from math_verify import LatexExtractionConfig, parse, verify

    # Its own timeouts stay off: they use SIGALRM, which fails off the main thread. It would warn about that.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    config = [LatexExtractionConfig(boxed_match_priority=-1)]
    sides = [
        parse(f"${_latex(side)}$", extraction_config=config, fallback_mode="no_fallback", parsing_timeout=None)
        for side in (answer, predicted)
    ]
    return all(sides) and bool(verify(*sides, timeout_seconds=None))


def compare(predicted: str, answer: str, *, question: str = "", choices: Any = None, equal: Equal) -> bool | None:
    """Apply the rules of this module.

    Args:
        predicted: the content of the response's box.
        answer: the expected answer, boxed or not.
        question: where options, percent and ordering are looked for.
        choices: the options, if the data has them apart from the question (see `choices.options_of`).
        equal: decides two mathematical expressions: `math_equal`, or `undecided` to leave them open.

    Returns:
        The verdict, or None where only `equal` could decide and it did not.
    """
    if "\\boxed" in answer:
        unwrapped = extract_boxed(answer)
        answer = answer if unwrapped is None else unwrapped
    if predicted.strip() == answer.strip():
        return bool(answer.strip())
    if len(predicted) > LONGEST_PREDICTION + len(answer) or len(answer) > LONGEST_TEXT:
        return False
    predicted, answer = clean(predicted), clean(answer)
    if not predicted or not answer:
        return False

    options = options_of(question, choices, lambda text: clean(text) if len(text) <= LONGEST_TEXT else text.strip())
    letter = LETTER.match(answer)
    if options or (letter and letter[1].isupper()):
        wanted = chosen(answer, options, lambda text, option: _values_match(text, option, question, undecided))
        if wanted:
            named = chosen(predicted, options, lambda text, option: _values_match(text, option, question, equal))
            return None if named is None else named == wanted
    return _values_match(predicted, answer, question, equal)


@lru_cache(maxsize=65536)
def clean(text: str) -> str:
    """Free an answer of LaTeX and Markdown dressing, of spaces that mean nothing and of the final period."""
    text = text.strip()
    if len(text) > 4 and text.startswith("**") and text.endswith("**"):
        text = text[2:-2]
    text = text.replace("\\$", "\0")
    if text.count("$") % 2 == 0:  # a single one is a currency sign
        text = text.replace("$", "")
    text = text.replace("\0", "$")
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    for _ in range(3):  # wrappers nest, as in \textbf{\text{B}}
        text, found = _WRAPPERS.subn(r"\1", text)
        if not found:
            break
    text = _COMMA_SPACES.sub(",", _IDLE_SPACES.sub(r"\1\2\3\4", " ".join(text.split()))).strip().rstrip(". ")
    while len(text) > 1 and text[0] == "{" and _closing(text) == len(text) - 1:
        text = text[1:-1].strip().rstrip(". ")
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'`":
        text = text[1:-1].strip().rstrip(". ")
    return text


def _values_match(predicted: str, answer: str, question: str, equal: Equal, depth: int = 0) -> bool | None:
    """Rules 1 and 3 to 6 on two cleaned texts."""
    if predicted == answer:
        return True
    if max(len(predicted), len(answer)) > LONGEST_TEXT:
        return False
    left, right = parse_quantity(predicted), parse_quantity(answer)
    if left is not None and right is not None:  # before the words: 5 mW is not 5 MW
        return quantities_match(left, right, question)
    if _SUBSCRIPTS.sub(r"\1\2", predicted).casefold() == _SUBSCRIPTS.sub(r"\1\2", answer).casefold():
        return True
    if depth > 3:
        return False

    assigned, expected = _ASSIGNMENT.fullmatch(predicted), _ASSIGNMENT.fullmatch(answer)
    if assigned and expected and assigned[1] == expected[1]:
        return _values_match(assigned[2], expected[2], question, equal, depth + 1)
    if assigned and "=" not in answer:
        return _values_match(assigned[2], answer, question, equal, depth + 1)
    if expected and "=" not in predicted:
        return _values_match(predicted, expected[2], question, equal, depth + 1)

    if "\\pm" not in predicted and "\\pm" not in answer:
        ours, theirs = _listed(predicted), _listed(answer)
        if ours or theirs:
            return _lists_match(ours or ("", [predicted]), theirs or ("", [answer]), question, equal, depth + 1)

    predicted, unit = split_unit(predicted) or (predicted, "")
    answer, expected_unit = split_unit(answer) or (answer, "")
    if unit and expected_unit and unit != expected_unit:
        return False
    if "%" in (unit, expected_unit) or (":" in predicted) != (":" in answer):  # 2:3 is no fraction
        return False
    if _is_prose(predicted) or _is_prose(answer):
        return predicted == answer
    return equal(predicted, answer)


def _is_prose(text: str) -> bool:
    """Whether a text has words that are no mathematics; math-verify would multiply their letters."""
    if any(c.isalpha() and not c.isascii() and not "\u0370" <= c <= "\u03ff" for c in text):  # Greek is mathematics
        return True
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", _ENVIRONMENTS.sub("", text))
    if any(len(word) > 2 and word not in _MATH_WORDS for word in words):
        return True
    return bool(words) and all(word.casefold() in _SHORT_WORDS for word in words) and not re.search(r"[\d\\=^+]", text)


def _listed(text: str) -> tuple[str, list[str]] | None:
    r"""A list's brackets ("", "()", "[)", "{}", ...) and items, or None for anything else."""
    if "\\begin" in text or parse_quantity(text) is not None:
        return None
    brackets, inner = "", text
    if text[:2] == "\\{" and text[-2:] == "\\}" and _closing(text) == len(text) - 1:
        brackets, inner = "{}", text[2:-2]
    elif text[:1] in ("(", "[") and _closing(text) == len(text) - 1:
        brackets, inner = text[0] + text[-1], text[1:-1]
    items = _split(inner)
    if brackets == "()" and len(items) == 1:
        return "", items
    return (brackets, items) if brackets or len(items) > 1 else None


def _split(text: str) -> list[str]:
    """The parts of a text between commas, semicolons, "and" and "or" that stand in no bracket."""
    if ", " in text:  # then a bare comma within digits separates thousands
        text = _THOUSANDS.sub("", text)
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        elif depth == 0 and (separator := _SEPARATORS.match(text, i)):
            parts.append(text[start:i])
            start = i = separator.end()
            continue
        i += 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip() not in ("", "and", "or")]


def _closing(text: str) -> int:
    """Where the bracket that opens a text is closed (by any bracket: intervals are half open); -1 if nowhere."""
    depth = 0
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if depth == 0 and char in ")]}":
            return i
    return -1


def _lists_match(
    ours: tuple[str, list[str]], theirs: tuple[str, list[str]], question: str, equal: Equal, depth: int
) -> bool | None:
    """Rule 4 on the prediction's and the answer's brackets and items."""
    (our_brackets, predicted), (brackets, answer) = ours, theirs
    if len(predicted) != len(answer) or len(answer) > LONGEST_LIST:
        return False
    if our_brackets and our_brackets not in ((brackets,) if brackets else ("()", "[]", "{}")):
        return False
    kind = brackets or our_brackets
    if kind == "{}" or (kind == "" and not _ASKS_FOR_ORDER.search(question)):
        # Of sets within sets every item of the one is compared with every item of the other.
        nested = [side for side in (predicted, answer) if any("\\{" in item for item in side)]
        if any(sum(map(",".join(side).count, ",;")) > MOST_PAIRED for side in nested):
            return False
        return _matched(predicted, answer, lambda p, a: _values_match(p, a, question, equal, depth))
    open_ones = False
    for p, a in zip(predicted, answer, strict=True):
        verdict = _values_match(p, a, question, equal, depth)
        if verdict is False:
            return False
        open_ones |= verdict is None
    return None if open_ones else True


def _matched(predicted: list[str], answer: list[str], same: Equal) -> bool | None:
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


def _latex(text: str) -> str:
    """A cleaned text in the LaTeX that math-verify reads: plain-text functions, powers and products spelled out."""
    text = re.sub(r"(?<![\\A-Za-z])sqrt\(([^()]*)\)", r"\\sqrt{\1}", text.replace("**", "^").replace("°", ""))
    text = re.sub(r"(?<![\\A-Za-z])(sin|cos|tan|log|ln|exp|pi)(?![a-z])", r"\\\1 ", text)
    return text.replace("*", "\\cdot ").replace("%", "\\%")
