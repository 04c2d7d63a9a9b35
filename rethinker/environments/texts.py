"""Texts that come from programs: bounded, and what a tokenizer takes."""

from __future__ import annotations

CHARACTERS_PER_TOKEN = 64
"""Beyond any text's mean: a text cut at so many characters for each token that it may have is cut again, by tokens."""


def cut_middle(text: str, most: int) -> str:
    """A text of at most `most` characters: a longer one without its middle, with a note of how many were left out."""
    if len(text) <= most:
        return text
    note = f"\n[{len(text) - most} characters left out]\n"
    kept = max(0, most - len(note))
    return (text[: kept - kept // 2] + note + text[len(text) - kept // 2 :])[:most]


def whole(text: str) -> str:
    """A text without half characters (surrogates), which no tokenizer takes."""
    return text.encode("utf-8", "replace").decode()
