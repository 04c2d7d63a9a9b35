"""Every shipped benchmark on rows of its published schema: question, images, choices, answer, category."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
from PIL import Image

from rethinker.config import ConfigError, RewardConfig
from rethinker.evaluation import benchmark_rows
from rethinker.evaluation.benchmark import load_benchmark, shipped_benchmarks
from rethinker.evaluation.benchmark_rows import benchmark_queries
from rethinker.evaluation.results import accepted_answers
from rethinker.rewards.checker import AnswerChecker
from rethinker.rewards.functions import boxed_reward
from rethinker.samples import IMAGE_MARK, Query
from tests.evaluation import fixtures


@pytest.fixture(scope="module")
def checker():
    with AnswerChecker(RewardConfig(workers=1)) as checker:
        yield checker


@pytest.fixture
def right(checker):
    """Whether the training reward accepts an answer."""

    def accepted(query: Query, boxed: str) -> bool:
        return checker.score([("x", f"so \\boxed{{{boxed}}}", query)])["x"] == 1.0

    return accepted


@pytest.fixture
def load(tmp_path):
    """The queries of a benchmark from its fixture, by id, and what it does not cover."""

    def build(name: str, folder: str | None = None):
        data = tmp_path / (folder or name)
        if not data.exists():
            getattr(fixtures, folder or name)(data)
        queries, uncovered = benchmark_queries(load_benchmark(name), str(data))
        return {query.id: query for query in queries}, uncovered

    return build


def colors(query: Query) -> list[str]:
    """Of its images, in order."""
    names = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green"}
    opened = [Image.open(io.BytesIO(i["bytes"]) if isinstance(i, dict) else i) for i in query.images]
    return [names[image.getpixel((0, 0))] for image in opened]


def test_mathvista(load, right):
    """The published prompt and nothing else of the data; a choice's text as answer is asked for by its letter."""
    queries, _ = load("mathvista")
    assert set(queries) == {"1", "2", "3", "4"}  # testmini only
    assert queries["1"].question.endswith("Question: How wide? (Unit: cm)") and colors(queries["1"]) == ["red"]
    assert queries["1"].answer == "1.2" and queries["1"].metadata["category"] == "math word problem"
    assert right(queries["1"], "1.2 cm") and not right(queries["1"], "1.3")
    angle = queries["2"]
    assert angle.answer == "C" and angle.metadata["choices"] == ["135°", "140°", "145°"]
    assert [right(angle, given) for given in ("C", "145", "(C) 145°", "B", "140°")] == [True, True, True, False, False]


def test_mathvista_rounds_as_published(load, right):
    """A decimal number to the question's precision, a whole number by cutting; lists are left to the boxed check."""
    queries, _ = load("mathvista")
    one_decimal, whole, listed = queries["1"], queries["3"], queries["4"]
    assert [right(one_decimal, given) for given in ("1.24", "1.16 cm", "1.26", "1.14")] == [True, True, False, False]
    assert [right(whole, given) for given in ("1200.7", "1,200", "1201", "1199.9")] == [True, True, False, False]
    assert right(listed, "[1, 2]") and not right(listed, "[1, 3]")
    assert "published_metric" not in listed.metadata | queries["2"].metadata


def test_mathverse(load, right):
    """Versions are the categories; the letter counts, and its text where the question has the choices."""
    queries, _ = load("mathverse")
    assert [q.metadata["category"] for q in queries.values()] == ["Text Dominant", "Vision Only"]
    assert right(queries["1"], "A") and right(queries["1"], "60°") and not right(queries["1"], "B")
    assert right(queries["5"], "B") and not right(queries["5"], "A") and colors(queries["5"]) == ["blue"]
    assert IMAGE_MARK not in queries["5"].question


def test_mathvision(load, right):
    """Its mark becomes ours, letters alone are choices, an open question has none."""
    queries, _ = load("mathvision")
    assert queries["4"].question == "Which bridge?\n<image>\n(A) A\n(B) B\n(C) C\n(D) D\n(E) E"
    assert right(queries["4"], "B") and not right(queries["4"], "C")
    assert queries["5"].question == "How many? <image>" and "choices" not in queries["5"].metadata
    assert right(queries["5"], "0.5") and queries["5"].metadata["category"] == "counting"
    said = ("0.496", "\\frac{2}{4}", "x = \\frac{1}{2}", "0.51", "0.49")
    assert [right(queries["5"], given) for given in said] == [True, True, True, False, False]


