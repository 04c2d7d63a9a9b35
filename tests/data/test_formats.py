r"""Data as other trainers write it: every form is a row here and a line in docs/data.md; refusals say the fix."""

from __future__ import annotations

import base64
import datetime
import io
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from PIL import Image

from rethinker.config import ConfigError, DataConfig, FormatName
from rethinker.curation.output import SUBSET, write_recipe, write_subset
from rethinker.curation.subset import PassRate
from rethinker.data.datasets import load_queries
from rethinker.data.formats import FORMATS
from rethinker.data.images import open_image
from rethinker.data.streaming import StreamedQueries
from rethinker.embedded.files import as_files
from rethinker.rewards.functions import boxed_reward
from rethinker.samples import Query
from rethinker.settings import resolve_config


def picture(color: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, kind)
    return buffer.getvalue()


PNG, JPEG = picture("red"), picture("blue", "JPEG")
TEXT, URI = base64.b64encode(PNG).decode(), f"data:image/jpeg;base64,{base64.b64encode(JPEG).decode()}"
FILE, RED, BLUE = "a.png", {"bytes": PNG}, {"bytes": JPEG}  # FILE: the image whose path is expected
ANY = {"format": "auto"}


def user(content: Any, **others: Any) -> list[dict]:
    return [{"role": "user", "content": content, **others}]


def part(**given: Any) -> dict:
    """A part of a chat's content as Arrow pads it, with None for the keys of others."""
    return {"type": None, "text": None, "image": None, "image_url": None, **given}


