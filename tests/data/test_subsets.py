"""A part held out by hash, and the questions that a model answers sometimes."""

from __future__ import annotations

import json
import random

import pytest

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import load_queries
from rethinker.data.subsets import side_of
from rethinker.samples import Query
from tests.data.virl39k import picture, write_fixture


def made(n: int = 2000) -> list[Query]:
    """Questions about n / 4 images, some about two, some about none."""
    queries = []
    for i in range(n):
        images = {0: (), 1: (f"/data/{i // 4}.png", f"/data/{(i * 7) % n // 4}.png")}.get(
            i % 10, (f"/data/{i // 4}.png",)
        )
        queries.append(Query(str(i), f"question {i // 3 if not images else 'about it'}", "a", images))
    return queries


def sides(queries, share=0.1, root="/data"):
    return [{q.id for q in queries if side_of(q, share, root) == side} for side in ("train", "validation")]


def test_an_image_is_on_one_side():
    """No image, and no text-only question, is trained on and validated on; what would need both is left out."""
    queries = made()
    train, validation = sides(queries)
    keys = {q.id: set(q.images) or {q.question} for q in queries}
    assert not set().union(*map(keys.get, train)) & set().union(*map(keys.get, validation))
    assert 0.06 < len(validation) / len(queries) < 0.14
    torn = {q.id for q in queries} - train - validation
    assert 0 < len(torn) < 0.03 * len(queries) and all(len(keys[i]) == 2 for i in torn)


def test_the_split_is_stable():
    """Order, growth, other ids and another place of the data move no question to the other side."""
    queries = made()
    train, validation = sides(queries)
    shuffled = random.Random(0).sample(queries, len(queries))
    assert sides(shuffled) == [train, validation]
    fewer = sides(queries[:700])
    assert fewer[0] <= train and fewer[1] <= validation
    moved = [
        Query(q.id, q.question, q.answer, tuple(i.replace("/data", "/else/where") for i in q.images)) for q in queries
    ]
    assert sides(moved, root="/else/where") == [train, validation]
    more = sides(queries, share=0.2)
    assert more[1] > validation and more[0] < train


def test_folder_archive_and_bytes(tmp_path):
    """`data.validation: split`: from a folder and from a .zip the same split; embedded images go by their bytes."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "zip").mkdir()
    own = {"fields": {"images": "image", "id": "qid"}, "validation": "split", "validation_share": 0.2}
    folder = DataConfig(train=str(write_fixture(tmp_path / "folder")), **own)
    root = str(tmp_path / "zip/images.zip")
    archive = DataConfig(train=str(write_fixture(tmp_path / "zip", archive=True)), image_root=root, **own)
    for side in ("train", "validation"):
        assert [q.id for q in load_queries(folder, side)] == [q.id for q in load_queries(archive, side)]
    assert 15 < len(load_queries(folder, "validation")) < 70
    images = [picture(f"{n}_red.png") for n in range(12)]
    queries = [Query(str(i), "q", "a", ({"bytes": images[i % 12]},)) for i in range(120)]
    train, validation = sides(queries, share=0.3, root=None)
    assert len(train) + len(validation) == 120 and train and validation
    assert {int(i) % 12 for i in train}.isdisjoint({int(i) % 12 for i in validation})


def rows(folder, count: int, **columns) -> str:
    row = {"question": "q", "answer": "a", **columns}
    path = folder / "d.jsonl"
    path.write_text("\n".join(json.dumps(row | {"id": str(i), "question": f"{i}?"}) for i in range(count)))
    return str(path)


def test_a_share_that_leaves_nothing(tmp_path):
    """The setting is named, with what it did."""
    config = DataConfig(train=rows(tmp_path, 3), validation="split", validation_share=0.001)
    with pytest.raises(ConfigError, match=r"none of its 3 rows is left for validation \(for train 3\); change data"):
        load_queries(config, "validation")


def test_pass_rates(tmp_path, caplog):
    """Only 0 < pass rate < 1 trains; the rest is counted by reason, -1 as not measured; validation keeps all."""
    rates = [0, 0.5, 1, -1, None, 0.125, 1.0, "odd"]
    rows = [{"question": "q", "answer": "a", "id": str(i), "rate": rate} for i, rate in enumerate(rates)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(train=str(path), validation=str(path), pass_rate="rate")
    with caplog.at_level("INFO"):
        assert [q.id for q in load_queries(config, "train")] == ["1", "5"]
    assert "of 8 rows not used for train: not measured 3, always right 2, always wrong 1" in caplog.text
    assert len(load_queries(config, "validation")) == 8


def test_pass_rates_of_virl39k(tmp_path):
    """Its columns as they are called there."""
    path = str(write_fixture(tmp_path))
    fields = {"images": "image", "id": "qid"}
    queries = load_queries(DataConfig(train=path, fields=fields, pass_rate="PassRate_7BBase"), "train")
    assert 0 < len(queries) < 200 and all(0 < q.metadata["PassRate_7BBase"] < 1 for q in queries)


def test_a_column_that_is_not_there(tmp_path):
    """The columns that are there are named."""
    config = DataConfig(train=rows(tmp_path, 1, level=1), pass_rate="rate")
    with pytest.raises(ConfigError, match=r"data\.pass_rate=rate: .* has no such column, but level"):
        load_queries(config, "train")
    config.pass_rate = "level"
    with pytest.raises(ConfigError, match=r"none of its 1 rows .*\(always right 1\); change data\.pass_rate=level"):
        load_queries(config, "train")
