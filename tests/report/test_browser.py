"""The page in a real browser: it draws, filters, fits a phone and prints, and nothing that a model wrote runs."""

from __future__ import annotations

import pytest

from rethinker.embedded.tiny import create_tiny
from rethinker.report.figures import FIGURES
from rethinker.report.page import write_report
from rethinker.report.story import STORY
from tests import forked
from tests.report.conftest import DESKTOP, PHONE
from tests.report.examples import (
    CALL,
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

DRAWN = [figure for figure in FIGURES if figure.name != "refill" and not figure.needs]  # without refill and tools
OF_ONE = [figure for figure in (*STORY, *DRAWN) if figure.of != "several"]
SCRIPT = "<script>window.taken = 1</script><img src=x onerror='window.taken = 2'>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs with everything a page can have, and some of it hostile or very long."""
    folder = tmp_path_factory.mktemp("report")
    text = f"three.{TRIGGER} yes: four"
    grpo = [
        group(0, [("a red circle", 1.0), ("wrong: red", 0.0)], "which color?", "color", picture()),
        group(1, [(SCRIPT, 1.0), ("w" * 3000, 0.0), (text, 1.0)], SCRIPT, rethought={2: forced(text)}),
    ]
    grpo += [group(2, [("e" * 500, 1.0)], "q" * 500, "c" * 100)]
    answer = {"text": SCRIPT + "o" * 500, "images": [picture(900, 300), b"damaged"], "failures": (SCRIPT,), "calls": 1}
    grpo += [looked(3, (conversation(CALL, answer, "four"), 1.0))]
    ssr = [group(i, [(f"answer {i}", 1.0), (f"needle{i}", 0.0)]) for i in range(20)]
    accuracies = {0: 0.5, 3: 0.6, 6: 0.7}
    runs = [
        write_run(folder / "a_run_with_quite_a_long_name", "grpo", accuracies=accuracies, groups=grpo),
        write_run(folder / "other", "ssr", accuracies=accuracies, groups=ssr),
    ]
    for mode, accuracy in (("normal", 0.5), ("forced", 0.55), ("oracle", 0.6)):
        write_evaluation(folder / "evals" / mode, "base", "MathVista", mode, accuracy)
    return write_report(runs, folder / "page.html", [folder / "evals"])


def visible_responses(browser) -> list[str]:
    return [element.text for element in browser.visible("li.response .text")]


def choose(browser, verdict: str) -> None:
    browser.click(f"#filters input[value={verdict}] + span")


def test_every_figure_is_drawn(browser, page):
    """No message on the console, and each figure is an image that could be read."""
    browser.open(page)
    boxes = browser.run(
        "return Object.fromEntries([...document.querySelectorAll('figure')].map(figure => {"
        "  const image = figure.querySelector('img');"
        "  return [figure.id.replace('figure-', ''), [image.width, image.height, image.naturalWidth]]; }))"
    )
    assert set(boxes) == {figure.name for figure in DRAWN if figure.of != "one"} | {"rethinking"}
    for width, height, drawn in boxes.values():
        assert width > 300 and height > 100 and drawn > 100
    assert browser.messages() == []


def test_nothing_that_a_model_wrote_runs(browser, page):
    """A response and a question with a script in them are read as they were written."""
    browser.open(page)
    browser.click("details.group:nth-of-type(2) summary")
    assert SCRIPT in visible_responses(browser)
    assert SCRIPT in [element.text for element in browser.visible(".question")]
    assert browser.run("return window.taken ?? null") is None
    assert browser.messages() == []


def test_an_answer_is_read_between_two_turns(browser, page):
    """What an environment answered stands below the call and above the next turn, whole in the response's width, with
    the image that could be read; nothing in it runs."""
    browser.open(page)
    browser.click("details.group:nth-of-type(4) summary")
    (answer,) = browser.visible("mark.observed")
    assert SCRIPT in answer.text and "1 image could not be read" in answer.text
    text = answer.find_element("xpath", "..")
    assert text.text.startswith("<tool_call>") and text.text.endswith("four")
    (image,) = answer.find_elements("css selector", "img")
    assert browser.run("return arguments[0].naturalWidth", image) == 160
    inside, around = answer.rect, text.rect
    assert around["x"] <= inside["x"] and inside["x"] + inside["width"] <= around["x"] + around["width"]
    assert browser.run("return window.taken ?? null") is None and browser.messages() == []


def test_an_injected_script_would_be_blocked(browser, page, tmp_path):
    """The second line of defence: were markup ever let through, the page's policy would still not run it."""
    hostile = tmp_path / "hostile.html"
    hostile.write_text(page.read_text().replace("a red circle", SCRIPT))
    browser.open(hostile)
    assert browser.run("return document.querySelectorAll('.text script').length") == 1
    assert browser.run("return window.taken ?? null") is None
    assert any("Content Security Policy" in message for message in browser.messages())


def test_filters(browser, page):
    """Each verdict shows its responses alone, whatever was closed before; with `all` the rest is there again."""
    browser.open(page)
    assert visible_responses(browser) == ["a red circle", "wrong: red"]  # of the first question, which is open
    choose(browser, "wrong")
    shown = browser.visible("li.response")
    assert len(shown) == 22 and {element.get_attribute("data-verdict") for element in shown} == {"wrong"}
    assert browser.driver.find_element("id", "count").text == "22 responses of 22 questions"
    choose(browser, "rethought")
    (response,) = visible_responses(browser)
    assert response.startswith("three.") and [mark.text for mark in browser.visible("mark")] == [TRIGGER.strip()]
    assert browser.driver.find_element("id", "count").text == "1 response of 1 question"
    choose(browser, "right")
    assert "needle3" not in visible_responses(browser) and "a red circle" in visible_responses(browser)
    choose(browser, "all")
    assert "needle3" in visible_responses(browser) and browser.messages() == []


def test_search_category_and_run(browser, page):
    """The text is looked for in question and response; category and run narrow further."""
    browser.open(page)
    field = browser.driver.find_element("css selector", "input[type=search]")
    field.send_keys("NEEDLE1")
    assert visible_responses(browser) == ["needle1", *(f"needle{i}" for i in range(10, 20))]
    field.clear()
    field.send_keys("which color")
    assert visible_responses(browser) == ["a red circle", "wrong: red"]
    field.clear()
    browser.run(
        "const c = document.querySelector('select[name=category]'); c.value = 'color';"
        "c.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert len(browser.visible("details.group")) == 1
    browser.run(
        "const r = document.querySelector('select[name=run]'); r.value = 'ssr';"
        "r.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert browser.driver.find_element("id", "count").text == "0 responses of 0 questions"


def test_keyboard(browser, page):
    """The filters and the questions work without a mouse."""
    browser.open(page)
    keys = pytest.importorskip("selenium.webdriver.common.keys", reason="needs selenium").Keys
    browser.driver.find_element("css selector", "#filters input[value=all]").send_keys(
        keys.ARROW_RIGHT, keys.ARROW_RIGHT
    )
    assert {e.get_attribute("data-verdict") for e in browser.visible("li.response")} == {"wrong"}
    choose(browser, "all")
    second = browser.driver.find_elements("css selector", "details.group")[1]
    opened = second.get_attribute("open")
    second.find_element("css selector", "summary").send_keys(keys.ENTER)
    assert second.get_attribute("open") != opened


def test_a_phone_scrolls_one_way_only(browser, page):
    """At 390 pixels nothing is wider than the screen, with every question open; tables scroll in themselves."""
    browser.open(page, PHONE)
    browser.run("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert browser.run("return document.documentElement.scrollWidth") == PHONE[0]
    wide = browser.run(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll')"
        " && e.checkVisibility() && e.getBoundingClientRect().right > 391).map(e => e.outerHTML.slice(0, 80))"
    )
    assert wide == []


def test_print(browser, page):
    """On paper the controls are gone, and the figures stay."""
    browser.open(page)
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert browser.driver.execute_cdp_cmd("Page.printToPDF", {})["data"].startswith("JVBERi")
        assert not browser.visible("#filters") and not browser.visible("nav")
        assert len(browser.visible("figure img")) == len([figure for figure in DRAWN if figure.of != "one"]) + 1
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_story_fits_both_screens(browser, tmp_path):
    """Four figures in two rows of two, above the example, which begins on a laptop's first screen; on a phone one below
    the other, without a message; the example's image is as wide as its row on a phone and its answers are there."""
    _, two = write_stages(tmp_path)
    page = write_report([two])
    boxes = (
        "return [...document.querySelectorAll('h2#learned + .figures figure')].map(f => f.getBoundingClientRect().x)"
    )
    browser.open(page, DESKTOP)
    left, right, *below = browser.run(boxes)
    assert left < right and below == [left, right]
    example = browser.run("return document.querySelector('h3.example').getBoundingClientRect()")
    lowest = browser.run(boxes.replace(".x)", ".bottom)"))
    assert max(lowest) < example["top"] < example["bottom"] <= DESKTOP[1]
    browser.open(page, PHONE)
    assert browser.run(boxes) == [16] * 4
    assert browser.run("return document.documentElement.scrollWidth") == PHONE[0]
    (image,) = browser.visible("img.example")
    assert image.size["width"] == PHONE[0] - 32
    verdicts = [element.text for element in browser.visible(".moments .verdict")]
    assert verdicts == ["wrong", "wrong", "right"] and browser.messages() == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run with a random model: its folder's parent, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    create_tiny(folder / "model", seed=0)
    (folder / "reward.py").write_text("def parity(response, answer, query):\n    return float(len(response) % 2)\n")
    command = ["easy_vqa_cpu", "--run.dir", str(folder / "runs"), "--run.name", "real"]
    command += ["--policy.model", str(folder / "model"), "--reward.function", str(folder / "reward.py:parity")]
    command += ["--rollout.backend", "hf", "--rollout.group_size", "4", "--rollout.max_new_tokens", "12"]
    command += ["--train.batch_pairs", "32", "--train.episode_queries", "8", "--train.max_steps", "3"]
    command += ["--validation.size", "8", "--validation.every", "1"]
    forked.run(forked.training(command), folder / "log")
    return folder, (folder / "log").read_text()


def test_training_ends_with_its_report(trained):
    """The run's folder holds the page and its figures, and the last line printed says where."""
    folder, printed = trained
    assert f"report           {folder}/runs/real/report.html" in printed
    figures = folder / "runs" / "real" / "report_figures"
    assert {path.stem for path in figures.glob("*.svg")} == {figure.name for figure in OF_ONE}
    assert (folder / "runs" / "real" / "validation" / "step_000003.parquet").is_file()


def test_a_real_run_is_shown(browser, trained):
    """Every figure of a real run is drawn, its questions have their images, and the console is silent."""
    browser.open(trained[0] / "runs" / "real" / "report.html")
    assert len(browser.visible("figure img")) == len(OF_ONE)
    assert len(browser.visible("details.group")) == 24
    images = "return [...document.querySelectorAll('.group img')].map(image => image.naturalWidth)"
    assert browser.run(images) == [64] * 24
    assert browser.messages() == []
