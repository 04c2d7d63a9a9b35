"""Where in a rethought response's text the forced trigger stands, from its place among the tokens."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from rethinker.report.runs import RunRecord
from rethinker.samples import Rethought

TRIGGERS = {
    "self_questioning": "Wait, does it seem right?",
    "self_correction": "Wait, there might be a mistake",
    "self_verification": "Wait, let's double check",
}
"""METHOD: Forced Rethinking; a run's own are read from its settings."""


class TriggerFinder:
    """Finds triggers in the responses of one run; its tokenizer is loaded when the first one is sought."""

    def __init__(self, run: RunRecord) -> None:
        self._run = run
        prefix = "rethink.triggers."
        own = {k.removeprefix(prefix): str(v).strip() for k, v in run.settings.items() if k.startswith(prefix)}
        self._texts = TRIGGERS | own

    def find(self, text: str, token_ids: list[int], rethought: Rethought) -> tuple[int, int] | None:
        """(start, end) of the trigger's characters in the response's text; None where it cannot be told.

        The run's tokenizer decodes the tokens before the trigger and up to its end. Without a tokenizer, or where
        decoding does not give the text, it is the trigger's own words nearest to its share of the tokens.
        """
        start, end = rethought.trigger_start, rethought.trigger_end
        if self._tokenizer is not None:
            before, through = (
                self._tokenizer.decode(token_ids[:stop], skip_special_tokens=True) for stop in (start, end)
            )
            if len(before) < len(through) and text.startswith(through):
                return len(before), len(through)
        named = self._texts.get(rethought.name)
        expected = len(text) * start / max(1, len(token_ids))
        for words in filter(None, (named, *self._texts.values())):
            places = [place for place in range(len(text)) if text.startswith(words, place)]
            if places:
                place = min(places, key=lambda place: abs(place - expected))
                return place, place + len(words)
        return None

    @cached_property
    def _tokenizer(self) -> Any | None:
        """The one saved with the run's checkpoints, or of the model it began with; None without either here."""
        model = Path(str(self._run.settings.get("policy.model", "")))
        for folder in (*(self._run.folder / "checkpoints" / name for name in ("last", "best")), model):
            if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
                try:
                    from transformers import AutoTokenizer

                    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                except Exception:  # files from elsewhere; the report does without
                    continue
        return None
