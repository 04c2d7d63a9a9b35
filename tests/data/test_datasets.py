"""Data sets of every supported kind, every mistake in them as one clear line, and the order of training."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from rethinker.config import ConfigError, DataConfig
from rethinker.data.datasets import load_queries
from rethinker.data.query_stream import QueryStream
from rethinker.data.sources import open_table
from rethinker.samples import Query

ROWS = [
    {"question": "What color?", "answer": "red", "images": ["a.png"], "id": "one", "level": 3},
    {"question": "<image> or <image>?", "answer": "2", "images": ["a.png", "b/c.png"], "id": "two", "level": 4},
    {"question": "2 + 2?", "answer": "4", "images": [], "id": "three", "level": 5},
]


def png(color: str = "red", size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "b/c.png").write_bytes(png("blue"))
    return tmp_path


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def load(name: str, which: str = "train", **settings) -> list[Query]:
    return load_queries(DataConfig(**{which: name}, **settings), which)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_files(folder, suffix):
    """A file's rows become queries: image lists, relative paths from the file's folder, text-only rows, metadata."""
    queries = load(write(folder / f"data{suffix}", ROWS))
    assert queries == [
        Query("one", "What color?", "red", (str(folder / "a.png"),), {"level": 3}),
        Query("two", "<image> or <image>?", "2", (str(folder / "a.png"), str(folder / "b/c.png")), {"level": 4}),
        Query("three", "2 + 2?", "4", (), {"level": 5}),
    ]


def test_text_only_rows_of_every_spelling(folder):
    """METHOD's fault 9: rows without an image load, whatever stands in the column."""
    rows = [{"question": "q", "answer": 1, "images": nothing} for nothing in (None, [], "")]
    assert [q.images for q in load(write(folder / "d.jsonl", [*rows, {"question": "q", "answer": 0.5}]))] == [()] * 4
    assert [q.id for q in load(str(folder / "d.jsonl"))] == ["0", "1", "2", "3"]
    assert [q.answer for q in load(str(folder / "d.jsonl"))] == ["1", "1", "1", "0.5"]


def test_field_mapping_and_image_root(folder, tmp_path_factory):
    """ViRL39K's columns through data.fields; paths start from data.image_root; its boxed answers stay as they are."""
    rows = [
        {
            "question": "x",
            "answer": "\\boxed{A}",
            "qid": "v-1",
            "image": ["a.png"],
            "category": "Math",
            "options": ["u", "w"],
        }
    ]
    path = write(tmp_path_factory.mktemp("elsewhere") / "virl.parquet", rows)
    fields = {"images": "image", "id": "qid", "choices": "options"}
    assert load(path, fields=fields, image_root=str(folder)) == [
        Query("v-1", "x", "\\boxed{A}", (str(folder / "a.png"),), {"category": "Math", "choices": ["u", "w"]})
    ]


def test_images_as_bytes(folder):
    """Parquet rows may hold the images themselves, as Hugging Face stores them."""
    rows = [{"question": "x", "answer": "1", "images": [{"bytes": png(), "path": None}]}]
    rows += [{"question": "y", "answer": "1", "images": [{"bytes": None, "path": "a.png"}]}]
    first, second, third = load(write(folder / "d.parquet", [*rows, rows[0]]))
    assert first.images == ({"bytes": png()},) and second.images == (str(folder / "a.png"),)
    assert third.images[0] is first.images[0]  # equal images are held once


