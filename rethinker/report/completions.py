"""A sample of a run's groups to look at: question, images, all responses with reward, advantage, forced triggers, and
turn by turn what an environment answered.

The sample is bounded, so that a page about a run of weeks still opens: MOST_GROUPS groups in all, spread evenly over
the runs and over their episodes, at random within an episode; long texts lose their middle, images become thumbnails.
"""

from __future__ import annotations

import base64
import io
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rethinker.algorithm.rethinking import answers_at_once, rethinks
from rethinker.config import ConfigError, RethinkConfig
from rethinker.data.images import open_image
from rethinker.report.runs import RunRecord
from rethinker.samples import LIMITS

MOST_GROUPS = 48
MOST_CHARACTERS = 6000
MOST_IMAGES = 4
"""Of those that a response was shown."""
THUMBNAIL = 160
"""Longest side of an image, in pixels."""
COLUMNS = (
    *("episode", "group", "query_id", "question", "images", "answer", "metadata", "response", "reward", "advantage"),
    *("finish_reason", "token_ids", "rethought"),
)
SCORES, OBSERVED = "scores", "observed"
"""The columns with each reward function's value and with an environment's answers, which older runs do not have."""


@dataclass(frozen=True)
class Part:
    """A piece of a response, and whose it is. Of an environment's answer `facts` are what is known of it in words, and
    `images` are thumbnails, None where one cannot be read."""

    text: str
    by: Literal["policy", "trainer", "environment"] = "policy"
    images: tuple[str | None, ...] = ()
    facts: tuple[str, ...] = ()


