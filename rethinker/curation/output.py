"""What curation leaves behind: pass rates, their histogram, the subset as a data set, a recipe that trains on it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rethinker.config import Config, DataConfig
from rethinker.curation.subset import PassRate
from rethinker.data.archives import open_member
from rethinker.data.datasets import image_root
from rethinker.data.image_cache import archive_of_embedded
from rethinker.data.mixture import SOURCES
from rethinker.embedded.files import as_files
from rethinker.samples import Query
from rethinker.settings import flat, to_yaml

SUBSET, RECIPE, RATES, PROVENANCE = "subset.parquet", "recipe.yaml", "pass_rates.parquet", "provenance.json"

# Rows of the subset written at once: of images that are embedded, only so many are in memory.
_ROWS = 64


def write_subset(folder: Path, queries: Sequence[Query], rates: Sequence[PassRate], config: Config) -> Path:
    """Write the chosen questions under the columns they came from, with a column `pass_rate`; see `write_recipe`.

    Image paths start where the original ones do; images embedded in the data are embedded again.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    columns, root = _columns(config.data), _root(config.data)
    names = {noun: column for noun, column in columns.items() if noun not in ("question", "answer", "images", "id")}
    table: dict[str, list[Any]] = {
        columns["id"]: [query.id for query in queries],
        columns["question"]: [query.question for query in queries],
        columns["answer"]: [query.answer for query in queries],
    }
    for key in dict.fromkeys(key for query in queries for key in query.metadata):
        table[names.get(key, key)] = [query.metadata.get(key) for query in queries]
    table["pass_rate"] = [rate.rate for rate in rates]
    texts = pa.table({name: _column(values) for name, values in table.items()})
    embedded = any(_is_embedded(image) for query in queries for image in query.images)
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()}) if embedded else pa.string()
    schema = texts.schema.append(pa.field(columns["images"], pa.list_(kind)))
    path = folder / SUBSET
    partial = path.with_name(f".{path.name}.partial")
    with parquet.ParquetWriter(partial, schema, compression="zstd") as writer:
        for start in range(0, max(1, len(queries)), _ROWS):
            part = [[_image(image, root, embedded) for image in q.images] for q in queries[start : start + _ROWS]]
            images = pa.array(part, pa.list_(kind))
            writer.write_table(texts.slice(start, _ROWS).append_column(columns["images"], images).cast(schema))
    os.replace(partial, path)
    return path


def _root(data: DataConfig) -> str | None:
    return image_root(as_files(data, "train"))


def _columns(data: DataConfig) -> dict[str, str]:
    return {**DataConfig().fields, **({} if data.train == SOURCES else data.fields)}


def _column(values: list[Any]) -> Any:
    """As Arrow types it; a column of mixed types as JSON texts."""
    import pyarrow as pa

    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([json.dumps(value, default=str) for value in values])


def _is_embedded(reference: Any) -> bool:
    return isinstance(reference, Mapping) or archive_of_embedded(reference) is not None


def _image(reference: Any, root: str | None, embedded: bool) -> Any:
    if isinstance(reference, Mapping):
        return {"bytes": reference.get("bytes"), "path": reference.get("path")}
    if archived := archive_of_embedded(reference):
        return {"bytes": open_member(*archived, sys.maxsize).read(), "path": None}
    path = os.path.abspath(reference)
    start = os.path.abspath(os.path.expanduser(root)) + os.sep if root else None
    path = path.removeprefix(start) if start else path
    return {"bytes": None, "path": path} if embedded else path


def write_recipe(folder: Path, config: Config, model: str) -> None:
    """The recipe as it was, but for the data: `rethinker train FOLDER/recipe.yaml` trains on the subset as it is."""
    root = _root(config.data)
    data = dataclasses.replace(
        config.data,
        train=str((folder / SUBSET).absolute()),
        sources={},
        fields=_columns(config.data),
        image_root=root and os.path.abspath(os.path.expanduser(root)),
        pass_rate=None,
        category_weights={},
    )
    run = dataclasses.replace(config.run, name=None)
    policy = dataclasses.replace(config.policy, model=model)
    (folder / RECIPE).write_text(to_yaml(dataclasses.replace(config, data=data, run=run, policy=policy)))


def write_rates(folder: Path, rates: Sequence[PassRate], chosen: Sequence[int]) -> None:
    """Every question's pass rate (-1: left out) and whether it was chosen, as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows, picked = [{**vars(rate), "pass_rate": rate.rate} for rate in rates], set(chosen)
    table = pa.Table.from_pylist([{**row, "chosen": i in picked} for i, row in enumerate(rows)])
    parquet.write_table(table, folder / RATES)


def write_provenance(
    folder: Path,
    config: Config,
    measured: Mapping[str, Any],
    counts: Mapping[str, Any],
    size: int | None,
    versions: Mapping[str, str],
) -> None:
    """Where the subset comes from: model, data, settings, versions, counts, date and command."""
    settings = {k: v for k, v in flat(config).items() if k.startswith(("data.", "rollout.", "reward.", "policy.dtype"))}
    content = {
        **measured,
        "size_asked": size,
        **counts,
        "subset_sha256": hashlib.sha256((folder / SUBSET).read_bytes()).hexdigest(),
        "settings": settings,
        "versions": dict(versions),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ["rethinker", *sys.argv[1:]],
    }
    (folder / PROVENANCE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def count(rates: Sequence[PassRate], chosen: Sequence[int]) -> dict[str, Any]:
    """What the subset and the whole look like."""
    asked = [rate for rate in rates if rate.samples]
    picked = [rates[i] for i in chosen]
    return {
        "questions": len(rates),
        "left_out": dict(Counter(rate.left_out for rate in rates if rate.left_out)),
        "always_wrong": sum(rate.right == 0 for rate in asked),
        "always_right": sum(rate.right == rate.samples for rate in asked),
        "sometimes_right": sum(rate.sometimes for rate in asked),
        "subset": len(picked),
        "subset_by_category": dict(sorted(Counter(rate.category for rate in picked).items())),
    }


def histogram(rates: Sequence[PassRate], chosen: Sequence[int]) -> Iterator[str]:
    """The pass rates as lines of text: all questions, and those chosen."""
    asked = [rate for rate in rates if rate.samples]
    everything, picked = Counter(r.right for r in asked), Counter(rates[i].right for i in chosen)
    samples, most = max((r.samples for r in asked), default=1), max(everything.values(), default=1)
    yield "right      questions  chosen"
    for right in range(samples + 1):
        bar = "#" * round(40 * everything[right] / most)
        yield f"{right:3d} of {samples:<3d} {everything[right]:9,d} {picked[right]:7,d}  {bar}".rstrip()


def draw_histogram(path: Path, rates: Sequence[PassRate], chosen: Sequence[int], title: str) -> None:
    """The same as a figure."""
    from rethinker.report.drawing import COLORS, GRID, label_of, legend, new_figure, save_figure

    asked = [rate for rate in rates if rate.samples]
    everything, picked = Counter(r.right for r in asked), Counter(rates[i].right for i in chosen)
    samples = max((r.samples for r in asked), default=1)
    figure = new_figure(6.4, 3.4)
    axes = figure.subplots()
    places = range(samples + 1)
    axes.bar(places, [everything[k] for k in places], width=0.8, color=GRID, edgecolor="#999999", label="all questions")
    axes.bar(places, [picked[k] for k in places], width=0.8, color=COLORS[0], label="the subset")
    axes.set_xlabel(f"right answers of {samples}")
    axes.set_ylabel("questions")
    axes.set_title(label_of(title), fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(axes)
    save_figure(figure, path)
