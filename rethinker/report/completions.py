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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rethinker.algorithm.rethinking import rethinks
from rethinker.config import ConfigError
from rethinker.data.images import open_image
from rethinker.report.runs import RunRecord
from rethinker.report.triggers import TriggerFinder
from rethinker.samples import Rethought

MOST_GROUPS = 48
MOST_RESPONSES = 16
MOST_IMAGES = 4
MOST_CHARACTERS = 6000
THUMBNAIL = 160
"""Longest side of an image, in pixels."""


@dataclass(frozen=True)
class Part:
    """A piece of a response: its text, and whether the trainer forced it."""

    text: str
    forced: bool = False


@dataclass(frozen=True)
class Response:
    """One response as the page shows it."""

    parts: list[Part]
    reward: float | None
    advantage: float | None
    finish_reason: str
    tokens: int
    trigger: str | None
    """Name of the forced trigger, if any."""
    rethinks: bool
    """Of its own accord: a cue that was not forced."""

    @property
    def verdict(self) -> str:
        """right (a reward of at least 1, as in validation), wrong, or unjudged."""
        return "unjudged" if self.reward is None else "right" if self.reward >= 1 else "wrong"


@dataclass
class Shown:
    """One group as the page shows it."""

    run: str
    episode: int
    number: int
    query_id: str
    question: str
    answer: str
    category: str
    images: list[str | None]
    """Data URIs; None for one that cannot be read any more."""
    images_left_out: int
    size: int
    """G."""
    responses: list[Response] = field(default_factory=list)

    @property
    def right(self) -> int:
        """How many of the shown responses are right."""
        return sum(response.verdict == "right" for response in self.responses)


@dataclass(frozen=True)
class Browsable:
    """What the browser shows, and of how many."""

    groups: list[Shown]
    responses: int
    """All responses that the runs have recorded."""
    unreadable: list[str]

    @property
    def categories(self) -> list[str]:
        """In order of appearance."""
        return list(dict.fromkeys(group.category for group in self.groups if group.category))


def sample_completions(runs: Sequence[RunRecord], most: int = MOST_GROUPS) -> Browsable:
    """Draw the groups to show; the same runs give the same ones.

    Args:
        runs: those without recorded completions add nothing.
        most: groups in all.
    """
    shown: list[Shown] = []
    total, unreadable = 0, []
    for run in runs:
        files = sorted((run.folder / "completions").glob("episode_*.parquet"))
        counts = []
        for file in list(files):
            try:
                counts.append(_count(file))
            except (OSError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
                files.remove(file)
                unreadable.append(f"{run.name}/{file.name}")
        total += sum(counts)
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


def _count(file: Path) -> int:
    try:
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise ConfigError("completions are parquet files: install the extra `cpu` or `gpu`") from error
    return pq.ParquetFile(file).metadata.num_rows


def _read_groups(run: RunRecord, file: Path, most: int, finder: TriggerFinder) -> list[Shown]:
    """Groups of an episode, at random but the same each time, in the episode's order."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    numbers = pc.unique(pq.read_table(file, columns=["group"])["group"]).to_pylist()
    chosen = random.Random(file.name).sample(numbers, min(most, len(numbers)))
    columns = "episode group index query_id question images answer metadata response reward advantage finish_reason"
    rows = pq.read_table(file, columns=[*columns.split(), "token_ids", "rethought"], filters=[("group", "in", chosen)])
    groups: dict[int, Shown] = {}
    for row in rows.to_pylist():
        group = groups.get(row["group"]) or groups.setdefault(row["group"], _group(run, row))
        group.size += 1
        if len(group.responses) < MOST_RESPONSES:
            group.responses.append(_response(row, finder))
    return [groups[number] for number in sorted(groups)]


def _group(run: RunRecord, row: dict[str, Any]) -> Shown:
    metadata = json.loads(row["metadata"] or "{}")
    category = metadata.get("category") if isinstance(metadata, dict) else None
    images = row["images"] or []
    return Shown(
        run.label,
        row["episode"],
        row["group"],
        row["query_id"],
        _shortened(row["question"]),
        _shortened(row["answer"]),
        str(category or ""),
        [_thumbnail(image, row["query_id"]) for image in images[:MOST_IMAGES]],
        max(0, len(images) - MOST_IMAGES),
        size=0,
    )


def _response(row: dict[str, Any], finder: TriggerFinder) -> Response:
    text, forced = row["response"], row["rethought"]
    rethought = Rethought(**forced) if forced else None
    span = finder.find(text, row["token_ids"], rethought) if rethought else None
    # Cut apart first and shorten after: the trigger stays whole whatever is left out around it.
    pieces = [(text, False)] if span is None else [(text[: span[0]], False), (text[slice(*span)], True)]
    pieces += [] if span is None else [(text[span[1] :], False)]
    parts = [Part(piece if is_forced else _shortened(piece), is_forced) for piece, is_forced in pieces if piece]
    # Its own cues are those outside the trigger, which may hold several.
    own = text if span is None else text[: span[0]] + text[span[1] :]
    return Response(
        parts,
        row["reward"],
        row["advantage"],
        row["finish_reason"],
        len(row["token_ids"]),
        rethought.name if rethought else None,
        rethinks(own),
    )


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
