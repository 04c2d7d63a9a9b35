"""The run's folder: what is written can be read back exactly, and a run that never started leaves nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rethinker.checkpoint.run_directory import RunDirectory
from rethinker.config import Config, ConfigError, RunConfig
from rethinker.data.datasets import BadRowError
from rethinker.runtime import completions
from rethinker.runtime.completions import read_completions, write_completions
from rethinker.samples import Accuracy, Completion, Group, Query, Rethought
from rethinker.settings import resolve_config


@pytest.fixture
def config(tmp_path):
    return Config(run=RunConfig(dir=str(tmp_path / "a" / "runs"), name="x", trackers=[]))


def groups() -> list[Group]:
    """Groups with everything that is hard to store: NaN, tiny and long floats, bytes, no image, no token, odd text."""
    third = float(np.float32(-1 / 3))
    rethought = Completion(
        [5, 6, 7], [third, math.nan, -0.0], "a\nWait", "stop", Rethought(1, 2, "self_correction", 0, 2)
    )
    empty = Completion([], [], "", "stop")
    long = Completion(
        [2**31 - 1, 0], [-1e-38, -700.123456789], "\\boxed{é\U0001f600}\x00", "length", None, [third, math.nan]
    )
    first = Query("q/1", "<image>Which?", "red", ("images/1.png",), {"category": "color", "n": [1, None]})
    pixels = {"path": "b.png", "bytes": bytes(range(256))}
    second = Query("q2", "", "", (pixels, "c.png"))
    third_query = Query("q/1", "the same id again", "yes")
    known = {"prompt_tokens": 17, "rewards": [1.0, 0.0], "advantages": [0.7071067811865475, -0.7]}
    return [
        Group(first, [rethought, empty], 3, **known, scores={"z": [1 / 3, -0.0], "a": [1e-300, 1.0]}),
        Group(third_query, [long], 0, rewards=[0.25], advantages=[0.0], scores={"boxed": [0.25]}),
        Group(second, [long, empty], 3),
    ]


def same(a, b) -> bool:
    """Equality in which NaN equals NaN and 0.0 differs from -0.0."""
    return repr(a) == repr(b)


def test_completions_come_back_exactly(tmp_path):
    """Token ids, log-probs (NaN, -0.0), texts, images, rewards: reading gives the very groups that were written."""
    write_completions(tmp_path, 7, groups())
    assert [path.name for path in tmp_path.iterdir()] == ["episode_00007.parquet"]
    assert same(read_completions(tmp_path, 7), groups())


def test_the_answers_of_a_validation_are_like_completions(config):
    """They lie beside the episodes by step, and hold the very groups; a file that cannot be written is named."""
    with RunDirectory(config) as run:
        run.open_logs({})
        run.write_validation(40, [])
        run.write_validation(40, groups())
        file = run.folder / "validation" / "step_000040.parquet"
        file.rename(run.folder / "completions" / "episode_00000.parquet")
        assert same(read_completions(run.folder / "completions", 0), groups())
        file.mkdir()
        with pytest.raises(ConfigError, match=r"run.dir=.*step_000040.parquet cannot be written"):
            run.write_validation(40, groups())


def test_the_table_is_one_row_per_completion(tmp_path):
    """Any parquet reader sees a row per completion with its question, text and reward; image bytes are stored once."""
    import pyarrow.parquet as pq

    write_completions(tmp_path, 0, groups())
    rows = pq.read_table(tmp_path / "episode_00000.parquet").to_pylist()
    assert [(r["episode"], r["group"], r["index"], r["query_id"]) for r in rows] == [
        (0, 0, 0, "q/1"),
        (0, 0, 1, "q/1"),
        (0, 1, 0, "q/1"),
        (0, 2, 0, "q2"),
        (0, 2, 1, "q2"),
    ]
    assert rows[0]["response"] == "a\nWait" and rows[0]["reward"] == 1.0 and rows[0]["finish_reason"] == "stop"
    assert rows[3]["images"][0]["bytes"] and not rows[4]["images"][0]["bytes"]
    assert rows[3]["reward"] is None


def test_an_episode_without_groups(tmp_path):
    """An empty episode is written and read as such."""
    write_completions(tmp_path, 0, [])
    assert read_completions(tmp_path, 0) == []


def test_completions_of_an_older_release_are_read(tmp_path):
    """It had no scores."""
    import pyarrow.parquet as pq

    write_completions(tmp_path, 0, groups())
    file = tmp_path / "episode_00000.parquet"
    pq.write_table(pq.read_table(file).drop_columns(["scores"]), file)
    expected = groups()
    for group in expected:
        group.scores = {}
    assert same(read_completions(tmp_path, 0), expected)


def test_recordings_that_cannot_be_read(tmp_path):
    """A missing episode and a foreign file are refused by the setting's name."""
    (tmp_path / "episode_00001.parquet").write_bytes(b"not parquet")
    for episode in (0, 1):
        with pytest.raises(ConfigError, match="rollout.recording="):
            read_completions(tmp_path, episode)


