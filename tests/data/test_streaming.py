"""Questions that are not held: their order in every epoch, an exact resume, and the rows that are left out."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from rethinker.checkpoint.resume import frozen, read_state
from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import load_queries
from rethinker.data.query_stream import QueryStream
from rethinker.data.streaming import StreamedQueries, open_stream
from rethinker.settings import resolve_config
from tests.data.virl39k import SCHEMA, picture, write_fixture

FIELDS = {"images": "image", "id": "qid"}
KINDS = ("parquet", "jsonl", "folder", "saved")


def write(folder: Path, kind: str) -> str:
    """200 rows of ViRL39K with their images beside them, in ten parts or more; returns data.train."""
    whole = write_fixture(folder)
    table, name = parquet.read_table(whole), folder / "rows"
    whole.unlink()
    if kind == "parquet":
        name = name.with_suffix(".parquet")
        parquet.write_table(table, name, row_group_size=20)
    elif kind == "jsonl":
        name = name.with_suffix(".jsonl")
        name.write_text("\n".join(map(json.dumps, table.to_pylist())))
    elif kind == "folder":
        name.mkdir()
        for start in range(0, 200, 100):
            parquet.write_table(table.slice(start, 100), name / f"{start}.parquet", row_group_size=10)
    else:
        datasets.Dataset(table).save_to_disk(name)
    return str(name)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Where the library keeps its copies."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def config(folder: Path, kind: str = "parquet", **settings) -> DataConfig:
    given = {"fields": FIELDS, "image_root": str(folder), "validation": None, "streaming": True}
    return DataConfig(train=write(folder, kind), **given | settings)


def ids(queries) -> list[str]:
    return [query.id for query in queries]


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_is_that_of_memory(tmp_path, kind):
    """The very questions, each once in every epoch, in the order in which they are drawn when all are held."""
    data = config(tmp_path, kind)
    stream, length = open_stream(data, 1)
    assert length is None and len(stream) == 200
    drawn = stream.next(400)
    assert ids(drawn[:200]) != ids(drawn[200:]) and len(set(ids(drawn[:200]))) == 200
    data.streaming = False
    inside, length = open_stream(data, 1)
    assert type(inside) is QueryStream and length == 200
    assert drawn == inside.next(400)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_stream_continues_exactly(tmp_path, kind):
    """Law 10's part: from anywhere, the end of an epoch too, it goes on as if nothing had happened."""
    data = config(tmp_path, kind)
    stream = StreamedQueries(data, 3)
    states, whole = {}, []
    for place in range(430):
        if place in (0, 1, 199, 200, 201, 400):
            states[place] = json.dumps(stream.state_dict())
        whole += ids(stream.next(1))
    for place, state in states.items():
        resumed = StreamedQueries(data, 3)
        resumed.load_state_dict(json.loads(state))
        assert (resumed.fingerprint(), ids(resumed.next(430 - place))) == (stream.fingerprint(), whole[place:]), place
    for place in (201, 1):  # back, as after a rollout that was broken off
        stream.load_state_dict(json.loads(states[place]))
        assert ids(stream.next(40)) == whole[place : place + 40]


def test_a_state_of_other_data_is_refused(tmp_path):
    """Another seed, another number of rows, the windows of an earlier release; other rows have another fingerprint."""
    data = config(tmp_path)
    stream = StreamedQueries(data, 3)
    stream.next(40)
    state = stream.state_dict()
    with pytest.raises(ConfigError, match="seed: the checkpoint's data order has seed 3, this run 4"):
        StreamedQueries(data, 4).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"data\.train: the checkpoint's data order has sizes None"):
        stream.load_state_dict({"seed": 3, "drawn": {"": 40}, "windows": {}})
    rows = parquet.read_table(data.train).to_pylist()
    for row in rows:
        row["answer"] = "another"
    parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), data.train, row_group_size=20)
    assert StreamedQueries(data, 3).fingerprint() != stream.fingerprint()