def test_mmmu(load, right):
    """One folder per subject; numbered images in order of appearance, in choices too; several answers; no image."""
    queries, _ = load("mmmu")
    art, several, text = (queries[f"validation_{name}"] for name in ("Art_Theory_1", "Art_Theory_2", "Math_7"))
    assert art.question == "Compare <image> to <image>: what of image 1?\n(A) a <image>\n(B) it's b"
    assert colors(art) == ["blue", "red", "green"] and art.metadata["category"] == "Art_Theory"
    assert right(art, "B") and right(art, "it's b")
    assert accepted_answers(several) == ["24/7", "3.429"]
    several = dataclasses.replace(several, answer="3.429")  # as each accepted answer is asked
    said = ("3.43", "\\approx 3.4286", "3.42", "3.44")
    assert [right(several, given) for given in said] == [True, True, False, False]
    assert text.images == () and text.answer == "2" and text.question == "1 + 1?" and len(queries) == 3


def test_mmmu_pro(load, right):
    """Both settings and their union: ten options beyond letter D, and a question that is in its image alone."""
    queries, _ = load("mmmu_pro_standard", "mmmu_pro")
    assert set(queries) == {"test_History_1"} and queries["test_History_1"].question.endswith("\n(J) option 9")
    assert right(queries["test_History_1"], "option 9") and not right(queries["test_History_1"], "A")
    union, _ = load("mmmu_pro", "mmmu_pro")
    vision = union["mmmu_pro_vision/test_History_1"]
    assert "option" in vision.question and "option 1" not in vision.question and colors(vision) == ["blue"]
    assert right(vision, "C") and right(vision, "option 2")
    assert {q.metadata["category"] for q in union.values()} == {"mmmu_pro_standard", "mmmu_pro_vision"}


def test_emma(load, right):
    """Options that are images take their places; context comes first; lines without content are dropped."""
    queries, _ = load("emma")
    assert queries["math_1"].question == "Which completes <image>?\n(A) <image>\n(B) <image>"
    assert colors(queries["math_1"]) == ["red", "blue", "green"] and right(queries["math_1"], "B")
    assert queries["code_1"].question == "A chart.\nHow many bars? <image>" and right(queries["code_1"], "3")
    assert [right(queries["code_1"], given) for given in ("3.004", "3 bars", "3.01")] == [True, True, False]
    assert {q.metadata["category"] for q in queries.values()} == {"Math", "Coding"}


def test_megabench(load, right, tmp_path):
    """Only tasks of one field judged by equality on images are asked; the others are counted by reason."""
    queries, uncovered = load("megabench")
    assert set(queries) == {"q1", "q5", "q6", "q7"} and colors(queries["q1"]) == ["red", "blue", "green"]
    assert queries["q1"].question.count(IMAGE_MARK) == 3 and queries["q1"].metadata["category"] == "Planning"
    assert right(queries["q1"], "up") and not right(queries["q1"], "left")
    metric = "metric normalized_similarity_damerau_levenshtein"
    assert uncovered == {"not one answer field": 1, metric: 1, "a video": 1}
    (tmp_path / "megabench/data/maze/query.png").unlink()
    with pytest.raises(ConfigError, match=r"image paths start from .*: row q1: no image file .*query.png"):
        load("megabench")


@pytest.mark.parametrize("functions", [None, [], {"a": ["x"]}, {"a": {"x": 1}}, "x"])
def test_a_metric_of_no_known_shape_leaves_its_row_out(functions):
    """MEGA-Bench's answers are judged by one metric by name; whatever else stands there is not covered."""
    with pytest.raises(benchmark_rows.NotCoveredError):
        benchmark_rows._only_field({"a": "1"}, {"field_score_function": functions})


def test_megabench_judges_by_the_metric_of_the_row(load, right):
    """Its strings, without spaces, hyphens and periods where it says so, and its numbers, within 1%."""
    queries, _ = load("megabench")
    assert right(queries["q5"], "newyork city") and not right(queries["q5"], "new york")
    assert [right(queries["q6"], given) for given in ("198", "202", "197", "203")] == [True, True, False, False]
    assert right(queries["q7"], "Up") and not right(queries["q7"], "up")


