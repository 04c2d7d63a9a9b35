"""Several data sets as one: `data.train: sources` with an entry per data set in `data.sources`.

    data:
      train: sources
      sources:
        virl: {train: virl39k.parquet, image_root: images.zip, fields: {images: image, id: qid}, weight: 3}
        shapes: {train: easy_vqa, weight: 1, category_weights: {"yes/no": 1, shape: 1}}

An entry takes the settings below of the data section, and the section's own values where it has none; ids become
`virl/<id>`. With weights the sources take turns in those shares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any, get_args

from rethinker.config import ConfigError, DataConfig, FormatName, nearest
from rethinker.samples import Query

SOURCES = "sources"
OF_A_SOURCE = (
    "train",
    "train_split",
    "format",
    "fields",
    "image_root",
    "pass_rate",
    "max_bad_rows",
    "category_weights",
)


def source_configs(config: DataConfig) -> dict[str, DataConfig]:
    """The data settings of every source, by its name; {} of `data.train` that is one data set.

    Raises:
        ConfigError: no sources, or an entry that cannot be meant.
    """
    if (config.train == SOURCES) != bool(config.sources):
        raise ConfigError(
            f"data.sources goes with data.train=sources, and data.train is {config.train}; set both, as data.sources: "
            "{NAME: {train: FILE, weight: 1}, ...}"
        )
    if config.sources and config.category_weights:
        raise ConfigError(
            f"data.category_weights={config.category_weights} with data.train=sources: give each source its own, as "
            "data.sources.NAME.category_weights, and data.category_weights={}"
        )
    return {name: _source(name, entry, config) for name, entry in config.sources.items()}


@contextlib.contextmanager
def of_source(name: str) -> Iterator[None]:
    """Names the source in an error of its data."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"data.sources.{name}: {error}") from error


def _source(name: str, entry: Any, config: DataConfig) -> DataConfig:
    key = f"data.sources.{name}"
    if not name or "/" in name:
        raise ConfigError(f"{key}: the name of a source is not empty and has no /, since ids begin with it")
    if not isinstance(entry, dict):
        raise ConfigError(f"{key}={entry!r} must be a mapping, such as {{train: FILE, weight: 1}}")
    for field in entry:
        if field not in (*OF_A_SOURCE, "weight"):
            close = nearest(str(field), [*OF_A_SOURCE, "weight"])
            hint = f"did you mean {close}?" if close else f"a source takes {', '.join(OF_A_SOURCE)}, weight"
            raise ConfigError(f"{key}.{field}: no such setting; {hint}")
    if not isinstance(entry.get("train"), str) or entry["train"] == SOURCES:
        raise ConfigError(f"{key}.train={entry.get('train')!r} must name a data set, as data.train does")
    for field, kind in (("fields", dict), ("category_weights", dict), ("train_split", str), ("image_root", str)):
        if not isinstance(entry.get(field, kind()), kind):
            words = "a mapping" if kind is dict else "a text"
            raise ConfigError(f"{key}.{field}={entry[field]!r} must be {words}")
    if entry.get("format") not in (None, *(known := get_args(FormatName))):
        close = nearest(str(entry["format"]), known)
        hint = f"did you mean {close}?" if close else f"it is one of {', '.join(known)}"
        raise ConfigError(f"{key}.format={entry['format']!r}: no such format; {hint}")
    own = {field: value for field, value in entry.items() if field != "weight"}
    own["fields"] = {**config.fields, **entry.get("fields", {})}
    return dataclasses.replace(config, sources={}, **own)


def source_weights(config: DataConfig) -> dict[str, float]:
    """The weight of every source, in any scale; {} where none has one, and they are mixed by size.

    Raises:
        ConfigError: a weight is no positive number.
    """
    weights = {name: entry.get("weight") for name, entry in config.sources.items()}
    if all(weight is None for weight in weights.values()):
        return {}
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise ConfigError(
                f"data.sources.{name}.weight={weight!r} must be a positive number; give every source one, or none"
            )
    return {name: float(weight) for name, weight in weights.items()}


def check_category_weights(weights: Mapping[str, float], present: Collection[str], setting: str) -> None:
    """Check the weights of categories.

    Raises:
        ConfigError: a weight of a category that is not present, or weights that cannot be shares.
    """
    for name in weights:
        if name not in present:
            raise ConfigError(f"{setting}.{name}: the data has no such category, but {', '.join(sorted(present))}")
    if any(not math.isfinite(w) or w < 0 for w in weights.values()) or not sum(weights.values()):
        raise ConfigError(f"{setting}={dict(weights)}: weights are finite, not negative, and not all 0")


def stream_weights(queries: list[Query], config: DataConfig) -> dict[str, Any]:
    """What QueryStream needs to draw as the settings say: `category_weights`, and with sources their `label`.

    A source's share is divided among its categories; each of these parts then runs through its own permutations.

    Raises:
        ConfigError: a weight that cannot be meant, or one of a category that the source does not have.
    """
    if config.train != SOURCES:
        return {"category_weights": config.category_weights}
    weights = source_weights(config)
    categories = {name: part.category_weights for name, part in source_configs(config).items()}
    if not weights and not any(categories.values()):
        return {"category_weights": {}}
    present: dict[str, Counter[str]] = {name: Counter() for name in categories}
    for query in queries:
        present[_source_of(query)][category_of(query)] += 1
    shares = {}
    for name, own in categories.items():
        weight = weights.get(name, float(present[name].total()))
        if not own:
            shares[name] = weight
            continue
        check_category_weights(own, present[name], f"data.sources.{name}.category_weights")
        shares |= {f"{name}/{category}": weight * part / sum(own.values()) for category, part in own.items()}

    def label(query: Query) -> str:
        source = _source_of(query)
        return f"{source}/{category_of(query)}" if categories[source] else source

    return {"category_weights": shares, "label": label}


def pass_rates(queries: list[Query], config: DataConfig) -> list[float]:
    """Each query's value in the column that `data.pass_rate` names, its source's own with sources; NaN without one."""
    columns = {name: part.pass_rate for name, part in source_configs(config).items()}
    named = [columns[_source_of(query)] if columns else config.pass_rate for query in queries]
    return [math.nan if name is None else query.metadata[name] for name, query in zip(named, queries, strict=True)]


def category_of(query: Query) -> str:
    """What `category_weights` are about."""
    return str(query.metadata.get("category"))


def _source_of(query: Query) -> str:
    return query.id.partition("/")[0]