def sample_completions(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """Draw the `groups` to show (see `describe_group`), the same ones each time; and `unreadable`, names of files."""
    groups: list[dict[str, Any]] = []
    unreadable: list[str] = []
    for run in runs:
        files = sorted((run.folder / "completions").glob("episode_*.parquet"))
        most = max(1, MOST_GROUPS // len(runs))
        places = np.unique(np.linspace(0, len(files) - 1, min(most, len(files))).round().astype(int))
        for place in places:
            try:
                groups += _read_groups(run, files[place], most // len(places))
            except Exception:  # of another hand: pyarrow and what reads the rows raise anything
                unreadable.append(f"{run.name}/{files[place].name}")
    return {"groups": groups, "unreadable": unreadable}


def _read_groups(run: RunRecord, file: Path, most: int) -> list[dict[str, Any]]:
    """Groups of an episode, at random but the same each time, in the episode's order."""
    numbers = pc.unique(pq.read_table(file, columns=["group"])["group"]).to_pylist()
    chosen = random.Random(file.name).sample(numbers, min(most, len(numbers)))
    groups: dict[int, dict[str, Any]] = {}
    for row in pq.read_table(file, columns=columns_of(file), filters=[("group", "in", chosen)]).to_pylist():
        group = groups.get(row["group"]) or groups.setdefault(row["group"], describe_group(run, row))
        group["responses"].append(describe_response(row, run.settings))
    return [groups[number] for number in sorted(groups)]


def describe_group(run: RunRecord, row: dict[str, Any], longest_side: int = THUMBNAIL) -> dict[str, Any]:
    """A row's question for the page, without responses yet; its images are at most that large, in pixels."""
    return {
        "run": run.label,
        "episode": row["episode"],
        "query_id": row["query_id"],
        "question": _shortened(row["question"]),
        "answer": _shortened(row["answer"]),
        "category": str(json.loads(row["metadata"]).get("category") or ""),
        "images": [_thumbnail(image, row["query_id"], longest_side) for image in row["images"]],
        "responses": [],
    }


def columns_of(file: Path) -> list[str]:
    """COLUMNS, and of SCORES and OBSERVED those that a file has."""
    return [*COLUMNS, *({SCORES, OBSERVED} & set(pq.read_schema(file).names))]


def first_value(row: dict[str, Any]) -> float | None:
    """What the first reward function says of a response, by which it is right at 1 or more; None if nothing did."""
    scores = row.get(SCORES) or []
    return scores[0][1] if scores else row["reward"]


def describe_response(row: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`parts` are a `Part` each, in order; `verdict` is right (at least 1 by the first reward function), wrong or
    unjudged; `scores` are (name, value) of each function where there are several; `trigger` names the forced one, if
    any; `rethinks` says whether a cue outside of it was the model's, and `fast` whether the response is nothing but the
    answer. `tokens` counts what the policy sampled, in so many `turns` with so many tool `calls`, of which so many
    were `failed_calls`."""
    text, reward, rethought = row["response"], row["reward"], row["rethought"]
    scores, first = row.get(SCORES) or [], first_value(row)
    observed, tokens = row.get(OBSERVED) or [], len(row["token_ids"])
    start, end = find_trigger(text, tokens, rethought, settings) if rethought else (len(text), len(text))
    turns = len(observed) + (not observed or observed[-1]["end"] < tokens)
    given = sum(part["end"] - part["start"] for part in observed)
    given += rethought["trigger_end"] - rethought["trigger_start"] if rethought else 0
    return {
        "parts": _parts(text, (start, end), observed, row["query_id"]),
        "verdict": "unjudged" if first is None else "right" if first >= 1 else "wrong",
        "reward": reward,
        "scores": scores if len(scores) > 1 else [],
        "advantage": row["advantage"],
        "finish_reason": row["finish_reason"],
        "tokens": tokens - given,
        "turns": turns,
        "calls": sum(part["calls"] for part in observed),
        "failed_calls": sum(reason not in LIMITS for part in observed for reason in part["failures"]),
        "trigger": rethought and rethought["name"],
        "rethinks": rethinks(text[:start] + text[end:]),
        "fast": rethought is None and turns == 1 and answers_at_once(text),
    }


def _parts(text: str, trigger: tuple[int, int], observed: list[dict[str, Any]], query_id: str) -> list[Part]:
    """The policy's text, cut where a trigger stands and where it was answered, with both in their places."""
    # Cut apart first and shorten after: the trigger stays whole whatever is left out around it.
    inserted = [(*trigger, Part(text[slice(*trigger)], "trainer"))] if trigger[0] < trigger[1] else []
    longest, room = MOST_CHARACTERS // max(1, len(observed)), MOST_IMAGES
    for answer in observed:
        part = _answer(answer, query_id, longest, room)
        inserted.append((answer["place"], answer["place"], part))
        room -= len(part.images)
    parts, done = [], 0
    for start, end, part in sorted(inserted, key=lambda one: one[0]):
        parts += [Part(_shortened(text[done:start], longest)), part]
        done = end
    parts.append(Part(_shortened(text[done:], longest)))
    return [part for part in parts if part.text or part.facts]


def _answer(answer: dict[str, Any], query_id: str, longest: int, most_images: int) -> Part:
    """What an environment answered, with at most so many characters and images."""
    images, tokens = answer["images"] or [], answer["end"] - answer["start"]
    shown = tuple(_thumbnail({"bytes": image}, query_id, THUMBNAIL) for image in images[:most_images])
    lost = {"could not be read": shown.count(None), "not shown here": len(images) - len(shown)}
    facts = ["environment" if tokens else "environment, at the end", *([f"{tokens} tokens"] if tokens else [])]
    facts += [f"reward {answer['reward']:.4g}"] if answer["reward"] else []
    facts += [f"failed: {reason}" for reason in answer["failures"]]
    facts += [f"{number} image{'s' if number > 1 else ''} {why}" for why, number in lost.items() if number]
    return Part(_shortened(answer["text"], longest), "environment", shown, tuple(facts))


def find_trigger(text: str, tokens: int, rethought: dict[str, Any], settings: dict[str, Any]) -> tuple[int, int]:
    """Where the forced trigger stands in a response of so many tokens: (start, end) of its words nearest to its share
    of the tokens, or the end of the text where they are not in it. The run's settings have the words."""
    name = rethought["name"]
    words = settings.get(f"rethink.triggers.{name}") or RethinkConfig().triggers.get(name, "")
    expected = len(text) * rethought["trigger_start"] / max(1, tokens)
    places = [found.span() for found in re.finditer(re.escape(str(words).strip()), text)] if words else []
    return min(places, key=lambda span: abs(span[0] - expected), default=(len(text), len(text)))


def _shortened(text: str, longest: int = MOST_CHARACTERS) -> str:
    """A long text without its middle: how it begins and what it ends with say most."""
    if len(text) <= longest:
        return text
    half = longest // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters left out ...] {text[-half:]}"


def _thumbnail(reference: dict[str, Any], query_id: str, longest_side: int) -> str | None:
    """A small picture as a data URI; None where the image cannot be read any more."""
    try:
        image = open_image(reference, query_id)
    except (ConfigError, TypeError):
        return None
    image.thumbnail((longest_side, longest_side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