@pytest.mark.soak
def test_a_row_group_of_more_images_than_an_arrow_array_takes(tmp_path):
    """More than 2 GiB in one row group, as writers leave it that count rows: read in order, each row its own."""
    images = pa.list_(pa.struct([("bytes", pa.binary())]))
    rows = [{"images": [{"bytes": i.to_bytes(4) + bytes(2**22)}]} for i in range(600)]
    parts = [pa.RecordBatch.from_pylist(rows[i : i + 100], pa.schema([("images", images)])) for i in range(0, 600, 100)]
    parquet.write_table(pa.Table.from_batches(parts), tmp_path / "big.parquet", row_group_size=600, compression="zstd")
    read = open_table(str(tmp_path / "big.parquet"), "train", "data.train").rows()
    assert [int.from_bytes(row["images"][0]["bytes"][:4]) for row in read] == list(range(600))
    with pytest.raises(ConfigError, match="row groups below 2 GiB"):
        open_table(str(tmp_path / "big.parquet"), "train", "data.train", streaming=True)


@pytest.mark.parametrize(("which", "advice"), [("train", "data.streaming=true reads"), ("validation", "give fewer")])
def test_much_held_in_memory_is_said_once(folder, caplog, monkeypatch, which, advice):
    """Embedded images that take more than the bound: one warning with their size and the setting that reads them late;
    none where equal ones are held once, or where rows stay on the disk."""
    rows = [{"question": f"{i}?", "answer": "1", "images": [{"bytes": png(size=(8, 8 + i))}]} for i in range(20)]
    path = write(folder / "d.parquet", rows)
    monkeypatch.setattr("rethinker.data.datasets.MUCH_HELD", 5 * len(png()))
    load(write(folder / "equal.parquet", rows[:1] * 20), which)
    if which == "train":
        monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        load(path, streaming=True)
    assert not caplog.records
    assert len(load(path, which)) == 20
    (record,) = caplog.records
    assert f"data.{which}=" in record.getMessage() and "take 0.0 GiB so far" in record.getMessage()
    assert advice in record.getMessage()


