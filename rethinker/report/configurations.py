"""Which runs differ in nothing but their seed, and what differs between the others: the rows of the comparison."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rethinker.config import Config
from rethinker.evaluation.settings import flat_settings
from rethinker.report.drawing import short_label
from rethinker.report.runs import RunRecord, whole
from rethinker.report.summary import as_yaml
from rethinker.settings import flat

NOT_LEARNED = ("run.", "checkpoint.", "profile.", "resume")
"""Settings that do not change what a run learns."""
MOST_NAMED = 3
"""Settings that a label names; where more differ, the runs' names say it."""


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but their seeds, all their stages included."""

    label: str
    runs: tuple[RunRecord, ...]


def configurations(runs: Sequence[RunRecord]) -> list[Configuration]:
    """The runs by what they were trained with, in the order of their first ones. A label names the settings that differ
    between the configurations, or where these are many, or unknown, the run."""
    defaults = flat_settings(flat(Config()))
    groups: dict[str, list[RunRecord]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        learned = _learned(run, defaults)
        key = json.dumps(learned, sort_keys=True, default=str) if learned else str(run.folder)
        groups.setdefault(key, []).append(run)
        settings[key] = learned
    known = dict.fromkeys(key for learned in settings.values() for key in learned)
    differing = [
        key
        for key in known
        if len({as_yaml(found.get(key, _default(key, defaults))) for found in settings.values()}) > 1
    ]
    names = [own[0].name if len(own) == 1 else f"{own[0].name} and {len(own) - 1} more" for own in groups.values()]
    labels = [
        ", ".join(_said(key, found.get(key, _default(key, defaults)), defaults) for key in differing)
        for found in settings.values()
    ]
    if not (0 < len(differing) <= MOST_NAMED) or not all(settings.values()) or len(set(labels)) < len(labels):
        labels = names
    plain = ("".join(c if c.isprintable() else "?" for c in whole(label)) for label in labels)
    return [Configuration(label, tuple(own)) for label, own in zip(plain, groups.values(), strict=True)]


def _learned(run: RunRecord, defaults: dict[str, Any]) -> dict[str, Any]:
    """What all stages were trained with, without seeds; {} where that is not known. The model that a later stage starts
    from is its earlier stage's, so that stage's settings stand for it."""
    stages = [*run.earlier, run]
    if not all(stage.settings for stage in stages):
        return {}
    found = {}
    for number, stage in enumerate(stages, start=1):
        for key, value in {**defaults, **stage.settings}.items():
            if number > 1 and key == "policy.model":
                value = Path(str(value)).name  # best, last or step_*
            if not (key.startswith(NOT_LEARNED) or _is_seed(key)):
                found[f"stage {number}: {key}" if len(stages) > 1 else key] = value
    return found


def _default(key: str, defaults: dict[str, Any]) -> Any:
    return defaults.get(key.rpartition(": ")[2])


def _is_seed(key: str) -> bool:
    return key.rpartition(".")[2] == "seed"


def seeds_of(run: RunRecord) -> tuple[Any, ...]:
    """All seeds of a run, of its stages and of their warm-ups: runs with equal ones differ in their settings alone."""
    return tuple(
        stage.settings[key] for stage in (*run.earlier, run) for key in sorted(stage.settings) if _is_seed(key)
    )


def _said(key: str, value: Any, defaults: dict[str, Any]) -> str:
    """A setting by the last part of its key, where no other setting ends so."""
    stage, _, setting = key.rpartition(": ")
    last = setting.rpartition(".")[2]
    ends = Counter(known.rpartition(".")[2] for known in defaults)
    name = last if ends[last] == 1 else setting
    return f"{stage}{': ' if stage else ''}{name}={short_label(as_yaml(value))}"
