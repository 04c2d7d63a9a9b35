"""The page has a run's own facts, escapes what models wrote, stays bounded, and does without missing parts."""

from __future__ import annotations

import base64
import io
import json
import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from rethinker.config import ConfigError
from rethinker.report import completions, page
from rethinker.report.completions import find_trigger, sample_completions
from rethinker.report.figures import FIGURES
from rethinker.report.page import report_or_warning, write_report
from rethinker.report.runs import read_run
from rethinker.report.story import STORY, before_and_after, own_rethinking
from rethinker.runtime.completions import write_completions
from tests.report.examples import (
    CALL,
    FAST,
    RETHINKS,
    SLOW,
    TRIGGER,
    conversation,
    forced,
    group,
    looked,
    picture,
    write_evaluation,
    write_run,
    write_stages,
)

ROOT = Path(__file__).parents[2]


class Elements(HTMLParser):
    """The page's elements with their attributes, and its text."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """Attributes of the elements with this tag (and these attributes)."""
        return [a for t, a in self.found if t == tag and all(a.get(k) == v for k, v in attributes.items())]


@pytest.fixture
def no_figures(monkeypatch):
    """The page without its figures, which take most of its time."""
    monkeypatch.setattr(page, "FIGURES", ())
    monkeypatch.setattr(page, "STORY", ())


def test_the_summary_has_the_runs_facts(tmp_path, no_figures):
    """Model, algorithm, seed, steps, first and last accuracy, best checkpoint, categories, changed settings."""
    run = write_run(tmp_path / "run", accuracies={0: 0.5, 2: 0.75, 6: 0.625}, seed=7)
    (run / "checkpoints" / "best").mkdir()
    text = Elements(write_report([run])).text
    for fact in ("Model tiny", "Algorithm ssr", "Seed 7", "Steps 6 ", "best 0.750 at step 2"):
        assert fact in text
    assert "Held-out accuracy 0.500 to 0.625" in text
    assert "yes/no 0.500 to 0.625" in text and "color 0.250 to 0.312" in text
    assert "algorithm.clip_high 0.2 0.35" in text and "train.max_steps null 6" in text and "seed 0 7" in text
    assert "clip_low" not in text


def test_the_page_needs_nothing_else(tmp_path):
    """No element refers to anything outside the page; ids are unique and what refers to one finds it."""
    runs = [write_run(tmp_path / a, a, accuracies={0: 0.1, 6: 0.2}) for a in ("grpo", "ssr")]
    write_evaluation(tmp_path / "e0", "base", "b", "normal", 0.5)
    write_evaluation(tmp_path / "e1", "base", "b", "forced", 0.6)
    file = write_report(runs, tmp_path / "page.html", [tmp_path / "e0", tmp_path / "e1"])
    elements = Elements(file)
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [a[name] for _, a in elements.found for name in ("href", "xlink:href", "src") if name in a]
    assert links and {link for link in links if not link.startswith("data:")} <= {f"#{i}" for i in ids}
    assert not elements.all("link") and "@import" not in file.read_text()


def test_every_figure_lies_beside_the_page(tmp_path):
    """One SVG file per figure of the page, described for screen readers; a figure that is gone leaves no old file."""
    run = write_run(tmp_path / "run", accuracies={0: 0.1, 6: 0.2})
    elements = Elements(write_report([run]))
    names = {figure.name for figure in (*STORY, *FIGURES) if figure.suits([read_run(run)])} - {
        "refill"
    }  # which it did not
    assert {path.stem for path in (run / "report_figures").glob("*.svg")} == names
    shown = elements.all("img")
    assert len(shown) == len(names) and all(len(image["alt"]) > 10 for image in shown)
    (run / "validation.jsonl").unlink()
    write_report([run])
    assert not (run / "report_figures" / "validation.svg").exists()


def test_missing_parts_are_said_in_words(tmp_path):
    """No settings, validation, completions or replay: a sentence each, and the page all the same."""
    run = write_run(tmp_path / "run", "grpo", finished=False, steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')  # the run is being written
    elements = Elements(write_report([run]))
    assert "3 of 3 so far (running, or ended early)" in elements.text
    assert (
        "0 at every step: Held-out accuracy; Refill; Selective Sample Replay; Replay's draws by category."
        in elements.text
    )
    assert "No completions are recorded" in elements.text
    (run / "config.yaml").unlink()
    assert "Sampled reward" in Elements(write_report([run])).text


def test_what_others_wrote_is_text(tmp_path):
    """Markup in a response, a question, a name, a setting or a result is shown, and is no element of the page."""
    places = ("response", "question", "answer", "category", "id", "label", "setting", "model", "benchmark")
    scripts = {place: f"<script>document.title = '{place}'</script>" for place in places}
    shown = group(0, [(scripts["response"], 1.0), ("no", 0.0)], scripts["question"], scripts["category"])
    query = replace(shown.query, answer=scripts["answer"], id=scripts["id"])
    greedy = replace(shown, query=query, completions=shown.completions[:1], advantages=[])
    answers = {step: [replace(greedy, rewards=[reward])] for step, reward in ((0, 0.0), (6, 1.0))}
    run = write_run(tmp_path / "run", groups=[replace(shown, query=query)], answers=answers)
    config = (run / "config.yaml").read_text()
    for key, value, place in (("name", "ssr", "label"), ("function", "boxed", "setting")):
        assert f"{key}: {value}\n" in config
        config = config.replace(f"{key}: {value}\n", f"{key}: {json.dumps(scripts[place])}\n")
    (run / "config.yaml").write_text(config)
    for mode, accuracy in (("normal", 0.5), ("forced", 0.6)):
        write_evaluation(tmp_path / "evals" / mode, scripts["model"], scripts["benchmark"], mode, accuracy)
    several = [run, write_run(tmp_path / "other")]
    elements = Elements(write_report(several, tmp_path / "page.html", [tmp_path / "evals"]))
    assert len(elements.all("script")) == 1  # the page's own
    for script in scripts.values():
        assert script in "".join(elements.words)
    alone = Elements(write_report([run]))
    assert len(alone.all("script")) == 1
    example = "".join(alone.words).split("answered greedily before")[1].split("Summary")[0]
    assert all(scripts[place] in example for place in ("response", "question", "answer", "category", "id"))


def test_groups_show_all_responses(tmp_path, no_figures):
    """Question, answer, image, verdict, reward and advantage of every response; forced triggers are marked."""
    text = f"three. {TRIGGER} ... four"
    texts = [("four", 1.0), (text, 1.0), ("Wait, let me re-examine. five", 0.0), ("", 0.0)]
    run = write_run(tmp_path / "run", groups=[group(3, texts, image=picture(), rethought={1: forced(text)})])
    file = write_report([run])
    elements = Elements(file)
    responses = elements.all("li")
    assert [r["data-verdict"] for r in responses] == ["right", "right", "wrong", "wrong"]
    assert [r["data-rethought"] for r in responses] == ["no", "yes", "yes", "no"]
    assert "answer four" in elements.text and "2 of 4 right" in elements.text and "advantage +0.500" in elements.text
    assert elements.text.count("rethinks by itself") == 1  # the trigger's own "Wait" and "double check" are not its
    assert "rethinking forced: self_verification" in elements.text and "(empty)" in elements.text
    marked = re.findall(r"<mark[^>]*>(.*?)</mark>", file.read_text(), flags=re.DOTALL)
    assert [m.replace("&#39;", "'").strip() for m in marked] == [TRIGGER.strip()]
    (image,) = elements.all("img")
    assert image["src"].startswith("data:image/jpeg;base64,") and "q3" in image["alt"]


def test_turns_are_shown_in_order(tmp_path, no_figures):
    """What the policy said and what it was answered stand where they stood, the answers marked as not the policy's,
    with their images, calls and failures; a response without an environment has none of it."""
    said = ("Look. " + CALL, "Again. " + CALL, "\\boxed{four} done")
    crop = {"text": "<tool_response>\n<image>\n</tool_response>", "images": [picture(40, 20)], "calls": 1}
    refused = {"text": "<tool_response>\nno such box\n</tool_response>", "calls": 2, "failures": ("box", "limit")}
    ended = {"reward": -0.5, "failures": ("turns",)}
    whole = conversation(said[0], crop, said[1], refused, said[2])
    cut = conversation(CALL, ended)
    plain = conversation("\\boxed{four}")
    asked = conversation("\\boxed{3}", {"text": "sure?"}, "\\boxed{four}")
    run = write_run(tmp_path / "run", groups=[looked(0, (whole, 1.0), (cut, 0.0), (plain, 1.0), (asked, 1.0))])
    file = write_report([run])
    (shown,) = sample_completions([read_run(run)])["groups"]
    first, second, *_ = shown["responses"]
    assert [part.by for part in first["parts"]] == ["policy", "environment"] * 2 + ["policy"]
    assert [part.text for part in first["parts"]] == [said[0], crop["text"], said[1], refused["text"], said[2]]
    assert [part.by for part in second["parts"]] == ["policy", "environment"] and second["parts"][1].text == ""
    counts = [(r["turns"], r["calls"], r["failed_calls"], r["fast"]) for r in shown["responses"]]
    assert counts == [(3, 3, 2, False), (1, 0, 0, False), (1, 0, 0, True), (2, 0, 0, False)]
    assert [r["tokens"] for r in shown["responses"]] == [len(r.text) for r in (whole, cut, plain, asked)]
    html = file.read_text()
    items = re.findall(r"<li.*?</li>", html, flags=re.DOTALL)
    marks = [re.findall(r"<mark[^>]*answered by the environment[^>]*>(.*?)</mark>", item, re.DOTALL) for item in items]
    assert [len(found) for found in marks] == [2, 1, 0, 1]
    assert "3 turns" in items[0] and "3 tool calls" in items[0] and "2 failed" in items[0]
    assert marks[0][0].count("<img") == 1 and marks[0][1].count("<img") == 0 and "failed: box" in marks[0][1]
    assert "at the end" in marks[1][0] and "failed: turns" in marks[1][0] and "reward -0.5" in marks[1][0]
    assert not any(word in items[2] for word in ("turns", "tool call", "environment", "failed"))
    pictures = [Image.open(io.BytesIO(base64.b64decode(uri))) for uri in re.findall(r"base64,([^\"]+)\"", items[0])]
    assert [image.size for image in pictures] == [(40, 20)]


def test_what_an_environment_answered_is_bounded_text(tmp_path, no_figures):
    """Markup in an answer or a reason is shown as it is; a long answer is cut, many images are not all shown, and one
    that is damaged is said to be."""
    script = "<script>document.title = 'taken'</script><img src=x onerror='1'>"
    hostile = {"text": script, "failures": (script,), "images": [b"no picture", b""], "calls": 1}
    crowd = {"text": "x" * 200_000, "images": [picture(2000, 1000)] * 40}
    turns = [part for _ in range(50) for part in ("s" * 9000, crowd)]
    groups = [looked(0, (conversation("a", hostile, "b"), 1.0), (conversation(*turns, "end"), 0.0))]
    run = write_run(tmp_path / "run", groups=groups)
    file = write_report([run])
    elements = Elements(file)
    assert len(elements.all("script")) == 1 and "".join(elements.words).count(script) == 2
    assert "2 images could not be read" in elements.text and "characters left out" in elements.text
    shown = elements.all("img", alt="Image 1 of an answer") + elements.all("img", alt="Image 4 of an answer")
    assert len(shown) == 2 and "36 images not shown here" in elements.text and "40 images not" in elements.text
    assert file.stat().st_size < 100_000


def test_files_from_before_environments_are_shown(tmp_path, no_figures):
    """Completions without the column of answers are read as ever."""
    run = write_run(tmp_path / "run", groups=[group(0, [(SLOW, 1.0), (RETHINKS, 1.0)])])
    file = run / "completions" / "episode_00000.parquet"
    before = sample_completions([read_run(run)])
    pq.write_table(pq.read_table(file).drop_columns(["observed"]), file)
    assert sample_completions([read_run(run)]) == before and before["unreadable"] == []
    assert responses(own_rethinking(read_run(run), [])) == [("sampled", RETHINKS, "right")]


def test_the_page_is_bounded(tmp_path, no_figures):
    """Many groups, long texts and large images: as many as the page says, cut in the middle, as thumbnails."""
    long = "begin " + "x" * 10_000 + " \\boxed{end}"
    large = picture(1200, 900)
    many = [group(i, [(long, 1.0), (long, 0.0)], image=large) for i in range(completions.MOST_GROUPS + 30)]
    lost = write_run(tmp_path / "lost", groups=[group(999, [("a", 1.0)], image=str(tmp_path / "gone.png"))])
    run = write_run(tmp_path / "run", groups=many)
    (run / "completions" / "episode_00001.parquet").write_bytes(b"half")
    file = write_report([run])
    elements = Elements(file)
    assert file.stat().st_size < 2_000_000
    for image in elements.all("img"):
        shown = Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2])))
        assert shown.size == (completions.THUMBNAIL, completions.THUMBNAIL * 3 // 4)
    shown = len(elements.all("details", **{"class": "group"}))
    assert shown == completions.MOST_GROUPS // 2 and f"{shown} questions with" in elements.text  # of the whole file
    assert "characters left out" in elements.text and "\\boxed{end}" in elements.text
    assert "1 image could not be read" in Elements(write_report([lost])).text
    assert elements.text.count("run/episode_00001.parquet") == 1 and "Could not be read: " in elements.text


def test_the_sample_covers_the_run(tmp_path):
    """Groups come from the first episode to the last, over all runs alike, and are the same each time."""
    runs = []
    for name in ("grpo", "ssr"):
        folder = write_run(tmp_path / name, name, groups=[])
        for episode in range(100):
            write_completions(folder / "completions", episode, [group(i, {"a": 1.0}) for i in range(5)])
        runs.append(read_run(folder))
    first, again = (completions.sample_completions(runs) for _ in range(2))
    assert first == again
    assert len(first["groups"]) == completions.MOST_GROUPS
    for run in runs:
        episodes = [shown["episode"] for shown in first["groups"] if shown["run"] == run.label]
        assert len(episodes) == completions.MOST_GROUPS // 2 and episodes == sorted(episodes)
        assert (episodes[0], episodes[-1]) == (0, 99)


def responses(example: dict) -> list[tuple[str, str, str]]:
    """When, text and verdict of a before and after."""
    return [(r["when"], "".join(part.text for part in r["parts"]), r["verdict"]) for r in example["responses"]]


def test_before_and_after(tmp_path):
    """Of a run in stages: the question that was answered fast and wrong, and in the end right after rethinking, though
    another right answer is longer; with what each stage started from, and its image."""
    one, two = write_stages(tmp_path)
    unreadable = []
    example = before_and_after(read_run(two), unreadable)
    assert example["query_id"] == "q1" and example["category"] == "5 terms" and len(example["images"]) == 1
    assert responses(example) == [
        ("before training", FAST, "wrong"),
        ("after stage 1", SLOW, "wrong"),
        ("after training", RETHINKS, "right"),
    ]
    assert [(r["fast"], r["rethinks"]) for r in example["responses"]] == [(True, False), (False, False), (False, True)]
    alone = before_and_after(read_run(one), unreadable)
    assert responses(alone) == [("before training", FAST, "wrong"), ("after training", SLOW + " ", "right")]
    assert unreadable == []


def held_out(*texts: tuple[str, float]) -> list:
    """Groups of one greedy answer each."""
    return [group(number, [pair]) for number, pair in enumerate(texts)]


@pytest.mark.parametrize(
    ("before", "after", "chosen"),
    [
        ([(FAST, 0.0), (FAST, 0.0)], [(SLOW, 1.0), (SLOW * 2, 1.0)], "q1"),  # the longest
        ([(FAST, 0.0), (FAST, 0.0)], [(SLOW, 1.0), (SLOW, 1.0)], "q0"),  # the first of equals
        ([(FAST, 0.0), (SLOW, 0.0)], [(SLOW, 1.0), (SLOW * 2, 1.0)], "q0"),  # the one that was fast
        ([(FAST, 1.0), (SLOW, 0.0)], [(SLOW, 1.0), (FAST, 1.0)], "q1"),  # none was fast and wrong
        ([(FAST, 0.0), (SLOW, 1.0)], [(SLOW, 0.0), (SLOW, 1.0)], None),  # none became right
        ([(FAST, 0.0)], [], None),
        ([], [(SLOW, 1.0)], None),
    ],
)
def test_the_example_is_chosen_by_rule(tmp_path, before, after, chosen):
    """From wrong to right; fast before where there is one, then the longest answer, then the first question."""
    run = write_run(tmp_path / "run", answers={0: held_out(*before), 3: held_out((FAST, 0.0)), 6: held_out(*after)})
    example = before_and_after(read_run(run), [])
    assert (example and example["query_id"]) == chosen


def test_an_example_needs_both_ends(tmp_path):
    """A run without recorded answers, one that is not validated again yet, and a damaged file: no before and after."""
    right, unreadable = held_out((SLOW, 1.0)), []
    assert before_and_after(read_run(write_run(tmp_path / "none")), unreadable) is None
    assert before_and_after(read_run(write_run(tmp_path / "start", answers={0: right})), unreadable) is None
    assert before_and_after(read_run(write_run(tmp_path / "end", answers={6: right})), unreadable) is None
    assert unreadable == []
    run = write_run(tmp_path / "run", answers={0: held_out((FAST, 0.0)), 6: right})
    (run / "validation" / "step_000006.parquet").write_bytes(b"half")
    assert before_and_after(read_run(run), unreadable) is None and unreadable == ["run/step_000006.parquet"]


@pytest.mark.parametrize(
    ("texts", "chosen"),
    [
        ([(SLOW, 1.0), (RETHINKS * 2, 1.0), (RETHINKS, 1.0)], RETHINKS),  # the shorter one
        ([(f"{SLOW} Wait. {SLOW}", 1.0), (RETHINKS, 1.0)], RETHINKS),  # the one that had another answer
        (
            [(f"{RETHINKS} So \\boxed{{1}}", 1.0), ("\\boxed{1} Wait, \\boxed{ 1 }", 1.0)],
            f"{RETHINKS} So \\boxed{{1}}",
        ),
        ([("Wait, no. \\boxed{1}", 1.0), (SLOW + " Wait,", 1.0)], "Wait, no. \\boxed{1}"),  # the doubt comes first
        ([(RETHINKS, 0.0), (SLOW + " Wait,", 1.0), ("Wait", 1.0)], None),
        ([(f"\\boxed{{2}}{TRIGGER} \\boxed{{1}}", 1.0)], None),  # it was forced
    ],
)
def test_the_response_that_rethinks(tmp_path, texts, chosen):
    """Of the last episode's: unforced, right after its doubt; after another answer where there is one."""
    rethought = {i: forced(text) for i, (text, _) in enumerate(texts) if TRIGGER in text}
    run = write_run(tmp_path / "run", groups=[group(0, [(RETHINKS, 1.0)])])
    write_completions(run / "completions", 1, [group(1, texts, image=picture(), rethought=rethought)])
    example = own_rethinking(read_run(run), [])
    assert responses(example or {"responses": []}) == ([("sampled", chosen, "right")] if chosen else [])