def test_bad_rows_are_passed_over_and_counted(tmp_path, caplog):
    """As from memory: a line that is no JSON, a missing answer; one too many stops, and an id that occurs again."""
    rows = [{"id": str(i), "question": f"{i}?", "answer": "1"} for i in range(400)]
    rows[7]["answer"] = None
    lines = [json.dumps(row) for row in rows]
    lines[30] = "{"
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    data = DataConfig(train=str(path), streaming=True)
    stream = StreamedQueries(data, 0)
    drawn = stream.next(796)
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("left out ") and said.endswith("; further rows are only counted")
    assert Counter(ids(drawn)) == {query.id: 2 for query in load_queries(replace(data, streaming=False), "train")}
    assert Counter(stream.queries._readers[""].bad.values()) == {"no answer": 1, "damaged row": 1}
    data.max_bad_rows = 0.0025
    with pytest.raises(ConfigError, match=r"of 2 unusable rows of 400; data\.max_bad_rows=0\.0025 allows 1"):
        StreamedQueries(data, 0).next(400)
    path.write_text("\n".join([*lines[:5], lines[3]]))
    with pytest.raises(ConfigError, match=r"data\.fields\.id=id: the id '3' occurs more than once"):
        StreamedQueries(data, 0).next(6)


def test_one_cell_that_is_no_utf8(tmp_path, caplog):
    """It costs its row, also where a library decodes many at once."""
    texts = [b"ok?"] * 77 + [b"\xff\xfe?"] + [b"ok?"] * 122
    questions = pa.Array.from_buffers(pa.string(), 200, pa.array(texts, pa.binary()).buffers())
    table = pa.table({"question": questions, "answer": ["1"] * 200, "id": [str(i) for i in range(200)]})
    parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=50)
    stream = StreamedQueries(DataConfig(train=str(tmp_path / "rows.parquet"), streaming=True), 0)
    assert set(ids(stream.next(199))) == {str(i) for i in range(200)} - {"77"}
    assert "row 77 cannot be read" in caplog.text


def test_split_and_pass_rates_are_those_of_memory(tmp_path):
    """What is held out and what the model always or never answers: row by row, the same questions."""
    fields = FIELDS | {"rate": "PassRate_7BBase"}
    data = config(tmp_path, fields=fields, validation="split", validation_share=0.2, pass_rate="rate")
    stream, held_out = StreamedQueries(data, 0), load_queries(data, "validation")
    first = load_queries(data, "validation", 5)
    data.streaming = False
    train = load_queries(data, "train")
    assert len(train) < 120 and held_out == load_queries(data, "validation") and first == held_out[:5]
    assert set(ids(stream.next(len(train)))) == set(ids(train))


def test_embedded_images_stay_in_their_rows(tmp_path):
    """Bytes that are read when they are drawn; the caches know them by a name."""
    rows = [{"question": f"{i}?", "answer": "1", "images": [{"bytes": picture(f"{i}_red.png")}]} for i in range(20)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=5)
    stream = StreamedQueries(DataConfig(train=str(tmp_path / "rows.parquet"), streaming=True), 0)
    for query in stream.next(20):
        assert query.images[0]["bytes"] == picture(f"{query.question[:-1]}_red.png")
        assert len(query.images[0]["name"]) == 32


def mixture(folder: Path) -> DataConfig:
    (folder / "virl").mkdir()
    virl = {
        "train": write(folder / "virl", "parquet"),
        "fields": FIELDS,
        "image_root": str(folder / "virl"),
        "weight": 3,
    }
    rows = [{"question": f"{i}?", "answer": "1", "images": [{"bytes": picture(f"{i}_red.png")}]} for i in range(40)]
    parquet.write_table(pa.Table.from_pylist(rows), folder / "red.parquet", row_group_size=5)
    sources = {"virl": virl, "red": {"train": str(folder / "red.parquet"), "weight": 1}}
    return DataConfig(train="sources", sources=sources, validation=None, streaming=True)


def test_sources_take_turns(tmp_path):
    """Exact shares in every stretch, each source its own permutations, and an exact resume."""
    data = mixture(tmp_path)
    stream, other = StreamedQueries(data, 5), StreamedQueries(data, 5)
    drawn = ids(stream.next(120))
    state = json.loads(json.dumps(stream.state_dict()))
    drawn += ids(stream.next(200))
    for start in range(0, 320, 40):
        assert abs(Counter(i.partition("/")[0] for i in drawn[start : start + 40])["virl"] - 30) <= 1
    assert len({i for i in drawn if i.startswith("virl")}) == 200  # of 240
    assert len({i for i in drawn[:160] if i.startswith("red")}) == 40
    other.load_state_dict(state)
    assert ids(other.next(200)) == drawn[120:]


