"""A sample of a run's groups to look at: question, images, all responses with reward, advantage and forced triggers.

The sample is bounded, so that a page about a run of weeks still opens: MOST_GROUPS groups in all, spread evenly over
the runs and over their episodes, at random within an episode; long texts lose their middle, images become thumbnails.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.algorithm.rethinking import rethinks
from rethinker.config import ConfigError, RethinkConfig
from rethinker.data.images import open_image
from rethinker.report.runs import RunRecord
from rethinker.samples import Rethought

MOST_GROUPS = 48
MOST_RESPONSES = 16
MOST_IMAGES = 4
MOST_CHARACTERS = 6000
THUMBNAIL = 160
"""Longest side of an image, in pixels."""


@dataclass(frozen=True)
class Browsable:
    """What the page's browser shows, and of how many."""

    groups: list[dict[str, Any]]
    """Each with run, episode, query_id, question, answer, category, images (data URIs, or None for one that cannot be
    read), images_left_out, size (G) and responses; see `_response` for those."""
    responses: int
    """All responses that the runs have recorded."""
    unreadable: list[str]

    @property
    def categories(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(group["category"] for group in self.groups if group["category"]))


def sample_completions(runs: Sequence[RunRecord], most: int = MOST_GROUPS) -> Browsable:
    """Draw the groups to show; the same runs give the same ones.

    Args:
        runs: those without recorded completions add nothing.
        most: groups in all.

    Raises:
        ConfigError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ConfigError("completions are parquet files: install the extra `cpu` or `gpu`") from error
    shown: list[dict[str, Any]] = []
    total, unreadable = 0, []
    for run in runs:
        files = []
        for file in sorted((run.folder / "completions").glob("episode_*.parquet")):
            try:
                total += pq.ParquetFile(file).metadata.num_rows
                files.append(file)
            except (OSError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
                unreadable.append(f"{run.name}/{file.name}")
        finder = TriggerFinder(run)
        for file, groups in _shares(files, max(1, most // len(runs))):
            try:
                shown += _read_groups(run, file, groups, finder)
            except Exception:  # a whole Parquet file, but not of completions as they are written here
                unreadable.append(f"{run.name}/{file.name}")
    return Browsable(shown, total, unreadable)


def _shares(files: list[Path], most: int) -> list[tuple[Path, int]]:
    """Files to read and how many groups of each: evenly from the first to the last, `most` groups in all."""
    if not files:
        return []
    chosen = np.unique(np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int))
    each, rest = divmod(most, len(chosen))
    return [(files[index], each + (place < rest)) for place, index in enumerate(chosen)]


def _read_groups(run: RunRecord, file: Path, most: int, finder: TriggerFinder) -> list[dict[str, Any]]:
    """Groups of an episode, at random but the same each time, in the episode's order."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    numbers = pc.unique(pq.read_table(file, columns=["group"])["group"]).to_pylist()
    chosen = random.Random(file.name).sample(numbers, min(most, len(numbers)))
    columns = "episode group index query_id question images answer metadata response reward advantage finish_reason"
    rows = pq.read_table(file, columns=[*columns.split(), "token_ids", "rethought"], filters=[("group", "in", chosen)])
    groups: dict[int, dict[str, Any]] = {}
    for row in rows.to_pylist():
        group = groups.get(row["group"]) or groups.setdefault(row["group"], _group(run, row))
        group["size"] += 1
        if len(group["responses"]) < MOST_RESPONSES:
            group["responses"].append(_response(row, finder))
    return [groups[number] for number in sorted(groups)]


def _group(run: RunRecord, row: dict[str, Any]) -> dict[str, Any]:
    metadata = json.loads(row["metadata"] or "{}")
    category = metadata.get("category") if isinstance(metadata, dict) else None
    images = row["images"] or []
    return {
        "run": run.label,
        "episode": row["episode"],
        "query_id": row["query_id"],
        "question": _shortened(row["question"]),
        "answer": _shortened(row["answer"]),
        "category": str(category or ""),
        "images": [_thumbnail(image, row["query_id"]) for image in images[:MOST_IMAGES]],
        "images_left_out": max(0, len(images) - MOST_IMAGES),
        "size": 0,
        "responses": [],
    }


def _response(row: dict[str, Any], finder: TriggerFinder) -> dict[str, Any]:
    """`parts` are (text, whether the trainer forced it); `verdict` is right (a reward of at least 1), wrong or
    unjudged; `trigger` names the forced one, if any; `rethinks` says whether a cue outside of it was the model's."""
    text, reward = row["response"], row["reward"]
    rethought = Rethought(**row["rethought"]) if row["rethought"] else None
    start, end = (rethought and finder.find(text, row["token_ids"], rethought)) or (len(text), len(text))
    # Cut apart first and shorten after: the trigger stays whole whatever is left out around it.
    parts = [(_shortened(text[:start]), False), (text[start:end], True), (_shortened(text[end:]), False)]
    return {
        "parts": [part for part in parts if part[0]],
        "verdict": "unjudged" if reward is None else "right" if reward >= 1 else "wrong",
        "reward": reward,
        "advantage": row["advantage"],
        "finish_reason": row["finish_reason"],
        "tokens": len(row["token_ids"]),
        "trigger": rethought and rethought.name,
        "rethinks": rethinks(text[:start] + text[end:]),
    }


def _shortened(text: str) -> str:
    """A long text without its middle: how it begins and what it ends with say most."""
    if len(text) <= MOST_CHARACTERS:
        return text
    half = MOST_CHARACTERS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters left out ...] {text[-half:]}"


def _thumbnail(reference: dict[str, Any], query_id: str) -> str | None:
    """A small picture as a data URI; None where the image cannot be read any more."""
    try:
        image = open_image(reference, query_id)
    except (ConfigError, TypeError):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


class TriggerFinder:
    """Finds forced triggers in the responses of one run, whose tokenizer is loaded when the first one is sought."""

    def __init__(self, run: RunRecord) -> None:
        self._run = run
        prefix = "rethink.triggers."
        own = {key.removeprefix(prefix): text for key, text in run.settings.items() if key.startswith(prefix)}
        self._texts = {name: str(text).strip() for name, text in (RethinkConfig().triggers | own).items()}

    def find(self, text: str, token_ids: list[int], rethought: Rethought) -> tuple[int, int] | None:
        """(start, end) of the trigger's characters in the response's text; None where it cannot be found.

        The run's tokenizer decodes the tokens before the trigger and up to its end. Without a tokenizer, or where
        decoding does not give the text, it is the trigger's own words nearest to its share of the tokens.
        """
        start, end = rethought.trigger_start, rethought.trigger_end
        if decode := self._tokenizer and self._tokenizer.decode:
            before, through = (decode(token_ids[:stop], skip_special_tokens=True) for stop in (start, end))
            if len(before) < len(through) and text.startswith(through):
                return len(before), len(through)
        expected = len(text) * start / max(1, len(token_ids))
        for words in filter(None, (self._texts.get(rethought.name), *self._texts.values())):
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
                except Exception:  # the files may be anybody's; the report does without
                    continue
        return None
