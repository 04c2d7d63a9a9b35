"""Spotting rethinking in a response: cues such as "Wait" or "let me double-check" (METHOD: rethinking ratio)."""

from __future__ import annotations

import re

from rethinker.samples import Completion

_CUES = re.compile(
    r"\bwait\b|\bdouble[- ]check|\bre-?(check|examine|think|consider)|\bon second thought|\blet me verify",
    re.IGNORECASE,
)


def rethinks(completion: Completion) -> bool:
    """Whether the response rethinks of its own accord: a cue in its text that was not forced upon it."""
    forced = completion.rethought is not None
    return len(_CUES.findall(completion.text)) > int(forced)
