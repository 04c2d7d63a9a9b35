"""Whatever comes in is taken whole or refused in one line: no traceback, no hang, nothing left behind, nothing run.

`pytest tests/fuzz` tries 1,500 inputs; `pytest -m soak tests/fuzz` (make soak) 10,000, and prints a summary.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import time
import warnings
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from PIL import Image

from rethinker.config import ConfigError, DataConfig, RewardConfig
from rethinker.data.datasets import load_queries
from rethinker.data.images import check_image, image_size, open_image
from rethinker.data.prompts import PromptEncoder
from rethinker.data.query_stream import QueryStream
from rethinker.embedded.tiny import create_tiny
from rethinker.policy.loading import load_processor
from rethinker.rewards.answers import compare, extract_boxed, undecided
from rethinker.rewards.checker import AnswerChecker
from rethinker.samples import Query
from rethinker.settings import load_config, resolve_config, to_yaml
from tests.fuzz import inputs
from tests.fuzz.campaign import Campaign

# Deadline of one answer check here, and what the checks done without a worker may take.
TIMEOUT_S, STRING_WORK_S = 1.0, 0.5
MOST_PIXELS = 100_000


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return load_processor(create_tiny(tmp_path_factory.mktemp("tiny"), seed=0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to work in."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path))
    return work


def fuzz_recipes(examples: int, folder: Path) -> Campaign:
    """Every accepted recipe gives settings that are written and read back the same, and a run folder below run.dir."""
    recipe = folder.parent / "recipe.yaml"

    def use(drawn: tuple[bytes, list[str]]) -> None:
        content, overrides = drawn
        recipe.write_bytes(content)
        config = load_config(recipe, overrides)
        root = Path(config.run.dir).expanduser().resolve()
        assert (root / config.run.name).resolve().parent == root
        written = to_yaml(config).encode("utf-8")
        yaml.safe_load(written)
        recipe.write_bytes(written)
        assert repr(resolve_config(recipe)) == repr(config)  # repr, since NaN differs from itself

    return Campaign("recipes").run(examples, inputs.recipes(), use, folder)


def fuzz_rows(examples: int, folder: Path, processor) -> Campaign:
    """Every accepted row can be encoded, sent to a checking process and written; prompts are whole or left out."""
    shelf = folder.parent / "data"
    (shelf / "folder").mkdir(parents=True)
    whole = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(whole, "PNG")
    (shelf / "a.png").write_bytes(whole.getvalue())
    (folder.parent / "a.png").write_bytes(whole.getvalue())
    (shelf / "cut.png").write_bytes(whole.getvalue()[:60])
    os.mkfifo(shelf / "pipe")
    (shelf / "link.png").symlink_to("a.png")
    (shelf / "loop").symlink_to("loop")
    image_token = processor.image_token_id

    def use(drawn: tuple[list, dict]) -> None:
        rows, options = drawn
        file = shelf / "rows.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        config = DataConfig(train=str(file), min_pixels=1024, max_pixels=4096, **options)
        queries = load_queries(config, "train")
        assert len({query.id for query in queries}) == len(queries) > 0
        assert len(rows) - len(queries) <= config.max_bad_rows * len(rows)
        encoder = PromptEncoder(processor, config)
        for query in queries:
            pickle.loads(pickle.dumps(query))
            json.dumps(query.metadata, default=str)
            f"{query.id}{query.question}{query.answer}".encode()
            if encoder.misfit(query) is None:
                prompt = encoder.encode(query)
                assert len(prompt.token_ids) <= config.max_prompt_tokens
                grids = encoder.pixels(query)["image_grid_thw"] if query.images else []
                assert prompt.token_ids.count(image_token) == sum(int(grid.prod()) // 4 for grid in grids)
                assert prompt.compact_ids.count(image_token) == len(query.images) == len(prompt.images)
        encoder.fitting(QueryStream(queries, seed=0))

    return Campaign("rows").run(examples, inputs.tables(), use, folder)


def fuzz_images(examples: int, folder: Path) -> Campaign:
    """Every accepted image is RGB, of the size that its header says, within the limit, and passes the cheap check."""

    def use(content: bytes) -> None:
        reference = {"bytes": content} if len(content) % 2 else str(folder.parent / "image")
        if isinstance(reference, str):
            Path(reference).write_bytes(content)
        checked = False
        with suppress(ConfigError):
            check_image(reference, "q", MOST_PIXELS)
            checked = True
        try:
            image = open_image(reference, "q", MOST_PIXELS)
        except ConfigError:
            assert not checked, "the check that decides what is drawn lets an image pass that cannot be opened"
            raise
        assert image.mode == "RGB" and 0 < image.width * image.height <= MOST_PIXELS
        assert image_size(reference, "q", MOST_PIXELS) == image.size[::-1]

    return Campaign("images").run(examples, inputs.images(), use, folder)


def fuzz_answers(examples: int, folder: Path) -> tuple[Campaign, float, float, dict[str, int]]:
    """Every answer is judged: string work at once, mathematics before its deadline.

    Returns:
        The campaign; the slowest string work and the slowest check of a worker, in seconds; failed checks.
    """
    slowest = {"string": 0.0, "worker": 0.0}
    with AnswerChecker(RewardConfig(timeout_s=TIMEOUT_S, workers=1)) as checker:
        warm = Query("warm", "", "2\\sqrt{2}")
        assert checker.score([("a", "\\boxed{\\sqrt{8}}", warm)]) == {"a": 1.0}

        def use(drawn: tuple) -> None:
            response, answer, question, choices = drawn
            start = time.perf_counter()
            predicted = extract_boxed(response)
            if predicted is not None:
                verdict = compare(predicted, answer, question=question, choices=choices, equal=undecided)
                assert verdict in (True, False, None)
            took = time.perf_counter() - start
            slowest["string"] = max(slowest["string"], took)
            assert took < STRING_WORK_S, f"{took:.2f} s of string work"
            worker, failures = checker._workers[0], checker.failures.total()
            query = Query("q", question, answer, metadata={"choices": choices})
            ready = worker._process is not None
            start = time.perf_counter()
            scores = checker.score([("a", response, query)])
            if ready and worker._process is not None and checker.failures.total() == failures:
                slowest["worker"] = max(slowest["worker"], time.perf_counter() - start)
            assert scores in ({"a": 0.0}, {"a": 1.0})

        campaign = Campaign("answers").run(examples, inputs.answers(), use, folder)
        return campaign, slowest["string"], slowest["worker"], dict(checker.failures)


def test_recipes(folder):
    """Law: a recipe and its overrides give valid settings or one line."""
    assert fuzz_recipes(250, folder).refused > 50


def test_rows(folder, processor):
    """Law: the rows of a data set give queries that can be trained on, or one line."""
    assert fuzz_rows(400, folder, processor).refused > 50


def test_images(folder):
    """Law: an image file gives upright RGB pixels or one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor a warning on the user's screen
        assert 50 < fuzz_images(600, folder).refused < 590


def test_answers(folder):
    """Law 11: whatever a model writes is judged before its deadline."""
    campaign, _, worker, failures = fuzz_answers(250, folder)
    assert campaign.refused == 0 and worker < TIMEOUT_S + 0.5 and set(failures) <= {"timeout", "crash", "error"}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_thousand(folder, processor, capsys):
    """All laws above, over 10,000 inputs."""
    campaigns = [fuzz_recipes(2500, folder), fuzz_rows(3000, folder, processor), fuzz_images(3000, folder)]
    answers, string, worker, failures = fuzz_answers(1500, folder)
    with capsys.disabled():
        print("\n" + "\n".join(map(str, [*campaigns, answers])))
        print(f"in all {sum(c.inputs for c in [*campaigns, answers])} inputs")
        print(
            f"answers: slowest string work {string * 1e3:.0f} ms, slowest check that ended {worker * 1e3:.0f} ms of a "
            f"deadline of {TIMEOUT_S} s; failed and scored 0: {failures}"
        )
    assert sum(campaign.inputs for campaign in [*campaigns, answers]) >= 10_000