@pytest.mark.parametrize("saved", ["save_to_disk", "parquet folder"])
def test_hugging_face_data_sets(folder, saved, monkeypatch):
    """Data sets of the `datasets` library by folder, with Image columns left encoded and named splits."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    import datasets

    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "images": datasets.Image()}
    )
    rows = {"question": ["x", "y"], "answer": ["1", "2"], "images": [Image.new("RGB", (8, 6), "red"), None]}
    data = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features)})
    target = folder / "hf"
    if saved == "save_to_disk":
        data.save_to_disk(str(target))
    else:
        target.mkdir()
        data["train"].to_parquet(str(target / "train-00000-of-00001.parquet"))
    first, second = load(str(target))
    assert Image.open(io.BytesIO(first.images[0]["bytes"])).size == (8, 6) and second.images == ()
    with pytest.raises(ConfigError, match=r"data\.train_split=trian: .* has the splits train"):
        load(str(target), train_split="trian")


def change(number: int, **values):
    return [
        {k: v for k, v in {**row, **(values if i == number else {})}.items() if v is not ...}
        for i, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, r"data\.train=.*: the data set is empty"),
        (
            ROWS,
            {"fields": {"question": "questoin"}},
            r"data\.fields\.question=questoin: .* question, answer, .*nearest is question",
        ),
        (
            ROWS,
            {"fields": {"answer": "solution"}},
            r"data\.fields\.answer=solution: .* no such column, but question, answer",
        ),
        (ROWS, {"fields": {"images": "pictures"}}, r"data\.fields\.images=pictures: .* no such column"),
        (ROWS, {"fields": {"id": "qid"}}, r"data\.fields\.id=qid: .*nearest is id"),
        (
            [{"question": "q", "answer": "a", "image": "a.png"}],
            {},
            r"data\.fields\.images=images: .*--data\.fields\.images image",
        ),
        (change(1, images=["a.png", "none.png"]), {}, r"row two: no image file .*none\.png; data\.image_root"),
        (change(1, images=["a.png"]), {}, r"row two has 2 <image> marks in its question but 1 images"),
        (change(2, question="<image>?"), {}, r"row three has 1 <image> marks in its question but 0 images"),
        (change(1, question="<image>?"), {}, r"row two has 1 <image> marks .* 2 images"),
        (change(1, id="one"), {}, r"data\.fields\.id=id: the id 'one' occurs more than once"),
        (change(1, question=None), {}, r"row two has no question text in column 'question'"),
        (change(1, answer=None), {}, r"row two has nothing as answer in column 'answer'"),
        (change(1, answer={"a": "b"}), {}, r"row two has a dict as answer .*as data\.fields\.answer=answer\.a$"),
        (change(1, images=[3]), {}, r"row two has a int in the image column 'images'"),
    ],
)
def test_mistakes_in_the_rows(folder, rows, settings, message):
    """Each mistake is one line that names the setting or the row, and what would work."""
    with pytest.raises(ConfigError, match=message) as caught:
        load(write(folder / "data.jsonl", rows), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b'{"question": "q", "answer": "a"}\n{"question"', r"line 2 is not JSON"),
        ("data.jsonl", b"[1]", r"line 1 is not a JSON object"),
        ("data.jsonl", b"\xff\xfe", r"the file is UTF-16, .*: iconv -f UTF-16 -t UTF-8 data\.jsonl > utf8\.jsonl"),
        ("data.parquet", b"PAR1 nothing", r"not a readable \.parquet file"),
        ("data.csv", b"a,b", r"files are read as \.parquet, \.jsonl or \.json"),
        ("dota.jsonl", None, r"no such file; did you mean .*data\.jsonl"),
        ("no/such/data.jsonl", None, r"no such file"),
        ("empty_folder", None, r"cannot load it"),
    ],
)
def test_unreadable_sources(folder, monkeypatch, name, content, message):
    """A file, folder or name that cannot be read is named with its setting, within seconds and without a network."""
    monkeypatch.chdir(folder)
    Path("empty_folder").mkdir()
    Path("data.jsonl").write_text("")
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"data\.validation={name}: .*{message}") as caught:
        load(name, "validation")
    assert "\n" not in str(caught.value)


def test_a_data_set_name_without_a_network(folder):
    """An unknown Hugging Face name ends within 20 seconds in one line, also when the hub cannot be reached."""
    code = (
        "from rethinker.config import ConfigError, DataConfig\nfrom rethinker.data.datasets import load_queries\n"
        "try: load_queries(DataConfig(train='nobody/nothing'), 'train')\nexcept ConfigError as e: print(e)"
    )
    env = {"PYTHONPATH": ":".join(sys.path), "HOME": str(folder), "PATH": "", "HF_ENDPOINT": "http://127.0.0.1:9"}
    start = time.monotonic()
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60, check=True)
    assert time.monotonic() - start < 20
    assert run.stdout.startswith("data.train=nobody/nothing: cannot load it") and run.stdout.count("\n") == 1


def test_loading_needs_no_torch(folder):
    """Bad data is refused before anything heavy is imported; `datasets` is imported only where it is used."""
    path = write(folder / "d.jsonl", [{"question": "q", "answer": "a"}])
    code = (
        "import sys; from rethinker.config import DataConfig; from rethinker.data.datasets import load_queries; "
        "from rethinker.embedded.files import as_files; load_queries(as_files(DataConfig(), 'train'), 'train'); "
        f"load_queries(DataConfig(train={path!r}), 'train'); "
        "print({'torch', 'datasets', 'transformers'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == "set()\n"


def made(n: int, categories: str = "a") -> list[Query]:
    return [Query(str(i), "q", "a", metadata={"category": categories[i % len(categories)]}) for i in range(n)]


def ids(queries: list[Query]) -> list[int]:
    return [int(q.id) for q in queries]


def test_every_epoch_is_a_permutation_of_its_own():
    """Each epoch holds every query once, in another order than the last; the order depends on the seed alone."""
    stream = QueryStream(made(50), seed=0)
    epochs = [ids(stream.next(50)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(50))
    assert ids(QueryStream(made(50), seed=0).next(150)) == epochs[0] + epochs[1] + epochs[2]
    assert ids(QueryStream(made(50), seed=1).next(50)) != epochs[0]


def test_a_draw_larger_than_the_data_wraps():
    """next(n) with n above the number of queries runs on into the next epochs."""
    stream = QueryStream(made(4), seed=0)
    assert Counter(ids(stream.next(10))).keys() == {0, 1, 2, 3}
    assert stream.state_dict()["drawn"] == {"": 10}


@pytest.mark.parametrize("weights", [{}, {"a": 3, "b": 1}])
def test_peeking_takes_nothing(weights):
    """The next queries, into another epoch too, stay the next ones."""
    stream = QueryStream(made(10, "ab"), seed=0, category_weights=weights)
    stream.next(7)
    state, seen = stream.state_dict(), ids(stream.peek(9))
    assert stream.state_dict() == state and ids(stream.next(9)) == seen


@pytest.mark.parametrize("weights", [{}, {"a": 0.5, "b": 0.25, "c": 0.25}])
def test_a_saved_stream_continues_exactly(weights):
    """Law 10's part: the state, through JSON, gives the same queries as if nothing had happened."""
    whole = ids(QueryStream(made(30, "abc"), seed=3, category_weights=weights).next(200))
    stream = QueryStream(made(30, "abc"), seed=3, category_weights=weights)
    stream.next(77)
    state = json.loads(json.dumps(stream.state_dict()))
    for listed in (weights, dict(reversed(weights.items()))):  # a config.yaml may list them in another order
        resumed = QueryStream(made(30, "abc"), seed=3, category_weights=listed)
        resumed.load_state_dict(state)
        assert ids(resumed.next(123)) == whole[77:]


