"""`rethinker curate` with an engine that answers from a table: resumes, a data set comes out, mistakes are named."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as parquet
import pytest

from rethinker.config import ConfigError, RolloutConfig
from rethinker.curation import measure as measuring
from rethinker.curation.command import main
from rethinker.data.datasets import load_queries
from rethinker.embedded.tiny import create_tiny
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Completion, Observed
from rethinker.settings import resolve_config
from tests.data.virl39k import make_rows, write_fixture

SAMPLES, CHUNK = 4, 25
ROWS = {row["qid"]: row for row in make_rows(200)}


class TableEngine:
    """Answers question number n right about n // 3 % 5 times of 4, by the seed; notes what it was asked."""

    def __init__(self):
        self.asked: list[list[str]] = []
        self.seeds: list[int] = []
        self.dies_at: int | None = None

    def generate(self, prompts, *, n, max_new_tokens, temperature, seed):
        if self.dies_at is not None and len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append([prompt.query_id for prompt in prompts])
        self.seeds.append(seed)
        rng = np.random.default_rng(seed)
        return [
            [self._answer(prompt.query_id, rng.random() < int(prompt.query_id[-5:]) // 3 % 5 / 4) for _ in range(n)]
            for prompt in prompts
        ]

    def _answer(self, query_id, right):
        text = ROWS[query_id]["answer"] if right else "\\boxed{nothing like it}"
        return Completion([1, 2, 3], [0.0] * 3, text, "stop")

    def close(self):
        pass


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("curate")
    create_tiny(folder / "model", seed=0)
    write_fixture(folder, archive=True)
    (folder / "recipe.yaml").write_text(
        f"data:\n  train: {folder}/39Krelease.parquet\n  image_root: {folder}/images.zip\n  validation: null\n"
        "  fields: {images: image, id: qid}\n  min_pixels: 4096\n  max_pixels: 4096\n"
        f"policy: {{model: {folder}/model, dtype: float32}}\nrollout: {{max_new_tokens: 16}}\n"
    )
    return folder


@pytest.fixture
def curate(scratch, tmp_path, monkeypatch):
    """Runs the command on the fixture of 200 rows; returns the output folder."""
    engine = TableEngine()
    monkeypatch.setattr("rethinker.evaluation.answering.make_engine", lambda *args, **options: engine)
    monkeypatch.setattr(measuring, "CHUNK", CHUNK)

    def run(*options: str, output: str = "out") -> Path:
        arguments = [str(scratch / "recipe.yaml"), "--output", str(tmp_path / output), "--samples", str(SAMPLES)]

        assert main([*arguments, *options]) == 0
        return tmp_path / output

    run.engine = engine
    return run


def test_the_subset_trains_as_it_is(curate, capsys):
    """The rows keep their columns and get the pass rate; recipe.yaml loads them, with their images in the archive."""
    folder = curate("--size", "48")
    rows = parquet.read_table(folder / "subset.parquet").to_pylist()
    assert len(rows) == 48 and all(0 < row["pass_rate"] < 1 for row in rows)
    for row in rows:
        rate = row.pop("pass_rate")
        assert row == ROWS[row["qid"]] and rate * SAMPLES == round(rate * SAMPLES)
    counts = {category: sum(row["category"] == category for row in rows) for category in {r["category"] for r in rows}}
    assert len(counts) == 8 and set(counts.values()) == {6}
    config = resolve_config(folder / "recipe.yaml")
    assert config.rollout.sleep and config.rollout.gpu_memory_utilization == RolloutConfig.gpu_memory_utilization
    queries = load_queries(config.data, "train")
    assert [q.id for q in queries] == [row["qid"] for row in rows] and {len(q.images) for q in queries} == {0, 1, 2}
    printed = capsys.readouterr().out
    assert "48 questions" in printed and f"rethinker train {folder}/recipe.yaml" in printed and " 1 of 4 " in printed


def test_provenance(curate, scratch):
    """It names the model by its weights, the data by its content, versions, counts, date and command."""
    written = json.loads((curate("--size", "20000") / "provenance.json").read_text())
    assert written["model"] == str(scratch / "model") and len(written["model_version"]) == len("sha256 ") + 64
    assert len(written["data_sha256"]) == 64 and written["samples"] == SAMPLES
    assert written["questions"] == 200 and written["size_asked"] == 20_000
    assert written["subset"] == written["sometimes_right"] == 200 - written["always_wrong"] - written["always_right"]
    assert written["rollout.temperature"] == 1.0 and "torch" in written["versions"]
    assert written["date"].startswith("20") and written["command"][0] == "rethinker"


def test_a_killed_measurement_goes_on(curate):
    """Stopped in its fourth chunk, it asks that one and those after it, and ends with the same pass rates."""
    whole, seeds = curate(output="whole"), curate.engine.seeds
    assert len(set(seeds)) == 200 // CHUNK
    curate.engine.asked, curate.engine.seeds = [], []
    curate.engine.dies_at = 3
    with pytest.raises(KeyboardInterrupt):
        curate()
    curate.engine.dies_at = None
    folder = curate()
    assert curate.engine.seeds == seeds
    assert [ids[0] for ids in curate.engine.asked] == [f"Processed-{n:05d}" for n in range(0, 200, CHUNK)]
    for name in ("subset.parquet", "pass_rates.parquet"):
        assert parquet.read_table(folder / name).equals(parquet.read_table(whole / name))
    before = len(curate.engine.asked)
    again = parquet.read_table(curate("--size", "10") / "subset.parquet")
    assert again.num_rows == 10 and len(curate.engine.asked) == before  # only chosen again


def test_a_half_written_chunk_is_asked_again(curate):
    """What a kill leaves of a file that was being written does not count; a damaged chunk is named."""
    folder = curate()
    chunk = measuring.chunk_file(folder, 2)
    content = chunk.read_bytes()
    chunk.with_name(f".{chunk.name}.partial").write_bytes(content[:100])
    chunk.unlink()
    curate.engine.asked.clear()
    curate()
    assert len(curate.engine.asked) == 1 and chunk.read_bytes() == content
    chunk.write_bytes(content[:100])
    with pytest.raises(ConfigError, match=r"00002\.jsonl cannot be read .*remove it"):
        curate()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seed", "1"), r"seed=1 \(was 0\)"),
        (("--rollout.temperature", "0.5"), r"rollout\.temperature=0\.5 \(was 1\.0\)"),
        (("--limit", "100"), r"data_sha256="),
        (("--samples", "1"), r"--samples 1 must be at least 2"),
        (("--size", "many"), r"--size: invalid int value: 'many'"),
        (("--size", "0"), r"--size 0 must be at least 1"),
        (("--rollout.backend", "recorded", "--rollout.recording", "x"), r"rollout.backend=recorded has no new answers"),
        (("--policy.model", "./none"), r"policy\.model=\./none is not a folder"),
        (("--polcy.model", "x"), r"unknown setting 'polcy\.model'"),
    ],
)
def test_mistakes(curate, options, message):
    """A folder holds one measurement; what differs is named, and nothing is asked."""
    curate()
    curate.engine.asked.clear()
    with pytest.raises(ConfigError, match=message):
        curate(*options)
    assert not curate.engine.asked