@pytest.mark.parametrize(("name", "questions"), [("digits", 2520), ("easy_vqa", 9673), ("sums", 1800)])
def test_embedded_benchmarks(name, questions):
    """Need no file; the number of questions is the one their files state."""
    benchmark = load_benchmark(name)
    queries, _ = benchmark_queries(benchmark)
    assert len(queries) == questions == benchmark.questions
    assert all(query.id.split("/")[1] == "test" for query in queries if name == "sums")
    with pytest.raises(ConfigError, match=f"--data x: {name} comes with the package"):
        benchmark_queries(benchmark, "x")


def test_all_shipped_benchmarks_are_tested():
    """A benchmark that is added here needs a fixture."""
    tested = {name for name in vars(fixtures) if name in shipped_benchmarks()}
    parts = {"mmmu_pro_standard", "mmmu_pro_vision"}
    assert set(shipped_benchmarks()) == tested | parts | {"digits", "easy_vqa", "sums"}


def test_data_that_is_nowhere(tmp_path, monkeypatch):
    """One error says what to fetch and where to put it; the place it names works."""
    monkeypatch.setattr("rethinker.evaluation.benchmark.hub_answers", lambda source: False)
    monkeypatch.setenv("RETHINKER_DATA", str(tmp_path))
    benchmark = load_benchmark("mathvista")
    with pytest.raises(ConfigError) as error:
        benchmark_queries(benchmark)
    message = str(error.value)
    assert "`hf download AI4Math/MathVista --repo-type dataset --include 'data/testmini-*.parquet'" in message
    assert f"--local-dir {tmp_path}/mathvista`" in message
    fixtures.mathvista(tmp_path / "mathvista")
    assert len(benchmark_queries(benchmark)[0]) == 4


