"""Several sources as one data set: their ids, their own settings, and exact shares that survive a resume."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import load_queries
from rethinker.data.mixture import stream_weights
from rethinker.data.query_stream import QueryStream
from rethinker.embedded.files import as_files
from rethinker.settings import resolve_config, to_yaml
from tests.data.virl39k import write_fixture


@pytest.fixture
def config(tmp_path):
    virl = {"train": str(write_fixture(tmp_path)), "fields": {"images": "image", "id": "qid"}, "weight": 3}
    rows = [{"id": str(i), "question": f"{i}?", "answer": "1", "category": "ab"[i % 10 == 0]} for i in range(40)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sums = {"train": str(tmp_path / "sums.jsonl"), "weight": 1, "category_weights": {"a": 1, "b": 1}}
    return DataConfig(train="sources", sources={"virl": virl, "sums": sums}, validation=None)


def stream(config: DataConfig) -> QueryStream:
    config = as_files(config, "train")
    queries = load_queries(config, "train")
    return QueryStream(queries, seed=1, **stream_weights(queries, config))


def test_sources_are_loaded_each_in_its_way(config):
    """Columns and ids of both; ids are unique by the source's name."""
    queries = load_queries(config, "train")
    assert [q.id for q in queries[::200]] == ["virl/Processed-00000", "sums/0"] and len(queries) == 240
    assert len({q.id for q in queries}) == 240 and queries[1].images and not queries[200].images


def test_shares_are_exact_in_every_stretch(config):
    """3 to 1 between the sources, and 1 to 1 between the categories of the one that weighs them."""
    drawn = stream(config).next(800)
    for start in range(0, 800, 40):
        counts = Counter(q.id.partition("/")[0] for q in drawn[start : start + 40])
        assert abs(counts["virl"] - 30) <= 1
    categories = Counter(q.metadata["category"] for q in drawn if q.id.startswith("sums"))
    assert abs(categories["a"] - categories["b"]) <= 1 and sum(categories.values()) == 200
    first = [q.id for q in drawn if q.id.startswith("virl")][:200]
    assert len(set(first)) == 200  # a permutation of its own


def test_without_weights_by_size(config):
    """All questions once per epoch, in one permutation."""
    for source in config.sources.values():
        source.pop("weight"), source.pop("category_weights", None)
    assert len({q.id for q in stream(config).next(240)}) == 240


def test_a_saved_mixture_continues_exactly(config):
    """Law 10's part: the state, through JSON, gives the same queries as if nothing had happened."""
    whole = [q.id for q in stream(config).next(300)]
    first, second = stream(config), stream(config)
    first.next(111)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [q.id for q in second.next(189)] == whole[111:]


def test_every_source_is_split_by_itself(config):
    """`data.validation: split` holds out a part of each source; none of it is trained on."""
    config.validation, config.validation_share = "split", 0.2
    train, validation = load_queries(config, "train"), load_queries(config, "validation")
    assert {q.id.partition("/")[0] for q in validation} == {"virl", "sums"}
    assert not {q.id for q in train} & {q.id for q in validation}


def test_in_a_recipe(tmp_path):
    """As YAML, dotted on the command line, and back through --print_config."""
    overrides = ["--data.train", "sources", "--data.sources.a.train", "a.jsonl", "--data.sources.a.weight", "2"]
    config = resolve_config("easy_vqa_cpu", [*overrides, "--data.sources.b", "{train: digits, weight: 1}"])
    wanted = {"a": {"train": "a.jsonl", "weight": 2}, "b": {"train": "digits", "weight": 1}}
    assert config.data.sources == wanted
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert resolve_config(tmp_path / "again.yaml").data == config.data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": {}}, r"data\.sources goes with data\.train=sources"),
        ({"train": "digits"}, r"data\.sources goes with data\.train=sources, and data\.train is digits"),
        ({"sources": {"a": "x.jsonl"}}, r"data\.sources\.a='x\.jsonl' must be a mapping"),
        ({"sources": {"a": {"weight": 1}}}, r"data\.sources\.a\.train=None must name a data set"),
        ({"sources": {"a/b": {"train": "digits"}}}, r"data\.sources\.a/b: the name"),
        ({"sources": {"a": {"train": "digits", "wieght": 1}}}, r"data\.sources\.a\.wieght: .*did you mean weight"),
        ({"sources": {"a": {"train": "digits", "fields": 3}}}, r"data\.sources\.a\.fields=3 must be a mapping"),
        ({"sources": {"a": {"train": "no.jsonl"}}}, r"data\.sources\.a: data\.train=no\.jsonl: no such file"),
        ({"category_weights": {"a": 1}}, r"data\.category_weights=.*give each source its own"),
        ({"sources": {"a": {"train": "digits", "weight": 0}}}, r"data\.sources\.a\.weight=0 must be a positive"),
        (
            {"sources": {"a": {"train": "digits", "weight": 1}, "b": {"train": "digits"}}},
            r"data\.sources\.b\.weight=None .*give every source one, or none",
        ),
        (
            {"sources": {"a": {"train": "digits", "weight": 1, "category_weights": {"x": 1}}}},
            r"data\.sources\.a\.category_weights\.x: .*but add, compare, read",
        ),
    ],
)
def test_mistakes(config, change, message):
    """Each is one line that names the source's setting."""
    for name, value in change.items():
        setattr(config, name, value)
    with pytest.raises(ConfigError, match=message):
        stream(config)
