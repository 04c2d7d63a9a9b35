"""The options of a multiple-choice question, and which of them an answer names.

An answer names an option by its letter (`B`, `(B)`, `option B`), by letter and text (`B. Paris`) or by its whole text
(`Paris`); never by a prefix.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from rethinker.rewards.spelling import FULL_WIDTH, same_words

LETTER = re.compile(
    r"^(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?:?\s*|故?选(?:择|项)?:?\s*)?[(\[<]?([A-Z])[)\]>]?[.:]?"
    r"(?: is (?:correct|right|the (?:correct )?answer))?$",
    re.IGNORECASE,
)
_LETTER_AND_TEXT = re.compile(
    r"^(?:[(\[]([A-Z])[)\]]|([A-Z])[.:)])(?:[.:](?!\d))?\s*(\S.*)$", re.IGNORECASE | re.DOTALL
)
_LETTER_SPACE_TEXT = re.compile(r"^([A-Z]) +(\S.*)$", re.DOTALL)
# A further label in the text after one: (A) or (B), A: 5, B: 6.
_FURTHER_LABEL = re.compile(
    r"(?<![A-Za-z])(?:[(\[][A-J][)\]]|[A-J][.:)]|(?:or|and)\s*[A-J](?![A-Za-z]))|[,;/]\s*[A-J](?![A-Za-z])"
)
_OTHER_LETTER = re.compile(r"(?<![A-Za-z\\])[A-HJ](?![A-Za-z])")
_DENIED = re.compile(r"\b(?:not|wrong|incorrect|false|maybe)\b", re.IGNORECASE)
_SEVERAL_LETTERS = re.compile(r"^[(\[]?[A-Z][)\]]?(?:(?:[,;/]|\\?&|,?\s*and\s*|\s*)[(\[]?[A-Z][)\]]?)+[)\]]?$")
_MARKERS = [
    re.compile(r"(?m)^[ \t]*(?:[-*][ \t]+)?\**([A-Z])\**[ \t]*[.):、][ \t]*"),  # A. / A) / A: at the start of lines
    re.compile(r"(?<![A-Za-z\\])[(]([A-Z])[)]\s*"),  # (A) anywhere
    re.compile(r"(?:(?<=\s)|^)([A-Z])[.):]\s+"),  # A. or A) within a line
    re.compile(r"(?<![A-Za-z])([A-Z])[.):、](?=\S)"),  # A.dog B.cat
    re.compile(r"(?<![A-Za-z\\])\[([A-Z])\]\s*"),  # [A] dog [B] cat
    re.compile(r"(?<![A-Za-z\\])\(([a-z])\)\s*"),  # (a) dog (b) cat
    re.compile(r"(?:(?<=\s)|^)([a-z])[.)]\s*(?=\S)"),  # a) dog b) cat
    re.compile(r"(?m)^([A-Z])[ \t]+(?=\S)"),  # A dog at the start of lines
]
# Python's parser takes time and memory for every character of the text.
LONGEST_CHOICES = 20_000
_DRESSED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|bf)\s*\{\s*(\([A-Z]\))(?:\s|\\ )*\}")
_SPACES = re.compile(r"\\q?quad(?![A-Za-z])|\\ ")
_ABOUT_OPTIONS = re.compile(r"\boptions?\b|\bchoices?\b|\bselect all\b|\bwhich of the\b|多选|选项", re.IGNORECASE)
_GLUED = re.compile(r"(-?\d+(?:\.\d+)?)([A-Za-z])")
_AS_UNITS = frozenset("mgshLNJWVAK")
_RATIO = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)")
# As in `spelling`, but for the mark that stands behind a letter in Chinese.
_MARKS = {code: char for code, char in FULL_WIDTH.items() if char != ","} | {ord("、"): "."}
# Letters that stand for a choice even if the options are in the image; X or N is rather a variable.
_LIKELY = "ABCDEFGHIJ"


def options_of(question: str, choices: Any, clean: Callable[[str], str]) -> dict[str, str]:
    """Letter to cleaned text of each option, "" if all are their letters alone; empty for an open question.

    Args:
        question: searched for `(A) ...` or `A. ...` where `choices` says nothing.
        choices: a list of texts, a mapping from letters, or either written as a Python or JSON string (as MMMU does).
        clean: normalises a text.
    """
    if isinstance(choices, str):
        choices = _read(choices)
    if isinstance(choices, Mapping):
        options = {str(k).upper(): clean(str(v)) for k, v in choices.items() if len(str(k)) == 1 and str(k).isalpha()}
    elif isinstance(choices, Sequence) and not isinstance(choices, bytes) and 1 < len(choices) <= 26:
        options = {}
        for i, text in enumerate(choices):
            letter = chr(ord("A") + i)
            labelled = _LETTER_AND_TEXT.match(str(text).translate(_MARKS).strip())
            own_label = labelled and (labelled[1] or labelled[2]).upper() == letter
            options[letter] = clean(labelled[3] if own_label else str(text))
    else:
        options = {letter: clean(text) for letter, text in _in_question(question)}
    labels = {letter: LETTER.match(text) for letter, text in options.items()}
    if all(label and label[1].upper() == letter for letter, label in labels.items()):
        return dict.fromkeys(options, "")
    return options


def implied_options(answer: str, question: str) -> dict[str, str]:
    """The options that an answer tells of: `B. Paris` of one, and AC of letters where the question is about options."""
    if _SEVERAL_LETTERS.match(answer) and _ABOUT_OPTIONS.search(question):
        return dict.fromkeys(_LIKELY, "")
    found = _LETTER_AND_TEXT.match(answer)
    if found is None or (found[1] or found[2]) not in _LIKELY or _FURTHER_LABEL.search(found[3]):
        return {}
    return {found[1] or found[2]: found[3]}


def _read(choices: str) -> Any:
    """Options written as text; None for what is none, or too long to be."""
    if len(choices) > LONGEST_CHOICES:
        return None
    try:
        return ast.literal_eval(choices)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


@lru_cache(maxsize=4096)
def _in_question(question: str) -> tuple[tuple[str, str], ...]:
    """The longest run A, B, C, ... of option marks in a question, each with the text that follows it."""
    question = _SPACES.sub(" ", _DRESSED.sub(r"\1", question.translate(_MARKS)))
    best: list[re.Match[str]] = []
    for marker in _MARKERS:
        run: list[re.Match[str]] = []
        for mark in marker.finditer(question):
            if ord(mark[1].upper()) == ord("A") + len(run):
                run.append(mark)
            elif mark[1].upper() == "A":
                run = [mark]
            if len(run) > max(len(best), 1):
                best = list(run)
        if best:
            break
    ends = [mark.start() for mark in best[1:]] + [len(question)] * bool(best)
    texts = [question[mark.end() : end].strip() for mark, end in zip(best, ends, strict=True)]
    if texts:  # what follows the last option on later lines is not part of it
        texts[-1] = texts[-1].split("\n")[0]
    return tuple((mark[1].upper(), text.strip().rstrip(",;")) for mark, text in zip(best, texts, strict=True))


def chosen(text: str, options: dict[str, str], same: Callable[[str, str], bool | None]) -> frozenset[str] | None:
    """The letters that a cleaned answer names; the empty set if none, None where only `same` could decide and did not.

    `same` compares an answer's text with an option's text. A letter with another option's text names nothing. Of
    options with one text the first stands for all.
    """
    letters = _letters(text, options, same)
    if letters is None:
        return None
    return frozenset(
        next(a for a in options if options[a] == options[b] != "" or a == b) if options else b for b in letters
    )


def _letters(text: str, options: dict[str, str], same: Callable[[str, str], bool | None]) -> set[str] | None:
    relabelled = {a for a, option in options.items() if (label := LETTER.match(option)) and label[1].upper() in options}
    if relabelled:  # options such as (c), (a), (b): what is written like one is that one
        written = {letter for letter in relabelled if options[letter] == text}
        if written:
            return written
    if len(text) > 1 and text.isalpha() and text in options.values():
        return {letter for letter, option in options.items() if option == text}  # AB, where options are names of points
    letter = LETTER.match(text)
    bare = len(text) == 1 and text.islower()  # without options rather a variable
    if letter and (letter[1].upper() in options or (not options and not bare and letter[1].upper() in _LIKELY)):
        return {letter[1].upper()}
    if options and _SEVERAL_LETTERS.match(text):
        letters = [c for c in text if c.isupper()]
        if len(set(letters)) == len(letters) and set(letters) <= options.keys():
            return set(letters)
    labelled = _LETTER_AND_TEXT.match(text)
    if labelled:
        letter, rest = (labelled[1] or labelled[2]).upper(), labelled[3]
        expected = options.get(letter)
        if expected == "" or (not options and letter in _LIKELY):  # the options' texts are in the image
            hedged = _FURTHER_LABEL.search(rest) or _OTHER_LETTER.search(rest) or _DENIED.search(rest)
            return set() if hedged else {letter}
        if expected is not None:
            verdict = _verdicts(rest, {letter: expected}, same)[letter]
            return None if verdict is None else {letter} if verdict else set()
    spaced = _LETTER_SPACE_TEXT.match(text)
    if spaced and (expected := options.get(spaced[1])) is not None:  # (unless A is an article)
        plain = re.fullmatch(r"(?:[\d(.+-]|\\(?:frac|sqrt|pi)).*", spaced[2])
        if expected == "" and plain and not _OTHER_LETTER.search(spaced[2]):
            return {spaced[1]}
        if expected and same(spaced[2], expected):
            return {spaced[1]}
    verbatim = {letter for letter, option in options.items() if option == text} or {
        letter for letter, option in options.items() if same_words(option, text)
    }
    if verbatim:
        return verbatim
    verdicts = _verdicts(text, options, same)
    if None in verdicts.values():
        return None
    return {letter for letter, verdict in verdicts.items() if verdict}


def _verdicts(text: str, options: dict[str, str], same: Callable[[str, str], bool | None]) -> dict[str, bool | None]:
    """Which options a text equals. Where it equals none as it stands, a letter glued to a number may be its unit (34m),
    and among ratios alone a fraction is one (1/3 for 1:3)."""
    verdicts = {letter: same(text, option) for letter, option in options.items()}
    if any(verdict is not False for verdict in verdicts.values()):
        return verdicts
    for readable in (_GLUED, _RATIO):
        found = {letter: readable.fullmatch(option) for letter, option in options.items()}
        if not all(found.values()):
            continue
        if readable is _RATIO:
            plain = {letter: f"{match[1]}/{match[2]}" for letter, match in found.items()}
        elif re.fullmatch(r"-?\d+(?:\.\d+)?", text) and {match[2] for match in found.values()} <= _AS_UNITS:
            plain = {letter: match[1] for letter, match in found.items()}
        else:
            continue
        return {letter: same(text, option) for letter, option in plain.items()}
    return verdicts