def test_right_is_what_the_first_function_says(tmp_path):
    """Of several reward functions: neither a right response whose sum is low nor a wrong one whose sum is high is taken
    for the other."""
    judged = group(1, [(RETHINKS, 0.4), (f"Wait, no. {RETHINKS}", 1.2)], image=picture())
    judged.scores = {"boxed": [1.0, 0.0], "length": [-0.6, 1.2]}
    run = write_run(tmp_path / "run", groups=[judged])
    assert responses(own_rethinking(read_run(run), [])) == [("sampled", RETHINKS, "right")]
    ((right, wrong),) = [shown["responses"] for shown in sample_completions([read_run(run)])["groups"]]
    assert (right["verdict"], wrong["verdict"]) == ("right", "wrong")


def test_a_response_that_rethinks_needs_a_file(tmp_path):
    """No recorded episode is no message; a damaged one is named."""
    run, unreadable = write_run(tmp_path / "run", groups=[group(0, [(RETHINKS, 1.0)])]), []
    assert own_rethinking(read_run(write_run(tmp_path / "none")), unreadable) is None and unreadable == []
    (run / "completions" / "episode_00001.parquet").write_bytes(b"half")
    assert own_rethinking(read_run(run), unreadable) is None and unreadable == ["run/episode_00001.parquet"]


