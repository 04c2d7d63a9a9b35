"""Rows that cannot be used are left out and counted, up to a share; then the first one is named."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from rethinker.config import ConfigError, DataConfig
from rethinker.data import datasets
from rethinker.data.datasets import load_queries
from rethinker.data.prompts import PromptEncoder, select_fitting
from rethinker.data.query_stream import QueryStream
from rethinker.embedded.tiny import create_tiny
from rethinker.policy.loading import load_processor
from rethinker.samples import Query
from tests.data.virl39k import SCHEMA, write_fixture

BAD = [
    ({"question": None}, "no question"),
    ({"answer": None}, "no answer"),
    ({"answer": float("nan")}, "no answer"),
    ({"answer": {"a": 1}}, "no answer"),
    ({"answer": [1, [2]]}, "no answer"),
    ({"answer": []}, "empty answer"),
    ({"answer": " "}, "empty answer"),
    ({"answer": "\\boxed{ }"}, "empty box"),
    ({"answer": "so it is \\boxed{}"}, "empty box"),
    ({"answer": "\\boxed{3"}, "unclosed box"),
    ({"answer": "\boxed{3}"}, "control character"),
    ({"answer": "\frac{1}{2}"}, "control character"),
    ({"answer": "3 \times 4"}, "control character"),
    ({"question": " "}, "no question"),
    ({"question": []}, "no question"),
    ({"question": [{"role": "user", "content": "1?"}, {"role": "user", "content": "2?"}]}, "several turns"),
    ({"images": "http://a.b/c.png"}, "image URL"),
    ({"images": ["data:image/png;base64,?"]}, "no image"),
    ({"images": ["none.png"]}, "no image"),
    ({"images": [3]}, "no image"),
    ({"images": "x" * 5000}, "no image"),
    ({"images": {"bytes": "text"}}, "no image"),
    ({"question": "<image>?"}, "image marks"),
    ({"question": "half \ud800"}, "no Unicode"),
    ({"category": "half \udfff"}, "no Unicode"),
    ({"id": "row 0"}, "repeated id"),
    ('{"question"', "damaged row"),
    ("[1]", "damaged row"),
]


def write(folder, count: int, bad: dict[int, object]) -> str:
    """A .jsonl file of `count` rows; those in `bad` are other lines, or rows with other values."""
    lines = []
    for number in range(count):
        row = {"question": f"{number}?", "answer": "1", "id": f"row {number}", "images": []}
        change = bad.get(number, {})
        lines.append(change if isinstance(change, str) else json.dumps(row | change))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_every_kind_of_bad_row_is_left_out(tmp_path, caplog, change, reason):
    """One of 100 rows may be anything: the other 99 are there, and one line says how many went, why, and the first."""
    queries = load_queries(DataConfig(train=write(tmp_path, 100, {57: change})), "train")
    assert [query.id for query in queries] == [f"row {i}" for i in range(100) if i != 57]
    (record,) = caplog.records
    message = record.getMessage()
    assert f"of 100 rows left out 1 unusable ones ({reason} 1); the first: " in message and "\n" not in message
    with pytest.raises(ConfigError) as small:  # of 99 rows none may be
        load_queries(DataConfig(train=write(tmp_path, 99, {57: change})), "train")
    assert str(small.value) in message


def test_boxes_of_virl39k_that_hold_nothing(tmp_path, caplog):
    """Rows whose box is empty or never closed: left out, counted each by its reason, and the first is named."""
    path = write_fixture(tmp_path)
    rows = parquet.read_table(path).to_pylist()
    for number, answer in ((11, "\\boxed{}"), (50, "\\boxed{\\frac{1}{2}"), (51, "\\boxed{ }")):
        rows[number]["answer"] = answer
    parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    config = DataConfig(train=str(path), fields={"images": "image", "id": "qid"}, max_bad_rows=0.02)
    assert len(load_queries(config, "train")) == 197
    said = "of 200 rows left out 3 unusable ones (empty box 2, unclosed box 1); the first: "
    assert said in caplog.text and "row Processed-00011 has an empty box as answer in column 'answer'" in caplog.text


def test_reasons_are_counted_apart_and_the_limit_is_a_share(tmp_path, caplog):
    """data.max_bad_rows of the rows, rounded down; one more stops with the first row, the count and the setting."""
    bad = {10: {"answer": None}, 20: {"answer": None}, 30: {"question": 3}}
    file = write(tmp_path, 300, bad)
    assert len(load_queries(DataConfig(train=file), "train")) == 297
    assert "3 unusable ones (no answer 2, no question 1); the first: " in caplog.text
    with pytest.raises(
        ConfigError, match=r"row 10 has nothing as answer.*one of 3 unusable rows.*max_bad_rows=0.009.* 2"
    ):
        load_queries(DataConfig(train=file, max_bad_rows=0.009), "train")
    with pytest.raises(ConfigError, match=r"row row 10 has nothing as answer in column 'answer'; .* a number$"):
        load_queries(DataConfig(train=file, max_bad_rows=0.0), "train")
    with pytest.raises(ConfigError, match="no question text"):  # nothing is left
        load_queries(
            DataConfig(train=write(tmp_path, 2, {0: {"question": 1}, 1: {"question": 1}}), max_bad_rows=1.0), "train"
        )


def test_a_wrong_column_stops_after_the_share(tmp_path, monkeypatch):
    """A column of the wrong type ends a large data set after 1% of its rows, not after all."""
    file = write(tmp_path, 1000, {number: {"answer": None} for number in range(1000)})
    read = []
    real = datasets.Reader._query
    monkeypatch.setattr(datasets.Reader, "_query", lambda self, *row: read.append(row) or real(self, *row))
    with pytest.raises(ConfigError, match="row row 0 has nothing as answer"):
        load_queries(DataConfig(train=file), "train")
    assert len(read) == 11


def test_other_ranks_are_silent(tmp_path, caplog, monkeypatch):
    """Of eight ranks one says it."""
    monkeypatch.setenv("RANK", "3")
    load_queries(DataConfig(train=write(tmp_path, 100, {5: {"answer": None}})), "train")
    assert not caplog.records


def test_one_cell_that_is_no_utf8(tmp_path, caplog):
    """A Parquet text that is no UTF-8 costs its row, not the 1,024 that are read with it."""
    questions = pa.Array.from_buffers(
        pa.string(), 200, pa.array([b"ok?"] * 77 + [b"\xff\xfe?"] + [b"ok?"] * 122, pa.binary()).buffers()
    )
    table = pa.table({"question": questions, "answer": ["1"] * 200, "id": [str(i) for i in range(200)]})
    parquet.write_table(table, tmp_path / "rows.parquet")
    queries = load_queries(DataConfig(train=str(tmp_path / "rows.parquet")), "train")
    assert len(queries) == 199 and "77" not in {query.id for query in queries}
    assert "damaged row 1" in caplog.text and "row 77 cannot be read" in caplog.text


def test_a_damaged_file_is_one_line(tmp_path):
    """A Parquet file whose pages are damaged behind a whole footer is refused, wherever the library gives up."""
    table = pa.table({"question": [f"{i} is what?" * 9 for i in range(5000)], "answer": ["1"] * 5000})
    parquet.write_table(table, tmp_path / "rows.parquet", compression="zstd")
    content = bytearray((tmp_path / "rows.parquet").read_bytes())
    content[100:2000] = bytes(1900)
    (tmp_path / "rows.parquet").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.train=.*rows\.parquet: damaged data"):
        load_queries(DataConfig(train=str(tmp_path / "rows.parquet")), "train")


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return load_processor(create_tiny(tmp_path_factory.mktemp("tiny"), seed=0))


def pictures(folder, count: int, broken: set[int]) -> list[Query]:
    """Queries about an image each; the files of `broken` end in the middle, which only decoding tells."""
    queries = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.effect_noise((32, 32), 90).save(path)
        if number in broken:
            path.write_bytes(path.read_bytes()[:300])
        queries.append(Query(f"q{number}", "what?", "a", (str(path),)))
    return queries


def encoder(processor, **settings) -> PromptEncoder:
    return PromptEncoder(processor, DataConfig(min_pixels=1024, max_pixels=1024, **settings))


def test_an_image_that_breaks_when_drawn_costs_its_query(processor, tmp_path, caplog):
    """Met in the middle of training: left out and counted once, named once; all others are drawn, epoch for epoch."""
    queries = pictures(tmp_path, 40, broken={7, 23})
    ours = encoder(processor, max_bad_rows=0.05)
    stream = QueryStream(queries, seed=0)
    drawn = [ours.fitting(stream) for _ in range(76)]
    assert Counter(query.id for query in drawn) == {f"q{i}": 2 for i in range(40) if i not in (7, 23)}
    for query in drawn:
        ours.encode(query)
    assert ours.dropped == {"unreadable image": 2}
    assert len(caplog.records) == 1 and "cannot read the image" in caplog.text
    kept, dropped = select_fitting(queries, encoder(processor, max_bad_rows=0.05))
    assert len(kept) == 38 and dropped == {"unreadable image": 2}


def test_too_many_broken_images_stop_the_run(processor, tmp_path):
    """Beyond data.max_bad_rows of the queries the error names the query, the file and the setting."""
    queries = pictures(tmp_path, 40, broken={7, 23, 31})
    ours, stream = encoder(processor, max_bad_rows=0.05), QueryStream(queries, seed=0)
    with pytest.raises(
        ConfigError,
        match=r"query q\d+: cannot read the image .*\.png .*of 3 unusable rows of 40.*max_bad_rows=0.05",
    ):
        [ours.fitting(stream) for _ in range(40)]
    with pytest.raises(ConfigError, match=r"data\.max_bad_rows=0\.05"):
        select_fitting(queries, encoder(processor, max_bad_rows=0.05))
    with pytest.raises(ConfigError, match=r"query q7: cannot read the image .*7\.png .*; repair or remove it$"):
        select_fitting(queries, encoder(processor))  # 1% of 40 is none


def test_ranks_draw_the_same_queries_and_a_checkpoint_goes_on(processor, tmp_path):
    """What fits is a matter of the data: every rank's encoder draws the same, and so does one resumed in the middle."""
    queries = pictures(tmp_path, 30, broken={3, 14})
    ours, theirs = (encoder(processor, max_bad_rows=0.1) for _ in range(2))
    streams = [QueryStream(queries, seed=1) for _ in range(2)]
    mine = [ours.fitting(streams[0]).id for _ in range(60)]
    assert mine[:25] == [theirs.fitting(streams[1]).id for _ in range(25)]
    saved = json.loads(json.dumps([theirs.state_dict(), streams[1].state_dict()]))
    resumed, stream = encoder(processor, max_bad_rows=0.1), QueryStream(queries, seed=1)
    resumed.load_state_dict(saved[0])
    stream.load_state_dict(saved[1])
    assert mine[25:] == [resumed.fitting(stream).id for _ in range(35)]
    assert resumed.state_dict() == ours.state_dict() and resumed.dropped == {"unreadable image": 2}


def test_an_endless_question_is_left_out_unread(processor):
    """A question of 50 million characters is too long without being tokenised."""
    ours = encoder(processor, max_prompt_tokens=50)
    ours._token_ids = None  # would be called
    assert ours.misfit(Query("q", "x" * 50_000_000, "")) == "data.max_prompt_tokens"