# Settings, a row, and the question, answer, images and choices that are expected of it.
FORMS: dict[str, tuple[dict, dict, tuple]] = {
    "verl": (
        {"format": "verl"},
        {
            "data_source": "geo3k",
            "prompt": user("<image>How long is x?"),
            "images": [{"bytes": PNG, "path": None}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": "48"},
            "extra_info": {"split": "train", "index": 0, "question": "raw", "answer": "48"},
        },
        ("<image>How long is x?", "48", (RED,), None),
    ),
    "verl, images of another kind": (
        {"format": "verl"},
        {"prompt": user("<image>x?"), "reward_model": {"ground_truth": "1"}, "images": [{"image": FILE}]},
        ("<image>x?", "1", (FILE,), None),
    ),
    "verl, an answer that is JSON text of a list": (
        {"format": "verl"},
        {"prompt": user("x?"), "reward_model": {"ground_truth": '["\\\\frac{1}{2}"]'}},
        ("x?", "\\frac{1}{2}", (), None),
    ),
    "trl, a chat with images apart": (
        {"format": "trl"},
        {
            "prompt": user([part(type="image"), part(type="text", text="What color?")]),
            "images": [FILE],
            "solution": "<answer> red </answer>",
        },
        ("<image>What color?", "red", (FILE,), None),
    ),
    "trl, a text": (
        {"format": "trl"},
        {"prompt": "What color?", "image": {"bytes": PNG, "path": "x.png"}, "ground_truth": "red"},
        ("What color?", "red", (RED,), None),
    ),
    "trl, a chat of texts and a completion": (
        {"format": "trl"},
        {"prompt": user("2 + 2?"), "completion": [{"role": "assistant", "content": "\\boxed{4}"}]},
        ("2 + 2?", "\\boxed{4}", (), None),
    ),
    "trl, problem": ({"format": "trl"}, {"problem": "2 + 2?", "answer": "4"}, ("2 + 2?", "4", (), None)),
    "swift": (
        {"format": "swift"},
        {"messages": user("<image>What color?"), "images": [FILE], "solution": "red"},
        ("<image>What color?", "red", (FILE,), None),
    ),
    "swift, a chat as JSON text beside an answer": (
        {"format": "swift"},
        {"messages": json.dumps([*user("What color?"), {"role": "assistant", "content": "so red"}]), "answer": "red"},
        ("What color?", "red", (), None),
    ),
    "options by numbers": (
        {"format": "auto"},
        {"question": "What color?", "choices": {"1": "red", "2": "blue"}, "answer": 2},
        ("What color?", "B", (), ["red", "blue"]),
    ),
    "swift, the reply is the answer": (
        {"format": "swift"},
        {"messages": [*user("What color?"), {"role": "assistant", "content": "<answer>red</answer>"}], "images": FILE},
        ("What color?", "red", (FILE,), None),
    ),
    "swift, query and response": (
        {"format": "swift"},
        {"query": "<image>What color?", "response": "red", "images": [FILE]},
        ("<image>What color?", "red", (FILE,), None),
    ),
    "r1v": (
        {"format": "r1v"},
        {"image": {"bytes": PNG, "path": "x.png"}, "problem": "How many?", "solution": "<answer> 3 </answer>"},
        ("How many?", "3", (RED,), None),
    ),
    "r1v, with its thoughts": (
        {"format": "r1v"},
        {"image": FILE, "problem": "How many?", "solution": "<think>one,\ntwo</think>\n<answer>\n2\n</answer>\n"},
        ("How many?", "2", (FILE,), None),
    ),
    "EasyR1": (
        {"format": "r1v"},
        {"problem": "<image>x?", "answer": "48", "images": [{"bytes": PNG, "path": None}]},
        ("<image>x?", "48", (RED,), None),
    ),
    "LLaVA": (
        {"format": "r1v"},
        {
            "id": "7",
            "image": FILE,
            "conversations": [{"from": "human", "value": "<image>\nWhat color?"}, {"from": "gpt", "value": "red"}],
        },
        ("<image>\nWhat color?", "red", (FILE,), None),
    ),
    "OpenAI's parts": (
        {"format": "swift"},
        {
            "messages": user(
                [part(type="text", text="What color is "), part(type="image_url", image_url={"url": URI})]
            ),
            "solution": "blue",
        },
        ("What color is <image>", "blue", (BLUE,), None),
    ),
    "Qwen's parts": (
        {"format": "trl"},
        {
            "prompt": user([part(type="image", image=f"file://{{}}/{FILE}"), part(type="text", text="What color?")]),
            "answer": "red",
        },
        ("<image>What color?", "red", (FILE,), None),
    ),
    "parts without a type": (
        {"format": "trl"},
        {"prompt": user([{"image": FILE, "text": None}, {"image": None, "text": "What color?"}]), "answer": "red"},
        ("<image>What color?", "red", (FILE,), None),
    ),
    "a chat with a system message": (
        {"format": "verl"},
        {
            "prompt": [{"role": "system", "content": "Think."}, *user("2 + 2?")],
            "reward_model": {"ground_truth": "4"},
        },
        ("2 + 2?", "4", (), None),
    ),
    "dotted fields": (
        {"fields": {"question": "extra_info.question", "answer": "reward_model.ground_truth"}},
        {"extra_info": {"question": "2 + 2?"}, "reward_model": {"ground_truth": "4"}},
        ("2 + 2?", "4", (), None),
    ),
    "dotted fields to a chat, images and choices": (
        {
            "fields": {
                "question": "a.b.chat",
                "answer": "a.b.chat",
                "images": "a.images",
                "choices": "a.options",
                "id": "a.n",
            }
        },
        {
            "a": {
                "n": "7",
                "images": [FILE],
                "options": ["red", "blue"],
                "b": {"chat": [*user("Color?"), {"role": "assistant", "content": "A"}]},
            }
        },
        ("Color?", "A", (FILE,), ["red", "blue"]),
    ),
    "a format and a field of one's own": (
        {"format": "verl", "fields": {"question": "extra_info.question"}},
        {"prompt": user("long?"), "extra_info": {"question": "short?"}, "reward_model": {"ground_truth": "4"}},
        ("short?", "4", (), None),
    ),
    "GSM8K": (
        ANY,
        {"question": "How many?", "answer": "He has 3 #1s and 4.\nIn all 3+4=<<3+4=7>>1,007\n#### 1,007"},
        ("How many?", "1,007", (), None),
    ),
    "an answer beside its long solution": (
        ANY,
        {"problem": "How many?", "solution": "Well, it is clear.", "answer": "7"},
        ("How many?", "7", (), None),
    ),
    "plain columns, one image": (
        ANY,
        {"question": "Color?", "answer": "red", "image": FILE},
        ("Color?", "red", (FILE,), None),
    ),
    "choices, a list": (
        ANY,
        {"question": "Color?", "answer": "B", "choices": ["red", "blue"]},
        ("Color?", "B", (), ["red", "blue"]),
    ),
    "choices, texts and labels": (
        ANY,
        {"question": "Color?", "answer": "B", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}},
        ("Color?", "B", (), ["red", "blue"]),
    ),
    "choices, texts and numbers": (
        ANY,
        {"question": "Color?", "answer": "2", "choices": {"text": ["red", "blue"], "label": ["1", "2"]}},
        ("Color?", "B", (), ["red", "blue"]),
    ),
    "choices, a dict for each": (
        ANY,
        {"question": "Color?", "answer": "A", "options": [{"label": "A", "text": "red"}, {"label": "B", "text": "x"}]},
        ("Color?", "A", (), ["red", "x"]),
    ),
    "choices, a mapping": (
        ANY,
        {"question": "Color?", "answer": "B", "options": {"A": "red", "B": "blue", "C": None}},
        ("Color?", "B", (), ["red", "blue"]),
    ),
    "choices, a mapping with a gap": (
        ANY,
        {"question": "Color?", "answer": "C", "options": {"A": "red", "B": "", "C": "blue"}},
        ("Color?", "C", (), {"A": "red", "C": "blue"}),
    ),
    "choices, JSON text": (
        ANY,
        {"question": "Color?", "answer": "B", "choices": '["red", "blue"]'},
        ("Color?", "B", (), ["red", "blue"]),
    ),
    "choices, JSON text of a mapping": (
        ANY,
        {"question": "Color?", "answer": "B", "options": '{"A": "red", "B": "blue"}'},
        ("Color?", "B", (), ["red", "blue"]),
    ),
    "choices, columns": (
        ANY,
        {"question": "Color?", "answer": "B", "A": "red", "B": "blue", "C": "green", "D": None},
        ("Color?", "B", (), ["red", "blue", "green"]),
    ),
    "base64": ({}, {"question": "?", "answer": "1", "images": TEXT}, ("?", "1", (RED,), None)),
    "base64 in lines": (
        {},
        {"question": "?", "answer": "1", "images": [base64.encodebytes(JPEG).decode()]},
        ("?", "1", (BLUE,), None),
    ),
    "base64 as bytes": (
        {},
        {"question": "?", "answer": "1", "images": [{"bytes": TEXT, "path": None}]},
        ("?", "1", (RED,), None),
    ),
    "a data URI": ({}, {"question": "?", "answer": "1", "images": [URI]}, ("?", "1", (BLUE,), None)),
    "a dict": ({}, {"question": "?", "answer": "1", "images": {"image": TEXT}}, ("?", "1", (RED,), None)),
    "dicts in dicts": (
        {},
        {"question": "?", "answer": "1", "images": [{"image_url": {"url": URI}}]},
        ("?", "1", (BLUE,), None),
    ),
    "nested lists": (
        {},
        {"question": "?", "answer": "1", "images": [[FILE], [URI, TEXT]]},
        ("?", "1", (FILE, BLUE, RED), None),
    ),
    "a list with None": (
        {},
        {"question": "<image>?", "answer": "1", "images": [None, FILE, None]},
        ("<image>?", "1", (FILE,), None),
    ),
    "JSON text of a list": (
        {},
        {"question": "?", "answer": "1", "images": json.dumps([FILE, {"image": URI}])},
        ("?", "1", (FILE, BLUE), None),
    ),
    "a list as answer": ({}, {"question": "Roots?", "answer": [3, -4]}, ("Roots?", "3, -4", (), None)),
    "a list of texts as answer": (
        {},
        {"question": "Points?", "answer": ["(1, 2)", None, "1,000"]},
        ("Points?", "(1, 2), 1,000", (), None),
    ),
    "a list of one": ({}, {"question": "?", "answer": ["Paris, France"]}, ("?", "Paris, France", (), None)),
    "a truth": ({}, {"question": "?", "answer": True}, ("?", "True", (), None)),
    "without data.format texts are as they are": (
        {},
        {"question": "?", "answer": "<answer>3</answer>\n#### 4", "choices": {"text": ["a", "b"]}, "A": "x", "B": "y"},
        ("?", "<answer>3</answer>\n#### 4", (), {"text": ["a", "b"]}),
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / FILE).write_bytes(PNG)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


def write(path: Path, rows: list[dict]) -> str:
    """The rows as a file; in JSON bytes become base64."""
    rows = json.loads(json.dumps(rows, default=lambda value: {"b64": base64.b64encode(value).decode()}))
    rows = json.loads(json.dumps(rows).replace("{}", str(path.parent)), object_hook=lambda d: _bytes(d, path.suffix))
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def _bytes(value: dict, suffix: str) -> Any:
    if set(value) != {"b64"}:
        return value
    return base64.b64decode(value["b64"]) if suffix == ".parquet" else value["b64"]


def load(name: str, **settings: Any) -> list[Query]:
    return load_queries(DataConfig(train=name, **settings), "train")


def seen(query: Query, folder: Path) -> tuple:
    images = tuple(FILE if image == str(folder / FILE) else {"bytes": image["bytes"]} for image in query.images)
    return query.question, query.answer, images, query.metadata.get("choices")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_by_one_setting(folder, form, suffix):
    """The question, the answer, the images and the options that the row means."""
    settings, row, expected = FORMS[form]
    (query,) = load(write(folder / f"d{suffix}", [row]), **settings)
    assert seen(query, folder) == expected


PAGE = (Path(__file__).parents[2] / "docs/data.md").read_text()
LINES = [line for line in PAGE.splitlines() if re.match(r"\| .*`\{", line)]


@pytest.mark.parametrize("line", LINES, ids=[line.split("`")[0].strip("| :") for line in LINES])
def test_the_lines_of_the_docs_are_true(folder, line):
    """The row in a line of docs/data.md, with the line's setting, is read as the line says."""
    form, *setting, result = line.strip("| ").split(" | ")
    row, settings = re.search(r"`({.*?})`", form)[1], {}
    if setting:
        key, _, value = setting[0].strip("`").partition(": ")
        settings = {key.removeprefix("data."): yaml.safe_load(value)}
    row = row.replace("iVBORw0KGgo...", TEXT).replace("file:///a.png", f"file://{folder}/{FILE}")
    (folder / "d.jsonl").write_text(row)
    (query,) = load(str(folder / "d.jsonl"), **settings)
    texts = [query.question, query.answer, *query.metadata.get("choices", [])]
    assert set(re.findall(r"`(.+?)`", result)) <= set(texts)
    wanted = re.match(r"(one|\d) image", result)
    assert len(query.images) == (int(wanted[1].replace("one", "1")) if wanted else row.count(TEXT) + row.count(FILE))
    assert all(open_image(image, "q").size == (8, 6) for image in query.images)


def test_the_docs_have_every_format():
    """A line for each, and for fields that are dotted."""
    assert {re.search(r"data\.\w+: \w*", line)[0] for line in LINES if "`data." in line} == {
        "data.fields: ",
        *(f"data.format: {name}" for name in get_args(FormatName)),
    }
    assert len(LINES) > 20


@pytest.mark.parametrize("form", [form for form, (settings, _, _) in FORMS.items() if "format" in settings])
def test_auto_finds_the_format_and_says_so(folder, form, caplog):
    """Of every form of a named format, by its columns alone, in one line."""
    settings, row, expected = FORMS[form]
    path = write(folder / "d.jsonl", [row])
    (query,) = load(path, **settings | {"format": "auto"})
    assert seen(query, folder) == expected
    (said,) = [record.message for record in caplog.records if "data.format" in record.message]
    assert f"{path}: data.format=auto found " in said and ", and reads the question from " in said
    load(path, **settings | {"format": "auto"})  # again, as for validation
    assert len([record for record in caplog.records if "data.format" in record.message]) == 1
    if form in ("verl", "swift", "r1v", "trl, a text", "GSM8K"):  # others have the columns of two
        found = settings["format"] if settings["format"] != "auto" else "plain columns"
        assert f"found {found}, and" in said


@pytest.mark.parametrize("form", FORMS)
def test_streaming_and_mixtures_read_the_same(folder, form, monkeypatch):
    """Row by row when they are drawn, and as a source with a format of its own beside one without."""
    settings, row, expected = FORMS[form]
    path = write(folder / "d.parquet", [row])
    (query,) = StreamedQueries(DataConfig(train=path, streaming=True, **settings), 0).next(1)
    assert seen(query, folder) == expected
    plain = write(folder / "plain.jsonl", [{"question": "2 + 2?", "answer": "#### 4"}])
    sources = {"a": {"train": path, **settings}, "b": {"train": plain}}
    mixed = DataConfig(train="sources", sources=sources)
    query, other = load_queries(as_files(mixed, "train"), "train")
    assert seen(query, folder) == expected and query.id.startswith("a/") and other.answer == "#### 4"


@pytest.mark.parametrize("form", FORMS)
def test_a_curated_subset_says_the_same(folder, form):
    """`rethinker curate` writes questions of any form so that its recipe, which has no format, reads them again."""
    settings, row, expected = FORMS[form]
    config = resolve_config("easy_vqa_cpu")
    for name, value in settings.items():
        setattr(config.data, name, value)
    config.data.train = write(folder / "d.jsonl", [row | {"level": 3}])
    queries = load_queries(config.data, "train")
    (folder / "out").mkdir()
    write_subset(folder / "out", queries, [PassRate(queries[0].id, "a", 1, 2)], config)
    write_recipe(folder / "out", config, "tiny")
    data = resolve_config(folder / "out/recipe.yaml").data
    assert data.format is None and data.train == str(folder / "out" / SUBSET)
    (again,) = load_queries(data, "train")
    assert seen(again, folder) == expected
    assert again.id == queries[0].id and again.metadata["level"] == 3 and again.metadata["pass_rate"] == 0.5


def test_a_column_beside_that_of_a_format_does_not_replace_it(folder):
    """A column `question` or `images` next to `prompt`: metadata of the query, and not what a curated subset asks."""
    config = resolve_config("easy_vqa_cpu")
    row = {"prompt": "asked?", "question": "another?", "solution": "2", "answer": "1"}
    config.data.train, config.data.format = write(folder / "d.jsonl", [row]), "trl"
    (query,) = load_queries(config.data, "train")
    assert (query.question, query.answer) == ("asked?", "1") and query.metadata["question"] == "another?"
    write_subset(folder, [query], [PassRate(query.id, "a", 1, 2)], config)
    write_recipe(folder, config, "tiny")
    (again,) = load_queries(resolve_config(folder / "recipe.yaml").data, "train")
    assert (again.question, again.answer) == ("asked?", "1")


def test_a_byte_order_mark_costs_no_row(folder):
    """A UTF-8 BOM before lines, and before an array."""
    row = json.dumps({"question": "é?", "answer": "1"}, ensure_ascii=False)
    for name, content in (("d.jsonl", f"{row}\n{row}"), ("l.json", f"{row}\n{row}"), ("d.json", f"[{row}, {row}]")):
        (folder / name).write_bytes(content.encode("utf-8-sig"))
        path = str(folder / name)
        assert [query.question for query in load(path)] == ["é?", "é?"]
        drawn = StreamedQueries(DataConfig(train=path, streaming=True), 0).next(2)
        assert sorted(query.id for query in drawn) == ["0", "1"] and drawn[0].question == "é?"


@pytest.mark.parametrize("content", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_refused_with_the_command_that_converts_it(folder, content):
    """With and without a byte order mark."""
    (folder / "my rows.jsonl").write_bytes(json.dumps({"question": "?", "answer": "1"}).encode(content))
    fix = "iconv -f UTF-16 -t UTF-8 'my rows.jsonl' > utf8.jsonl"
    with pytest.raises(ConfigError, match=f"the file is UTF-16, and JSON is read as UTF-8; convert it: {fix}"):
        load(str(folder / "my rows.jsonl"))


def test_numbers_of_arrow_are_what_they_say(folder):
    """A 32-bit 3.7 is 3.7 wherever it stands, and a decimal has its digits."""
    table = pa.table(
        {
            "question": ["?"] * 3,
            "answer": pa.array([3.7, 0.1, None], pa.float32()),
            "inner": pa.array(
                [{"list": [0.3], "x": 1e-3}] * 3, pa.struct({"list": pa.list_(pa.float32()), "x": pa.float32()})
            ),
            "price": pa.array([Decimal("3.70"), Decimal("-0.05"), Decimal("1000.00")], pa.decimal128(9, 2)),
        }
    )
    parquet.write_table(table, folder / "d.parquet")
    path = str(folder / "d.parquet")
    first, second = load(path, max_bad_rows=0.4)
    assert (first.answer, second.answer) == ("3.7", "0.1") and first.metadata["inner"] == {"list": [0.3], "x": 0.001}
    assert [query.answer for query in load(path, fields={"answer": "price"})] == ["3.70", "-0.05", "1000.00"]
    assert load(path, fields={"answer": "inner.x"})[0].answer == "0.001"


@pytest.mark.parametrize("kind", ["parquet", "folder", "saved"])
def test_a_class_label_is_its_name(folder, kind):
    """In a file that `datasets` wrote and in its own folders, also with the numbers beside it in 32 bits."""
    features = datasets.Features(
        {
            "question": datasets.Value("string"),
            "answer": datasets.ClassLabel(names=["A", "B"]),
            "x": datasets.Value("float32"),
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = {"question": ["?"] * 3, "answer": [1, 0, -1], "x": [0.1] * 3, "images": [[{"bytes": PNG, "path": None}]] * 3}
    data, name = datasets.Dataset.from_dict(rows, features), folder / "rows"
    if kind == "parquet":
        data.to_parquet(str(name := name.with_suffix(".parquet")))
    elif kind == "folder":
        name.mkdir()
        data.to_parquet(str(name / "train.parquet"))
    else:
        data.save_to_disk(str(name))
    queries = load(str(name))
    assert [query.answer for query in queries] == ["B", "A", "-1"]
    assert queries[0].metadata["x"] == 0.1 and queries[0].images == (RED,)


def test_the_system_message_of_a_chat_is_left_out_with_one_warning(folder, caplog):
    """It names data.system; a data set whose message is data.system gives none."""
    rows = [
        {"prompt": [{"role": "system", "content": "Think."}, *user(f"{i}?")], "reward_model": {"ground_truth": "4"}}
        for i in range(3)
    ]
    path = write(folder / "d.jsonl", rows)
    assert [query.question for query in load(path, format="verl", system="Think.")] == ["0?", "1?", "2?"]
    assert not caplog.records
    load(path, format="verl")
    (record,) = caplog.records
    assert "system messages in the data are left out, as 'Think.'; data.system gives one" in record.message


def test_answers_that_are_compared_whole_are_said_once(folder, caplog):
    """Without data.format a text stays as it is; where that can hardly be meant, one warning names the setting."""
    rows = [{"question": "?", "answer": answer} for answer in ("7", "so " * 99 + "\n#### 7", "<answer>7</answer>")]
    path = write(folder / "d.jsonl", rows)
    assert [query.answer for query in load(path)] == [row["answer"] for row in rows]
    (record,) = caplog.records
    assert " so \\n#### 7' are compared whole; data.format=auto takes the answer out" in record.message
    caplog.clear()
    assert [query.answer for query in load(path, format="auto")] == ["7", "7", "7"]
    (record,) = caplog.records
    assert "found plain columns, and reads the question from question, the answer from answer" in record.message


@pytest.mark.parametrize("answer", ["a\tb", "x\r\ny", "#### 3 ####\nthen 4", "a\nu", "\\text{\n}", "5 \\%"])
def test_ordinary_answers_are_left_alone(folder, answer):
    """Tabs, line breaks and marks that mean nothing are no reason to refuse or to change an answer."""
    (query,) = load(write(folder / "d.jsonl", [{"question": "?", "answer": answer}]), format="auto")
    assert query.answer == answer


def test_what_is_read_can_be_rewarded():
    """The texts that lists, tags and options become are those that the reward compares."""
    roots = Query("0", "Roots?", "3, -4")
    assert boxed_reward("\\boxed{-4, 3}", roots.answer, roots) == 1.0
    assert boxed_reward("\\boxed{3}", roots.answer, roots) == 0.0
    options = Query("0", "Color?", "B", metadata={"choices": ["red", "blue"]})
    assert boxed_reward("\\boxed{blue}", options.answer, options) == 1.0


REFUSED = [
    ({"images": "https://a.b/c.png"}, {}, r"row 0 has the address 'https://a\.b/c\.png' as an image, and nothing is"),
    ({"images": [{"image_url": {"url": "s3://a/b"}}]}, {}, r"row 0 has the address 's3://a/b' .* fetch the images"),
    ({"images": "data:image/svg+xml,<svg/>"}, {}, r"row 0 has a data URI that is no base64: 'data:image/svg"),
    ({"images": "iVBORw0KGgo" * 40 + "?"}, {}, r"row 0: no image file"),
    ({"images": '["a.png"'}, {}, r"row 0: no image file"),
    ({"images": {"bytes": "text"}}, {}, r"row 0 has a dict in the image column 'images'"),
    ({"answer": {"value": "3"}}, {}, r"row 0 has a dict as answer .*; name .* data\.fields\.answer=answer\.value$"),
    ({"answer": datetime.date(2024, 5, 1)}, {}, r"row 0 has a date as answer .*; write it as .* '2024-05-01'$"),
    ({"answer": datetime.datetime(2024, 5, 1)}, {}, r"row 0 has a (datetime|Timestamp) as answer .*'2024-05-01"),
    ({"answer": datetime.time(9, 30)}, {}, r"row 0 has a time as answer .*'09:30:00'$"),
    ({"answer": b"3"}, {}, r"row 0 has a bytes as answer"),
    ({"answer": [[1], [2]]}, {}, r"row 0 has a list of lists or dicts as answer"),
    ({"answer": ["Paris, France", "Rome"]}, {}, r"row 0 has a list with 'Paris, France' as answer .* as one text$"),
    ({"answer": "<answer> </answer>"}, ANY, r"row 0 has an empty answer in column 'answer'$"),
    ({"answer": "\\boxed{}"}, {}, r"row 0 has an empty box as answer in column 'answer': '\\\\boxed{}'$"),
    ({"answer": "\\boxed{\\frac{1}{2}"}, {}, r"row 0 has an unclosed box as answer"),
    ({"answer": "\boxed{3}"}, {}, r"row 0 has a control character .*: '.x08oxed.3.'; .* double the back"),
    ({"question": "", "images": []}, {}, r"row 0 has an empty question in column 'question'$"),
    ({"question": user([{"type": "video", "video": "a.mp4"}])}, {}, r"row 0 has 'video' in its chat, not text or"),
    ({"question": [*user("1?"), *user("2?")]}, {}, r"row 0 has a chat of 'user, user' in column 'question'; a que"),
    ({"question": [{"role": "assistant", "content": "hm"}]}, {}, r"row 0 has no question text in column 'question'$"),
    ({"question": [{"text": "?"}]}, {}, r"row 0 has no question text in column 'question'$"),
    ({"answer": user("hm")}, {}, r"row 0 has no reply at the end of the chat in column 'answer'$"),
    ({}, {"fields": {"answer": "info.solution"}}, r"no such entry, but info\.solutions; .* is info\.solutions: set --"),
    ({}, {"fields": {"answer": "info.solutions.x"}}, r"no such entry, and info\.solutions has no entries$"),
    ({}, {"fields": {"answer": "inof.solutions"}}, r"data\.fields\.answer=inof\.solutions: .* no such column"),
    ({"question": "<video>?"}, {}, r"row 0 has a video, and only images are shown"),
    ({"videos": ["a.mp4"]}, {}, r"row 0 has a video, and only images are shown"),
    ({"choices": ["1", "4", "2"], "answer": 1}, ANY, r"row 0 has the number 1 as answer beside 3 options: .* letter"),
    ({"query": "?", "response": "1", "history": [["q", "r"]]}, {"format": "swift"}, r"row 0 has earlier turns in"),
    ({}, {"format": "verl"}, r"data\.fields\.question=prompt \(data\.format=verl\): .* no such column"),
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("change", "settings", "message"), REFUSED)
def test_what_is_refused_says_what_would_work(folder, change, settings, message, suffix):
    """One line with the row, its value, and the fix."""
    row = {"question": "?", "answer": "1", "info": {"solutions": "1"}} | change
    if suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist([row]), folder / "d.parquet")
    else:
        try:
            (folder / "d.jsonl").write_text(json.dumps(row))
        except TypeError:  # JSON has no dates and no bytes
            suffix = ".parquet"
            parquet.write_table(pa.Table.from_pylist([row]), folder / "d.parquet")
    with pytest.raises(ConfigError, match=message) as caught:
        load(str(folder / f"d{suffix}"), **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
def test_a_missing_column_names_the_format_that_has_these(folder, name):
    """Without data.format the error says which one to set; so does a format that is not the data's."""
    _, row, _ = FORMS[{"trl": "trl, a text"}.get(name, name)]
    path = write(folder / "d.jsonl", [row])
    with pytest.raises(ConfigError, match=f"these are the columns of {name}: set --data.format {name}"):
        load(path)
    other = "swift" if name != "swift" else "verl"
    with pytest.raises(ConfigError, match=rf"\(data\.format={other}\).*: set --data.format {name}"):
        load(path, format=other)


def test_auto_without_a_known_format(folder, caplog):
    """It says which formats there are, and does not say that it found one."""
    path = write(folder / "d.jsonl", [{"q": "?", "a": "1"}])
    with pytest.raises(ConfigError, match=r"no such column, but q, a; no format \(verl, swift, r1v, trl\) has these"):
        load(path, format="auto")
    assert not caplog.records


def test_the_format_of_a_source_is_checked():
    """A mistyped one is named with its source; the setting itself is checked with all others."""
    data = DataConfig(train="sources", sources={"a": {"train": "x.jsonl", "format": "verll"}})
    with pytest.raises(ConfigError, match=r"data\.sources\.a\.format='verll': no such format; did you mean verl\?"):
        load_queries(data, "train")
    with pytest.raises(ConfigError, match=r"data\.format='verll' must be 'verl', "):
        resolve_config("easy_vqa_cpu", ["--data.format", "verll"])


def test_an_embedded_data_set_has_no_format(folder):
    """A mixture's own format is that of its files; `data.validation: digits` beside it is read as ever."""
    path = write(folder / "d.jsonl", [FORMS["swift, query and response"][1]])
    sources = {"a": {"train": path, "weight": 1}, "b": {"train": "digits", "weight": 1}}
    data = DataConfig(train="sources", sources=sources, format="swift", validation="digits")
    queries = load_queries(as_files(data, "train"), "train")
    assert queries[0].answer == "red" and queries[-1].id.startswith("b/")
    assert load_queries(as_files(data, "validation"), "validation")