def test_stages_on_the_page(tmp_path, no_figures):
    """The summary says which stage it is, both stages' completions and settings are there, and a stage that is
    given beside the later one is not compared with it."""
    one, two = write_stages(tmp_path)
    assert "stage 2 of 2, after stage1" not in Elements(write_report([one])).text
    file = write_report([one, two])
    assert file == two / "report.html"
    text = Elements(file).text
    assert "Stage stage 2 of 2, after stage1" in text and "Steps 4, after 6 before" in text
    assert "Held-out accuracy 0.250 to 0.750" in text and "of stage 1" in text and "of stage 2" in text
    assert "Setting Default stage1 stage2" in text


def test_the_story_comes_first(tmp_path):
    """Four figures and the question stand before the summary; several runs side by side have no such section."""
    _, two = write_stages(tmp_path)
    elements = Elements(write_report([two]))
    figures = [a["id"] for tag, a in elements.found if tag == "figure"]
    assert figures[:4] == [f"figure-{figure.name}" for figure in STORY] and len(STORY) == 4
    places = [elements.text.index(words) for words in ("stage 1 is stage1", "before training wrong", "Stage stage 2")]
    assert places == sorted(places)
    assert elements.text.count("before training wrong") == 1 and "after training right" in elements.text
    assert "rethinks of its own accord" not in elements.text.split("before training wrong")[1]
    write_completions(two / "completions", 1, [group(0, [(SLOW, 1.0), (RETHINKS, 1.0)], image=picture(112, 16))])
    again = Elements(write_report([two]))
    words = (
        "after training right",
        "of its own accord, in the last episode how many sides?",
        "sampled right",
        "Stage stage 2",
    )
    places = list(map(again.text.index, words))
    assert places == sorted(places)
    images = [
        Image.open(io.BytesIO(base64.b64decode(a["src"].partition(",")[2])))
        for a in again.all("img", **{"class": "example"})
    ]
    assert [image.size for image in images] == [(176, 16), (112, 16)]
    several = Elements(write_report([two, write_run(tmp_path / "other", "grpo")], tmp_path / "page.html"))
    assert "What it learned" not in several.text and "figure-kinds" not in [a.get("id") for _, a in several.found]


