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

LETTER = re.compile(
    r"^(?:(?:the )?(?:correct )?(?:answer|option|choice)(?: is)?:?\s*)?[(\[]?([A-Z])[)\]]?[.:]?$", re.IGNORECASE
)
_LETTER_AND_TEXT = re.compile(r"^(?:[(\[]([A-Z])[)\]]|([A-Z])[.:)])[.:]?\s*([\w\\$\"'-].*)$", re.IGNORECASE | re.DOTALL)
_SEVERAL_LETTERS = re.compile(r"^[(\[]?[A-Z](?:(?:[,;&/]|,?\s*and\s*|\s*)[A-Z])+[)\]]?$")
_MARKERS = [
    re.compile(r"(?m)^[ \t]*(?:[-*][ \t]+)?\**([A-Z])\**[ \t]*[.):、：][ \t]*"),  # A. / A) / A: at the start of lines
    re.compile(r"(?<![A-Za-z\\])[(（]([A-Z])[)）]\s*"),  # (A) anywhere
    re.compile(r"(?:(?<=\s)|^)([A-Z])[.):]\s+"),  # A. or A) within a line
]
# Python's parser takes time and memory for every character of the text.
LONGEST_CHOICES = 20_000
_DRESSED = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|bf)\s*\{\s*(\([A-Z]\))\s*\}")
_SPACES = re.compile(r"\\q?quad(?![A-Za-z])|\\ ")
# Letters that stand for a choice even if the options are in the image; X or N is rather a variable.
_LIKELY = "ABCDEFGHIJ"


def options_of(question: str, choices: Any, clean: Callable[[str], str]) -> dict[str, str]:
    """Letter to cleaned text of each option; empty for an open question.

    Args:
        question: searched for `(A) ...` or `A. ...` where `choices` says nothing.
        choices: a list of texts, a mapping from letters, or either written as a Python or JSON string (as MMMU does).
        clean: normalises a text.
    """
    if isinstance(choices, str):
        choices = _read(choices)
    if isinstance(choices, Mapping):
        return {str(k).upper(): clean(str(v)) for k, v in choices.items() if len(str(k)) == 1 and str(k).isalpha()}
    if isinstance(choices, Sequence) and not isinstance(choices, bytes) and 1 < len(choices) <= 26:
        options = {}
        for i, text in enumerate(choices):
            letter = chr(ord("A") + i)
            labelled = _LETTER_AND_TEXT.match(str(text).strip())
            own_label = labelled and (labelled[1] or labelled[2]).upper() == letter
            options[letter] = clean(labelled[3] if own_label else str(text))
        return options
    return {letter: clean(text) for letter, text in _in_question(question)}


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
    question = _SPACES.sub(" ", _DRESSED.sub(r"\1", question))
    best: list[re.Match[str]] = []
    for marker in _MARKERS:
        run: list[re.Match[str]] = []
        for mark in marker.finditer(question):
            if ord(mark[1]) == ord("A") + len(run):
                run.append(mark)
            elif mark[1] == "A":
                run = [mark]
            if len(run) > max(len(best), 1):
                best = list(run)
        if best:
            break
    ends = [mark.start() for mark in best[1:]] + [len(question)] * bool(best)
    texts = [question[mark.end() : end].strip() for mark, end in zip(best, ends, strict=True)]
    if texts:  # what follows the last option on later lines is not part of it
        texts[-1] = texts[-1].split("\n")[0]
    return tuple((mark[1], text.strip().rstrip(",;")) for mark, text in zip(best, texts, strict=True))


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
    letter = LETTER.match(text)
    if letter and (letter[1].upper() in options or (not options and letter[1].upper() in _LIKELY)):
        return {letter[1].upper()}
    labelled = _LETTER_AND_TEXT.match(text)
    if labelled:
        letter = (labelled[1] or labelled[2]).upper()
        expected = options.get(letter)
        if expected == "" or (not options and letter in _LIKELY):  # the options' texts are in the image
            return {letter}
        if expected is not None:
            verdict = same(labelled[3], expected)
            return None if verdict is None else {letter} if verdict else set()
    if options and _SEVERAL_LETTERS.match(text):
        letters = [c for c in text if c.isupper()]
        if len(set(letters)) == len(letters) and set(letters) <= options.keys():
            return set(letters)
    verbatim = {letter for letter, option in options.items() if option.casefold() == text.casefold()}
    if verbatim:
        return verbatim
    verdicts = {letter: same(text, option) for letter, option in options.items()}
    if None in verdicts.values():
        return None
    return {letter for letter, verdict in verdicts.items() if verdict}