def test_metrics_are_flushed_line_by_line(config):
    """Each step's line is on disk at once, as strict JSON: scalars unwrapped, non-finite numbers null."""
    with RunDirectory(config) as run:
        run.open_logs({})
        run.log({"step": 1, "loss": torch.tensor(0.5), "reward_mean": np.float32(0.25), "kl": None})
        lines = (run.folder / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"step": 1, "loss": 0.5, "reward_mean": 0.25, "kl": None}]
        run.log({"step": 2, "loss": math.nan, "reward_by_category": {"a": np.float32(0.5), "b": math.nan}})
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == {"step": 2, "loss": None, "reward_by_category": {"a": 0.5, "b": None}}


def test_the_folder_holds_its_settings(tmp_path, monkeypatch):
    """config.yaml repeats the run: read as a recipe it gives the same settings."""
    monkeypatch.chdir(tmp_path)
    config = resolve_config("easy_vqa_cpu", {"run.name": "x", "run.trackers": []})
    with RunDirectory(config) as run:
        run.open_logs({})
        assert {path.name for path in run.folder.iterdir()} == {
            "config.yaml",
            "metrics.jsonl",
            "validation.jsonl",
            "completions",
            "checkpoints",
        }
        assert resolve_config(run.folder / "config.yaml") == config


def test_a_run_never_writes_into_another(config):
    """A second run of the same name is refused, and the first one's files stay as they are."""
    with RunDirectory(config) as run:
        run.open_logs({})
        run.log({"step": 1})
    with pytest.raises(ConfigError, match="choose another run.name"):
        RunDirectory(config)
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_run_that_never_started_leaves_nothing(config, tmp_path):
    """An error while the folder keeps nothing removes it; what was sampled before a first step that failed is kept."""
    for error in (RuntimeError("no engine"), KeyboardInterrupt(), BadRowError("images", "a kind of ConfigError")):
        with pytest.raises(type(error)), RunDirectory(config):
            raise error
        assert list((tmp_path / "a" / "runs").iterdir()) == []
    with pytest.raises(ConfigError), RunDirectory(config) as run:
        run.write_completions(0, groups())
        raise ConfigError("algorithm.loss=...: in step 1")
    assert read_completions(run.folder / "completions", 0)


def test_a_folder_that_cannot_be_written_is_one_line(config):
    """A file where a folder should be, when a run is continued, or a disk that takes none (here /proc): run.dir is
    named, and of a new run nothing is left."""
    with RunDirectory(config) as run:
        run.open_logs({})
        run.log({"step": 1})
    (run.folder / "checkpoints").rmdir()
    (run.folder / "checkpoints").write_text("")
    elsewhere = Config(run=RunConfig(dir="/proc/runs", name="x", trackers=[]))
    for settings in (dataclasses.replace(config, resume="auto"), elsewhere):
        with pytest.raises(ConfigError, match=r"^run\.dir=.*: the run's folder cannot be written .*choose") as error:
            RunDirectory(settings).__enter__()
        assert "\n" not in str(error.value)
    assert (run.folder / "metrics.jsonl").is_file()


