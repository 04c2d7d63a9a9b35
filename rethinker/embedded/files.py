"""What the words of the settings stand for that come with the package: data sets and a model, as files and a folder.

`data.train: sums`, `boards`, `easy_vqa` and `digits` become parquet files, which are read as any other data set is;
`tiny` as `policy.model` becomes the folder of a model. Both lie in the cache, and are made when they are asked for
first. A data set's name may say which split is meant (`data.validation: sums:test`); by default data.train is `train`,
and data.validation is `validation`, or `test` where there is no such split.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rethinker.config import Config, ConfigError, DataConfig, nearest
from rethinker.data.datasets import SPLIT, load_queries
from rethinker.data.mixture import OF_A_SOURCE, source_configs
from rethinker.data.subsets import Side
from rethinker.doctor import check_packages
from rethinker.embedded.boards import boards
from rethinker.embedded.digits import digits
from rethinker.embedded.easy_vqa import easy_vqa
from rethinker.embedded.sums import sums
from rethinker.runtime.files import whole_file
from rethinker.samples import Query

if TYPE_CHECKING:
    from rethinker.runtime.distributed import Ranks  # imports torch

# By name: the questions of a split, its splits (for training, for validation, others), and the package that they come
# with: its module and what it is installed as.
DATA_SETS = {
    "boards": (boards, ("train", "validation", "test"), "sklearn", "scikit-learn"),
    "sums": (sums, ("train", "validation", "test"), "sklearn", "scikit-learn"),
    "easy_vqa": (easy_vqa, ("train", "test"), "easy_vqa", "easy-vqa"),
    "digits": (digits, ("train", "test"), "sklearn", "scikit-learn"),
}


def cache_folder() -> Path:
    """Where files lie that can be made again: `$RETHINKER_CACHE`, else `~/.cache/rethinker`."""
    return Path(os.environ.get("RETHINKER_CACHE") or Path.home() / ".cache" / "rethinker")


def as_files(data: DataConfig, which: Side) -> DataConfig:
    """The settings with which `data/` reads `data.train` or `data.validation`: an embedded data set by its file.

    Args:
        data: the user's settings, which stay as they are.
        which: which of the two is to be read.

    Raises:
        ConfigError: a name that an embedded data set nearly has, a package that is missing, or a cache that cannot be
            written.
    """
    if which == "validation" and data.validation != SPLIT:
        file = _file(data.validation, "data.validation")
        return replace(data, validation=file, fields={}, format=None) if file else data
    sources = {name: as_files(own, "train") for name, own in source_configs(data).items()}
    if sources:
        entries = {
            name: {k: v for k, v in data.sources[name].items() if k != "format"}
            | {field: v for field in OF_A_SOURCE if (v := getattr(own, field)) is not None}
            for name, own in sources.items()
        }
        return replace(data, sources=entries, fields={}, format=None)
    file = _file(data.train, "data.train")
    # An image_root of "": images are told apart by their own names, wherever the package is installed.
    return replace(data, train=file, fields={}, format=None, image_root=data.image_root or "") if file else data


def model_folder(config: Config, ranks: Ranks) -> str:
    """The folder, or the name on the hub, of `policy.model`; `tiny` is made and warmed up on the training questions.

    Collective over `ranks`, which share that work; the answer is rank 0's.

    Raises:
        ConfigError: unusable data, or a cache that cannot be written.
    """
    if config.policy.model != "tiny":
        return ranks.broadcast(os.path.expanduser(config.policy.model))
    from rethinker.embedded.warmup import warmed_up_tiny  # imports torch

    queries = load_queries(as_files(config.data, "train"), "train")
    return str(warmed_up_tiny(config.policy.warmup, config.data, queries, cache_folder(), ranks))


def _file(given: str | None, setting: str) -> str | None:
    """The file of a split of an embedded data set, made if it is not there; None for any other data set."""
    name, _, split = (given or "").partition(":")
    if name not in DATA_SETS:
        word = given is not None and name.replace("-", "_").isidentifier() and not os.path.exists(given)
        if word and (close := nearest(name, DATA_SETS)):
            raise ConfigError(f"{setting}={given}: there is no such data set; did you mean {close}?")
        return None
    load, splits, package, distribution = DATA_SETS[name]
    split = split or splits[setting != "data.train"]
    if split not in splits:
        raise ConfigError(f"{setting}={given}: {name} has no split {split!r}, but {', '.join(splits)}")
    check_packages(f"{setting}={name}", package)
    made_of = [find_spec(package).origin, version(distribution), version("pillow")]
    # Boards are made of sums, too.
    made_of += [Path(file).read_bytes() for file in (__file__, *(f.__code__.co_filename for f in (load, sums)))]
    key = hashlib.sha256(repr(made_of).encode()).hexdigest()[:12]
    path = cache_folder() / f"{name}-{split}-{key}.parquet"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, load(split))
    except OSError as error:
        raise ConfigError(
            f"RETHINKER_CACHE={path.parent}: {setting}={name} cannot be written there ({error}); "
            "set RETHINKER_CACHE to a folder with 50 MB free"
        ) from error
    return str(path)


def _write(path: Path, queries: list[Query]) -> None:
    """Write the queries with a column per field and per key of their metadata."""
    import pyarrow
    from pyarrow import parquet

    columns = {name: [getattr(query, name) for query in queries] for name in ("id", "question", "answer")}
    columns["images"] = [[i["bytes"] if isinstance(i, dict) else i for i in query.images] for query in queries]
    columns |= {key: [query.metadata[key] for query in queries] for key in queries[0].metadata}
    with whole_file(path) as partial:  # by every rank that finds none, each beside the others
        # Room for all images in the dictionary: most are in many questions.
        parquet.write_table(pyarrow.table(columns), partial, compression="zstd", dictionary_pagesize_limit=64 * 2**20)