def test_queries_of_held_samples_are_kept(tmp_path):
    """Through a checkpoint's files: read again, with their images, where the data lies now."""
    data = mixture(tmp_path)
    stream = StreamedQueries(data, 5)
    held = stream.next(60)
    frozen(stream.keep([*held, held[3]]))(tmp_path / "state")
    again = StreamedQueries(data, 5).kept(read_state(tmp_path / "state"))
    assert again == {query.id: query for query in held}
    (tmp_path / "virl" / "images").rename(tmp_path / "images")
    data.sources["virl"]["image_root"] = str(tmp_path)
    moved = StreamedQueries(data, 5).kept(read_state(tmp_path / "state"))
    paths = [path for query in moved.values() for path in query.images if isinstance(path, str)]
    assert len(paths) > 20 and all(Path(path).is_file() for path in paths)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category_weights": {"a": 1}}, r"data\.category_weights=.* set it to \{\}"),
        ({"train": "no.jsonl"}, r"data\.train=no\.jsonl: no such file"),
        ({"train": "nowhere/nothing"}, r"data\.train=nowhere/nothing: cannot load it"),
        ({"fields": {"question": "qestion"}}, r"data\.fields\.question=qestion: .*the nearest is question"),
        ({"pass_rate": "rate"}, r"data\.pass_rate=rate: .* has no such column, but PassRate_32BTrained"),
        ({"train": "sources"}, r"data\.sources goes with data\.train=sources"),
        (
            {"train": "sources", "sources": {"a": {"train": "x.jsonl", "weight": 1}}},
            r"data\.sources\.a: data\.train=x\.jsonl: no such file",
        ),
        (
            {"validation": "split", "validation_share": 0.9999999},
            r"none of its 200 rows is left for train .*for validation 200.* data\.validation_share",
        ),
    ],
)
def test_mistakes(tmp_path, change, message):
    """Each is one line that names the setting."""
    data = config(tmp_path)
    for name, value in change.items():
        setattr(data, name, value)
    with pytest.raises(ConfigError, match=message):
        StreamedQueries(data, 0)


def test_empty_and_damaged_files(tmp_path):
    """Neither hangs: an endless order of nothing is none."""
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text("\n\n")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    for name, message in (("a.jsonl", "is empty"), ("b.jsonl", "is empty"), ("c.parquet", "not a readable")):
        with pytest.raises(ConfigError, match=rf"data\.train=.*{name}.*{message}"):
            StreamedQueries(DataConfig(train=str(tmp_path / name), streaming=True), 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, r"data\.streaming=true .*set train\.max_steps"),
        ({"train.max_steps": 3, "policy.model": "tiny"}, r"policy\.model=tiny .*give a model folder"),
        ({"data.shuffle_buffer": 10}, r"'data\.shuffle_buffer' is gone: data\.streaming shuffles all rows"),
    ],
)
def test_settings_that_need_all_questions(overrides, message):
    """Refused before anything is read."""
    base = {"data.streaming": True, "policy.model": "some/model", "train.max_steps": None}
    with pytest.raises(ConfigError, match=message):
        resolve_config("easy_vqa_cpu", base | overrides)


_MEASURE = """
import re, sys
from pathlib import Path
from rethinker.config import DataConfig
from rethinker.data.streaming import open_stream
data = DataConfig(train=sys.argv[1], streaming=sys.argv[2] == "stream")
import datasets, pyarrow.parquet, torch
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[3])
# Without the pages of mapped files, which the system takes back when it needs them.
held = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
before = held()
stream, _ = open_stream(data, 0)
stream.next(2000)
early, most = held(), 0
for _ in range(48):
    stream.next(1000)
    most = max(most, held())
print(before, early, most)
"""


@pytest.mark.soak
def test_memory_stays_flat(tmp_path):
    """50,000 rows of 4 KB: after 2,000 of them the process grows by less than a tenth of what it takes to hold all."""
    rows = ({"id": str(i), "question": f"{i} " + "word " * 800, "answer": "1"} for i in range(50_000))
    with parquet.ParquetWriter(
        tmp_path / "rows.parquet", pa.schema([(name, pa.string()) for name in ("id", "question", "answer")])
    ) as writer:
        for _ in range(50):
            writer.write_table(pa.Table.from_pylist([next(rows) for _ in range(1000)], schema=writer.schema))
    grown = {}
    for kind in ("stream", "memory"):
        command = [sys.executable, "-c", _MEASURE, str(tmp_path / "rows.parquet"), kind, str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        before, early, most = map(float, done.stdout.split())
        print(f"{kind}: {before:.0f} MiB, {early:.0f} after 2,000 questions, at most {most:.0f} up to 50,000")
        grown[kind] = most - (early if kind == "stream" else before)
    assert grown["memory"] > 200 and grown["stream"] < 0.1 * grown["memory"]
