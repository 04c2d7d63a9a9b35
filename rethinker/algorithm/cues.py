"""Spotting rethinking in a response: cues such as "Wait" or "let me double-check" (METHOD: rethinking ratio)."""

from __future__ import annotations

import re

_CUES = re.compile(
    r"\bwait\b|\bdouble[- ]check|\bre-?(check|examine|think|consider)|\bon second thought|\blet me verify",
    re.IGNORECASE,
)


def rethinks(text: str, forced: str = "") -> bool:
    """Whether a response rethinks of its own accord: a cue in its text, outside the phrase that was forced upon it."""
    return _CUES.search(text.replace(forced, "", 1) if forced else text) is not None
