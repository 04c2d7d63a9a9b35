"""What curation leaves behind: pass rates, the subset as a data set, a recipe that trains on it, and its origin."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from rethinker.config import Config, DataConfig
from rethinker.curation.subset import PassRate
from rethinker.data.datasets import image_root
from rethinker.data.mixture import SOURCES
from rethinker.embedded.files import as_files
from rethinker.runtime.files import whole_file
from rethinker.samples import Query
from rethinker.settings import to_yaml
from rethinker.version import versions

SUBSET, RECIPE = "subset.parquet", "recipe.yaml"

# Rows of the subset written at once: of images that are embedded, only so many are in memory.
_ROWS = 64


def write_subset(folder: Path, queries: Sequence[Query], rates: Sequence[PassRate], config: Config) -> None:
    """Write the chosen questions under the columns they came from, with a column `pass_rate`; see `write_recipe`.

    Image paths start where the original ones do; images embedded in the data are embedded again.
    """
    columns, root = _columns(config.data), _root(config.data)
    table: dict[str, list[Any]] = {
        columns[noun]: [getattr(query, noun) for query in queries] for noun in ("id", "question", "answer")
    }
    for key in dict.fromkeys(key for query in queries for key in query.metadata):
        name = key if key in ("question", "answer", "images", "id") else columns.get(key, key)
        if name not in (*table, columns["images"]):  # as a column `question` beside the one of a format
            table[name] = [query.metadata.get(key) for query in queries]
    table["pass_rate"] = [rate.rate for rate in rates]
    texts = pa.table({name: _column(values) for name, values in table.items()})
    images = [image for query in queries for image in query.images]
    embedded = any(isinstance(image, Mapping) for image in images)
    kind = pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()}) if embedded else pa.string())
    schema = texts.schema.append(pa.field(columns["images"], kind))
    with whole_file(folder / SUBSET) as path, parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, max(1, len(queries)), _ROWS):
            part = [[_image(image, root, embedded) for image in q.images] for q in queries[start : start + _ROWS]]
            shown = pa.array(part, kind)
            writer.write_table(texts.slice(start, _ROWS).append_column(columns["images"], shown).cast(schema))


def _columns(data: DataConfig) -> dict[str, str]:
    """The names of the subset's columns: those of the data, where a noun has a column to itself."""
    defaults = DataConfig().fields
    own = {**defaults, **({} if data.train == SOURCES else data.fields)}
    return own if data.format is None and len(set(own.values())) == len(own) else defaults


def _root(data: DataConfig) -> str | None:
    """The folder that image paths start from, whatever folder this process is in."""
    root = image_root(as_files(data, "train"))
    return root and os.path.abspath(os.path.expanduser(root))


def _column(values: list[Any]) -> Any:
    """As Arrow types it; a column of mixed types as JSON texts."""
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([json.dumps(value, default=str) for value in values])


def _image(reference: Any, root: str | None, embedded: bool) -> Any:
    if isinstance(reference, Mapping):
        return {"bytes": reference.get("bytes"), "path": reference.get("path")}
    path = os.path.abspath(reference).removeprefix(root + os.sep if root else "")
    return {"bytes": None, "path": path} if embedded else path


def write_recipe(folder: Path, config: Config, model: str) -> None:
    """The recipe as it was, but for the data: `rethinker train FOLDER/recipe.yaml` trains on the subset as it is."""
    own = {
        "train": str((folder / SUBSET).absolute()),
        "format": None,
        "fields": _columns(config.data),
        "image_root": _root(config.data),
    }
    data = dataclasses.replace(config.data, **own, sources={}, pass_rate=None, category_weights={})
    run = dataclasses.replace(config.run, name=None)
    policy = dataclasses.replace(config.policy, model=model)
    (folder / RECIPE).write_text(to_yaml(dataclasses.replace(config, data=data, run=run, policy=policy)))


def write_rates(folder: Path, rates: Sequence[PassRate], chosen: Sequence[int]) -> None:
    """Every question's pass rate (-1: left out) and whether it was chosen, as parquet."""
    picked = set(chosen)
    rows = [{**vars(rate), "pass_rate": rate.rate, "chosen": i in picked} for i, rate in enumerate(rates)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "pass_rates.parquet")


def write_provenance(folder: Path, known: Mapping[str, Any]) -> None:
    """Where the subset comes from: what is known of it, versions, date and command."""
    now = {"versions": versions(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    content = json.dumps({**known, **now, "command": ["rethinker", *sys.argv[1:]]}, indent=2, ensure_ascii=False)
    (folder / "provenance.json").write_text(content + "\n", encoding="utf-8")


def count(rates: Sequence[PassRate], chosen: Sequence[int]) -> dict[str, Any]:
    """What the subset and the whole look like."""
    asked = [rate for rate in rates if rate.samples]
    return {
        "questions": len(rates),
        "left_out": dict(Counter(rate.left_out for rate in rates if rate.left_out)),
        "always_wrong": sum(rate.right == 0 for rate in asked),
        "always_right": sum(rate.right == rate.samples for rate in asked),
        "sometimes_right": sum(rate.sometimes for rate in asked),
        "subset": len(chosen),
        "subset_by_category": dict(sorted(Counter(rates[i].category for i in chosen).items())),
    }


def histogram(rates: Sequence[PassRate], chosen: Sequence[int]) -> str:
    """How many questions, and how many chosen ones, by right answers."""
    asked = [rate for rate in rates if rate.samples]
    samples = max((rate.samples for rate in asked), default=0)
    everything, picked = Counter(rate.right for rate in asked), Counter(rates[i].right for i in chosen)
    lines = [f"{k:3d} of {samples:<3d} {everything[k]:9,d} {picked[k]:7,d}" for k in range(samples + 1)]
    return "\n".join(["right      questions  chosen", *lines])