def test_a_state_of_other_data_or_seed_is_refused():
    """A checkpoint's order means nothing for other data."""
    state = QueryStream(made(30), seed=3).state_dict()
    with pytest.raises(ConfigError, match=r"data\.train: the checkpoint's data order has sizes"):
        QueryStream(made(31), seed=3).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"^seed: the checkpoint's data order has seed 3, this run 4"):
        QueryStream(made(30), seed=4).load_state_dict(state)


def test_categories_keep_their_shares_in_every_stretch():
    """With weights the categories take turns: no stretch deviates by more than one query, whatever the data's mix."""
    queries = made(90, "aaaaaaaabc")  # 72, 9 and 9
    stream = QueryStream(queries, seed=0, category_weights={"a": 2, "b": 1, "c": 1})
    drawn = stream.next(400)
    for start in range(0, 400, 20):
        counts = Counter(q.metadata["category"] for q in drawn[start : start + 20])
        assert abs(counts["a"] - 10) <= 1 and abs(counts["b"] - 5) <= 1 and abs(counts["c"] - 5) <= 1
    rare = [q.id for q in drawn if q.metadata["category"] == "b"]
    assert all(len(set(rare[i : i + 9])) == 9 for i in range(0, 90, 9))  # its own permutations, one after the other


def test_categories_without_a_weight_are_left_out():
    """Only the named categories are drawn, and epochs are counted over them."""
    stream = QueryStream(made(30, "abc"), seed=0, category_weights={"a": 1, "b": 1})
    assert {q.metadata["category"] for q in stream.next(40)} == {"a", "b"}
    assert len(stream) == 20


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"x": 1.0}, r"data\.category_weights\.x: the data has no such category, but a, b"),
        ({"a": 0.0}, r"data\.category_weights=.*not all 0"),
        ({"a": -1.0, "b": 2.0}, r"data\.category_weights=.*not negative"),
        ({"a": float("nan")}, r"data\.category_weights=.*finite"),
    ],
)
def test_wrong_weights(weights, message):
    """Weights that cannot be meant are refused by name."""
    with pytest.raises(ConfigError, match=message):
        QueryStream(made(30, "ab"), seed=0, category_weights=weights)
    with pytest.raises(ConfigError, match="no queries"):
        QueryStream([], seed=0)