def test_an_environment_answers(curate, monkeypatch):
    """The recipe's environment answers within a response and stays in the subset's recipe; lengths are of what the
    model said. In a folder that was measured with it, more turns or none are another measurement, and so is it in a
    folder without."""
    dialogue = SimpleNamespace(close=lambda: None)

    def heard(engine, given, queries, prompts, **sampling):
        assert given is dialogue
        answers = engine.generate(prompts, **sampling)
        return [[replace(one, observed=(Observed(1, 3, 0, calls=1),)) for one in group] for group in answers]

    plain = curate("--limit", "50", output="plain")
    monkeypatch.setattr("rethinker.evaluation.answering.Dialogue", lambda config, encoder: dialogue)
    monkeypatch.setattr("rethinker.evaluation.answering.respond", heard)
    crop = ("--environment.use", "[crop]", "--limit", "50")
    folder = curate(*crop)
    assert resolve_config(folder / "recipe.yaml").environment.use == ["crop"]
    rates, before = (parquet.read_table(one / "pass_rates.parquet").to_pylist() for one in (folder, plain))
    assert {row.pop("tokens") for row in rates} == {1.0} and {row.pop("tokens") for row in before} == {3.0}
    assert rates == before
    for options, output, message in (
        (crop[2:], "out", r"environment\.use=None \(was \['crop'\]\)"),
        ((*crop, "--environment.max_turns", "8"), "out", r"environment\.max_turns=8 \(was 4\)"),
        (crop, "plain", r"environment\.use=\['crop'\] \(was None\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            curate(*options, output=output)


def test_a_folder_with_other_files_is_left_alone(curate, tmp_path):
    """Curation writes into no folder that is not its own."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files"):
        curate()


def test_nothing_to_choose(curate):
    """A model that is never right: the pass rates are written, and the reason is said."""
    curate.engine._answer = lambda query_id, right: Completion([1], [0.0], "", "stop")
    with pytest.raises(ConfigError, match=r"answers no question sometimes.*always wrong 200"):
        curate()


def test_every_rank_sees_the_folder(curate, scratch, monkeypatch):
    """On disks of their own rank 0 would miss the others' part, after hours: the first question is not asked."""

    class OnAnotherNode(Ranks):
        def gather(self, value):
            return [value]

        def broadcast(self, value):
            return str(scratch / "model")

    other = contextlib.nullcontext(OnAnotherNode(1, 2, 0))
    monkeypatch.setattr("rethinker.evaluation.answering.ranks_of_torchrun", lambda timeout_s: other)
    with pytest.raises(ConfigError, match=r"--output \S+/out: a rank does not see it; choose a folder that all ranks"):
        curate()


def test_a_model_that_is_nowhere(curate):
    """A name that no hub and no cache has is a mistake as any other."""
    with pytest.raises(ConfigError, match=r"checkpoint me/none cannot be read: "):
        curate("--policy.model=me/none")