def test_a_run_with_steps_is_kept_whatever_happens(config):
    """Once a step is logged, an error leaves everything in place."""
    with pytest.raises(ConfigError), RunDirectory(config) as run:
        run.open_logs({})
        run.log({"step": 1})
        raise ConfigError("late")
    assert (run.folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_other_ranks_write_nothing(config, tmp_path):
    """With enabled=False every call is accepted and the disk stays untouched."""
    with RunDirectory(config, enabled=False) as run:
        run.open_logs({})
        run.log({"step": 1})
        run.write_completions(0, groups())
        run.write_validation(0, groups())
        assert run.open_logs(run.state_dict()) == []
    assert list(tmp_path.iterdir()) == []


def test_the_position_can_be_taken_up_again(config):
    """Going back to a stored position drops later lines and episodes; the next line follows the stored one."""
    accuracy = Accuracy(0.5, {}, 2, right="01", asked="these")
    with RunDirectory(config) as run:
        run.open_logs({})
        run.log_validation(0, accuracy)
        run.write_completions(0, groups())
        run.log({"step": 1})
        state = json.loads(json.dumps(run.state_dict()))
        run.log({"step": 2, "loss": 0.123456789})
        run.log_validation(2, accuracy)
        run.write_completions(1, groups())
        for step in (0, 1, 2):
            run.write_validation(step, groups())
    config.resume = "auto"
    with RunDirectory(config) as run:
        assert run.open_logs(state) == [{"step": 1}]
        run.log({"step": 2, "loss": 0.25})
    lines = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2, "loss": 0.25}]
    (validation,) = map(json.loads, (run.folder / "validation.jsonl").read_text().splitlines())
    assert (validation["step"], validation["right"], validation["asked"]) == (0, "01", "these")
    assert [path.name for path in (run.folder / "completions").iterdir()] == ["episode_00000.parquet"]
    kept = sorted(path.name for path in (run.folder / "validation").iterdir())
    assert kept == ["step_000000.parquet", "step_000001.parquet"]
    assert "resume: null" in (run.folder / "config.yaml").read_text()


def test_a_log_that_lost_lines_is_refused(config):
    """A log shorter than at the checkpoint would silently miss steps: it is an error that names the file."""
    with RunDirectory(config) as run:
        run.open_logs({})
        run.log({"step": 1})
        state = run.state_dict()
    (run.folder / "metrics.jsonl").write_text("")
    config.resume = "auto"
    with pytest.raises(ConfigError, match=r"resume: .*metrics.jsonl has 0 bytes and had"), RunDirectory(config) as run:
        run.open_logs(state)


def test_a_line_is_one_write(config, monkeypatch):
    """A row reaches the file in one write, whole with its line break, so no reader ever meets a part of one."""
    with RunDirectory(config) as run:
        run.open_logs({})
        run.log({"step": 1, "loss": 0.5})
        assert (run.folder / "metrics.jsonl").read_bytes().endswith(b"}\n")  # without a flush
        written = []
        file = SimpleNamespace(write=lambda b: written.append(b) or len(b), close=list)
        monkeypatch.setitem(run._logs, "metrics.jsonl", file)
        run.log({"step": 2, "loss": 0.25})
    assert written == [b'{"step": 2, "loss": 0.25}\n']


def test_a_full_disk_is_named(config):
    """What the operating system refuses to write (here /dev/full: no space left) is one error with the setting."""
    with RunDirectory(config) as run:
        run.open_logs({})
        with open("/dev/full", "ab", buffering=0) as full:
            run._logs["metrics.jsonl"].close()
            run._logs["metrics.jsonl"] = full
            with pytest.raises(ConfigError, match=r"run.dir=.*No space left on device.*--resume auto"):
                run.log({"step": 1})


def test_a_full_disk_while_completions_are_written(config, monkeypatch):
    """The same for an episode's parquet file, and a later reader does not find half a file."""
    with RunDirectory(config) as run:
        run.open_logs({})
        run.log({"step": 1})
        full = run.folder / "full"
        full.symlink_to("/dev/full")  # a link, since pyarrow removes what it could not write
        monkeypatch.setattr(completions, "whole_file", lambda path: contextlib.nullcontext(full))
        with pytest.raises(ConfigError, match=r"run.dir=.*episode_00000.parquet cannot be written.*No space left"):
            run.write_completions(0, groups())
    assert not list((run.folder / "completions").glob("*.parquet"))