def test_triggers_are_found_by_their_words():
    """A trigger is its words nearest to its place among the tokens; a text without them has no mark."""
    text = "Wait, let's double check" + "." * 60 + TRIGGER + "." * 10
    place = {"name": "self_verification", "trigger_start": 84}
    start, end = find_trigger(text, len(text), place, {})
    assert (start, text[start:end]) == (text.rindex("Wait"), TRIGGER.strip())
    assert find_trigger("nothing of the kind", 3, place, {}) == (19, 19)
    own = {"rethink.triggers.self_verification": " Hm?"}
    assert find_trigger("a Hm? b", 7, place, own) == (2, 5)


def test_a_failed_report_is_one_warning(tmp_path, capsys, monkeypatch, no_figures):
    """Whatever goes wrong in it, training gets None back, and one line is printed."""
    run = write_run(tmp_path / "run")
    assert report_or_warning(run) == run / "report.html"
    monkeypatch.setattr(page, "sample_completions", lambda runs: 1 / 0)
    assert report_or_warning(run) is None
    error = capsys.readouterr().err
    assert error.startswith("warning: no report: ZeroDivisionError") and error.count("\n") == 1


def test_command(rethinker, tmp_path):
    """`rethinker report` writes the page and prints its path; a mistake is one line and exit code 2."""
    write_run(tmp_path / "runs" / "one")
    write_run(tmp_path / "runs" / "two", "grpo")
    done = rethinker("report", "runs/one", "runs/two", "--output", "both.html")
    assert done.returncode == 0 and done.stdout.endswith("\nboth.html\n"), done.stderr
    assert (tmp_path / "both_figures" / "reward.svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: RUN"),
        (["nowhere"], "nowhere has no metrics.jsonl"),
        (["."], "name one of its runs: empty, odd, run"),
        (["empty"], "no step with a reward_mean yet"),
        (["odd"], "metrics.jsonl line 1 is no JSON object with a step"),
        (["run", "--output", "page.txt"], r"page.txt.*\.html"),
        (["run", "--output", "run/config.yaml/page.html"], "cannot be written"),
        (["run", "--eval", "run"], "--eval run holds no result.json"),
        (["run", "--colour"], "--colour"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    """No such run, none in it, no step yet, a damaged file, nowhere to write: one line and exit code 2."""
    from rethinker import cli

    write_run(tmp_path / "run")
    for name, content in (("empty", ""), ("odd", "[1]\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(content)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error


def test_no_run_can_be_read_as_another(tmp_path):
    """Damaged settings are named too."""
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"config\.yaml is not readable YAML"):
        write_report([run])


def test_the_templates_are_packaged():
    """The wheel takes the page's template, style and script along."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["rethinker"]
    package = ROOT / "rethinker"
    packaged = {path for pattern in patterns for path in package.glob(pattern)}
    assert {package / "report" / f"page.{kind}" for kind in ("html", "css", "js")} <= packaged


HOSTILE = """"'><svg onload=a()><img src=x onerror=a()></script></style></title></textarea><!-- --><script>a()</script>
{{ 7 * 7 }} {% raw %} javascript:a() \u202e \ud800 &lt; &#60; \0 \x1b[2J"""


def test_no_context_lets_markup_through(tmp_path):
    """Quotes, comments, ends of script, style and title, template marks and half characters, wherever a text of a run,
    a row or a model stands: in elements, in attributes, in figures; and image references that are no images."""
    image = f"{tmp_path}/{HOSTILE}.png"
    shown = group(0, [(HOSTILE, 1.0), (HOSTILE * 2, 0.0)], HOSTILE.replace("\ud800", ""), HOSTILE, image=image)
    for completion in shown.completions:
        completion.text = completion.text.replace("\ud800", "")  # Parquet has none
    query = replace(shown.query, answer=HOSTILE.replace("\ud800", ""), id=HOSTILE.replace("\ud800", ""))
    query = replace(query, images=tuple(str(i).replace("\ud800", "") for i in query.images))
    answered = replace(shown, query=query)
    greedy = replace(answered, completions=shown.completions[:1], advantages=[])
    answers = {step: [replace(greedy, rewards=[reward])] for step, reward in ((0, 0.0), (6, 1.0))}
    run = write_run(tmp_path / "run", groups=[answered], accuracies={0: 0.1, 6: 0.2}, answers=answers)
    rows = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
    for row in rows:
        row["by_category"] = {HOSTILE: 0.5}
    (run / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = (run / "config.yaml").read_text()
    for key, value in (("function", "boxed"), ("model", "tiny"), ("name", "ssr")):
        config = config.replace(f"{key}: {value}\n", f"{key}: {json.dumps(HOSTILE.replace(chr(0xD800), ''))}\n")
    (run / "config.yaml").write_text(config)
    elements = Elements(write_report([run]))
    assert len(elements.all("script")) == 1 and len(elements.all("style")) >= 1
    handlers = {name for _, attributes in elements.found for name in attributes if name.startswith("on")}
    assert not handlers
    assert not [a for tag, a in elements.found if tag == "img" and not a["src"].startswith("data:image/")]
    assert not [a for _, a in elements.found if "javascript:" in str(a.get("href", "")) + str(a.get("src", ""))]
    assert "{{ 7 * 7 }}" in elements.text and "49" not in elements.text.split("{{ 7 * 7 }}")[1][:20]


def test_files_of_another_hand(tmp_path):
    """Metrics that are no numbers, a Parquet file of other columns, settings that bomb: a page, or one line."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    run = write_run(tmp_path / "run", groups=[group(0, [("a", 1.0)])])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[0] |= {"entropy": "high", "grad_norm": [1], "kl": {"a": 1}, "loss": True}
    lines = [json.dumps(row) for row in rows]
    lines[1] = lines[1].replace('"entropy": ', '"odd": ').replace('"loss": -0.1', '"loss": 1' + "0" * 400)
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    parquet.write_table(pa.table({"group": [0, 1], "x": ["a", "b"]}), run / "completions" / "episode_00001.parquet")
    assert "Could not be read: run/episode_00001.parquet" in Elements(write_report([run])).text
    (run / "config.yaml").write_text("a: &a [x]\nb: *a")
    with pytest.raises(ConfigError, match=r"config\.yaml is not readable YAML: .*aliases"):
        write_report([run])
    (run / "metrics.jsonl").write_text('{"step": 1e999}\n')
    with pytest.raises(ConfigError, match="line 1 is no JSON object with a step"):
        write_report([run])