def test_a_cached_download_is_found_offline(tmp_path, monkeypatch):
    """Without a network a snapshot in the Hugging Face cache is read."""
    import huggingface_hub

    asked = {}

    def snapshot(source, **options):
        asked.update(options, source=source)
        return str(tmp_path)

    monkeypatch.delenv("RETHINKER_DATA", raising=False)
    monkeypatch.setattr("rethinker.evaluation.benchmark.hub_answers", lambda source: False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    fixtures.mathvision(tmp_path)
    assert len(benchmark_queries(load_benchmark("mathvision"))[0]) == 2
    assert asked["local_files_only"] and asked["allow_patterns"] == ["data/test-*.parquet"]
    assert asked["source"] == "MathLLMs/MathVision"


def test_other_data_is_refused(tmp_path):
    """Another data set's folder, another data set's columns, a path that is not there: the error names it."""
    fixtures.mathvista(tmp_path)
    benchmark = load_benchmark("mathvision")
    with pytest.raises(ConfigError, match=r"holds no data/test-\*.parquet|no column 'id'"):
        benchmark_queries(benchmark, str(tmp_path))
    with pytest.raises(ConfigError, match="holds no testmini.parquet, which benchmark mathverse reads"):
        benchmark_queries(load_benchmark("mathverse"), str(tmp_path))
    with pytest.raises(ConfigError, match="nowhere holds no data/test.*hf download"):
        benchmark_queries(benchmark, str(tmp_path / "nowhere"))


def test_your_own_benchmark(tmp_path):
    """A YAML file and a .jsonl file are a benchmark; a file with a mistake fails, naming it."""
    (tmp_path / "mine.jsonl").write_text('{"q": "1 + {1}?", "a": 2}\n{"q": "2 + 2?", "a": 4}\n')
    file = tmp_path / "mine.yaml"
    file.write_text('title: Mine\ndata: me/mine\nfiles: ["*.jsonl"]\nprompt: "{q}"\nfields: {answer: a}\n')
    queries, _ = benchmark_queries(load_benchmark(str(file)), str(tmp_path))
    assert [(q.id, q.question, q.answer) for q in queries] == [
        ("mine/0", "1 + {1}?", "2"),
        ("mine/1", "2 + 2?", "4"),
    ]
    assert boxed_reward("\\boxed{2}", queries[0].answer, queries[0]) == 1.0
    for text, message in (("titel: x", "titel"), ("title: x", "needs data"), ("- a", "does not describe")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_benchmark(str(file))
    with pytest.raises(ConfigError, match=r"--benchmark mathvist: did you mean mathvista\? known are .*emma"):
        load_benchmark("mathvist")
    assert Path(file).exists()


def test_a_number_in_a_prompt(tmp_path):
    """A column may hold a number, and 0 is one; a line without a value is left out."""
    (tmp_path / "mine.jsonl").write_text('{"n": 0, "hint": null, "a": "0"}\n{"n": 2.5, "hint": [], "a": "2"}\n')
    file = tmp_path / "mine.yaml"
    file.write_text(
        '{title: Mine, data: me/mine, files: ["*.jsonl"], prompt: "Round {n}.\\n{hint}", fields: {answer: a}}'
    )
    queries, _ = benchmark_queries(load_benchmark(str(file)), str(tmp_path))
    assert [query.question for query in queries] == ["Round 0.", "Round 2.5."]


@pytest.fixture
def own(tmp_path):
    """The queries of a benchmark of one's own, made of rows with question, options and answer; and those left out."""

    def build(*rows: dict, **changes):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        described = {"title": "Mine", "data": "me/mine", "files": ["*.jsonl"], "prompt": "{q}\n{choices}"}
        described["fields"] = {"answer": "answer", "choices": "options"}
        (tmp_path / "mine.yaml").write_text(json.dumps(described | changes))
        return benchmark_queries(load_benchmark(str(tmp_path / "mine.yaml")), str(tmp_path))

    return build


def row(answer, options=(), question="Which?"):
    return {"q": question, "options": options, "answer": answer}


@pytest.mark.parametrize("kind", ["given", "option", "alternatives"])
@pytest.mark.parametrize("nothing", [None, "", "  ", math.nan])
def test_a_row_without_an_answer_costs_itself(own, kind, nothing):
    """It is left out and counted; the others are asked. Without any answer the split is taken for a hidden one."""
    queries, left_out = own(row("1"), row(nothing), row("3"), answer_kind=kind)
    assert [query.answer for query in queries] == ["1", "3"] and left_out == {"no answer": 1}
    with pytest.raises(ConfigError, match="no question .* has an answer in column 'answer'; is it a split without"):
        own(row(nothing), row(None), answer_kind=kind)


def test_an_empty_alternative_is_no_answer(own):
    """Of several accepted answers the empty ones are dropped: an empty first one takes no other away."""
    queries, left_out = own(row("['', '24/7', '3.429']"), row("['', ' ']"), answer_kind="alternatives")
    assert accepted_answers(queries[0]) == ["24/7", "3.429"] and left_out == {"no answer": 1}
    assert own(row("x", ["", "x"]), row("", ["", "x"]), answer_kind="option")[1] == {"no answer": 1}  # nor is a choice


@pytest.mark.parametrize(
    "options",
    [
        ["a, b", "it's"],
        "['a, b', \"it's\"]",
        '["a, b", "it\'s"]',
        json.dumps("['a, b', \"it's\"]"),  # a text within a text
        json.dumps(json.dumps(json.dumps(["a, b", "it's"]))),
        ["['a, b', \"it's\"]"],  # a text within a list
        json.dumps(["['a, b', \"it's\"]"]),
        [["a, b", "it's"]],
        '[\\"a, b\\", \\"it\'s\\"]',  # escaped quotes that nothing surrounds
        '[\\\\\\"a, b\\\\\\", \\\\\\"it\'s\\\\\\"]',
    ],
)
def test_options_are_read_however_they_are_nested(own, right, options):
    """A list, a list as text, that text quoted again or alone in a list: the same two choices."""
    queries, _ = own(row("B", options))
    assert queries[0].question == "Which?\n(A) a, b\n(B) it's"
    assert right(queries[0], "B") and right(queries[0], "it's") and not right(queries[0], "A")


@pytest.mark.parametrize("options", [None, "", "[]", [], '"[]"', "none", "[1", '"'])
def test_no_options_are_none(own, options):
    """A question without choices stays open, whatever says so."""
    queries, _ = own(row("5", options))
    assert queries[0].question == "Which?" and "choices" not in queries[0].metadata


def test_one_option_is_one(own):
    """A single choice is no nested list, and an accepted answer that looks like a list in a list stays one."""
    assert own(row("A", ["only"]))[0][0].question == "Which?\n(A) only"
    assert own(row("['[1, 2]']"), answer_kind="alternatives")[0][0].answer == "[1, 2]"


def test_equal_options_whose_letter_is_the_answer(own, right):
    """As MMMU, MATH-Vision and EMMA score it: the answer's own letter counts, and the letter of the equal text not.
    The text itself counts, as it is the answer's."""
    queries, _ = own(row("C", ["x", "Paris", "Paris.", "y"]), row("B", ["<image>"] * 3, "Which? <image>"))
    said = ("C", "(C) Paris", "Paris", "B", "(B) Paris", "A", "D")
    assert [right(queries[0], given) for given in said] == [True, True, True, False, False, False, False]
    assert queries[0].question == "Which?\n(A) x\n(B) Paris\n(C) Paris.\n(D) y"  # the model sees them all
    assert [right(queries[1], given) for given in "ABC"] == [False, True, False]  # choices that are images alone


def test_equal_options_whose_text_is_the_answer(own, right):
    """As MathVista scores it: a letter stands for its text, so either letter of an equal text counts."""
    queries, _ = own(row("Paris", ["x", "Paris", "y", "Paris"]), answer_kind="option")
    said = ("B", "D", "Paris", "(D) Paris", "A", "C", "y")
    assert [right(queries[0], given) for given in said] == [True, True, True, True, False, False, False]


def test_a_metric_of_a_benchmark_of_ones_own(own, right):
    """It judges the open questions; choices are judged by letter or text; a name that is none is refused."""
    queries, _ = own(row("New York"), row("A", ["New York", "x"]), metric="simple_str_match")
    assert right(queries[0], "newyork") and not right(queries[0], "york")
    assert right(queries[1], "A") and not right(queries[1], "newyork")
    with pytest.raises(ConfigError, match="metric='simple_match' is none of .*mmmu_open, .*simple_str_match"):
        own(row("1"), metric="simple_match")


PLAIN = {"title": "t", "data": "a/b", "files": ["*.parquet"], "fields": {"answer": "answer"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "../../outside"}, r"name .*must be a plain folder name .*'\.\./\.\./outside'"),
        ({"name": "/outside"}, "must be a plain folder name"),
        ({"name": 3}, "for Benchmark name "),
        ({"files": ["../*.parquet"]}, "files and folder must lie below the data's folder"),
        ({"files": ["/etc/*"]}, "files and folder must lie below the data's folder"),
        ({"files": [3]}, "for Benchmark files.0 "),
        ({"files": 3}, "does not describe a benchmark"),
        ({"folder": "../x"}, "files and folder must lie below"),
        ({"folder": 3}, "for Benchmark folder "),
        ({"fields": {"answer": ["a"]}}, "fields.*answer"),
        ({"fields": "/etc/hosts"}, "for Benchmark fields "),
        ({"prompt": 3}, "for Benchmark prompt "),
        ({"category_pattern": "("}, "for Benchmark category_pattern .*regular expression"),
        ({"category_pattern": "x"}, "must have one group"),
        ({"title": {"a": 1}}, "for Benchmark title "),
        ({"colour": "red"}, "does not describe a benchmark"),
        ({"answer_kind": "other"}, "answer_kind .*given.*option"),
    ],
)
def test_a_benchmarks_file_stays_in_its_place(tmp_path, changes, message):
    """A file from elsewhere neither writes results nor reads data outside its folders; a mistake in it is one line."""
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps({**PLAIN, **changes}))
    with pytest.raises(ConfigError, match=f"--benchmark .*mine.yaml.*{message}") as caught:
        load_benchmark(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- a", "3", "a: &a [x]\nb: *a", "!!python/name:os.system", "a: b: c", "\0", ""])
def test_a_benchmarks_file_is_plain_yaml(tmp_path, content):
    """Whatever else stands in it fails, and nothing is run."""
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match="--benchmark"):
        load_benchmark(str(file))


def test_a_plain_file_is_a_benchmark(tmp_path):
    """So the refusals above are for their own reasons."""
    (tmp_path / "mine.yaml").write_text(json.dumps(PLAIN))
    assert load_benchmark(str(tmp_path / "mine.yaml")).name == "mine"
