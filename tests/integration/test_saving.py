"""What a run leaves where saving fails, before the first step and after it, on one rank and on two."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from rethinker import cli
from rethinker.export import export
from rethinker.policy.loading import load_model, load_processor
from tests.forked import Forked
from tests.integration.interruptions import arguments_of, finish, prepare, rows

SHORT = ("--rollout.backend", "hf", "--train.max_steps", "2", "--checkpoint.every", "1")
SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """A model whose generation settings transformers loads and does not save, as many on the hub."""
    folder = tmp_path_factory.mktemp("saving")
    prepare(folder)
    file = folder / "model" / "generation_config.json"
    settings = json.loads(file.read_text()) | SAMPLING
    del settings["do_sample"]
    file.write_text(json.dumps(settings))
    return folder


def faulty(target: str, rank: int, after: int, result: int | None, arguments: list[str]) -> int:
    """`rethinker train` in which a function fails on one rank after so many good calls, or returns a number then."""
    real, calls = pkgutil.resolve_name(target), []

    def fails(*args, **kwargs):
        calls.append(1)
        if os.environ["RANK"] == str(rank) and len(calls) > after:
            if result is None:
                raise OSError(28, "No space left on device")
            return result
        return real(*args, **kwargs)

    with mock.patch(target, fails):
        return cli.main(["train", *arguments])


def run_with(
    scratch: Path, name: str, target: str, rank: int = 0, after: int = 0, result: int | None = None
) -> tuple[int, str]:
    """A run on two ranks with a fault: its exit code, within a minute, and what it said."""
    log = scratch / f"{name}.log"
    process = Forked(partial(faulty, target, rank, after, result, arguments_of(scratch, name, *SHORT)), log, ranks=2)
    try:
        return process.wait(60), log.read_text()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_model_that_transformers_would_not_save(scratch):
    """A temperature without do_sample: checkpoints are written, resumed from, exported, and say what the model said."""
    finish(scratch, "plain", *SHORT)
    last = scratch / "plain" / "checkpoints" / "last"
    assert last.resolve().name == "step_000002"
    for folder in (last, export(scratch / "plain", scratch / "exported")):
        settings = json.loads((folder / "generation_config.json").read_text())
        assert settings == json.loads((scratch / "model" / "generation_config.json").read_text())
        assert load_model(folder, torch.float32) and load_processor(folder)
    finish(scratch, "plain", *SHORT, "--train.max_steps", "3", "--resume", "auto")
    assert [row["step"] for row in rows(scratch / "plain")] == [1, 2, 3]
    assert [row["failed_checkpoints"] for row in rows(scratch / "plain")] == [0] * 3


@pytest.mark.parametrize(
    ("target", "result", "words"),
    [
        ("transformers.Qwen2_5_VLProcessor.save_pretrained", None, "a saved model's processor cannot be written there"),
        ("rethinker.policy.saved_model.save_files", None, "run.dir: no checkpoint can be written in"),
        ("rethinker.checkpoint.resume.random_state", None, "run.dir: no checkpoint can be written in"),
        ("rethinker.policy.engine.PolicyEngine.checkpoint_bytes", 2**60, "GB of the disk are free"),
    ],
)
def test_what_saving_needs_is_tried_before_the_first_step(scratch, target, result, words):
    """A fault of rank 0 alone ends both ranks, each with one line, with nothing trained and nothing left."""
    name = target.rpartition(".")[2]
    code, log = run_with(scratch, name, target, result=result)
    assert code != 0 and "Traceback" not in log and not (scratch / name).exists()
    assert len([line for line in log.splitlines() if line.startswith("error: ") and words in line]) == 2


def test_a_save_that_fails_later_keeps_the_weights(scratch):
    """A rank's disk is full from the second checkpoint on: the run goes on to its end, says so, and the weights of its
    end are there, beside the whole checkpoint that it can be resumed from."""
    code, log = run_with(scratch, "late", "rethinker.policy.optimizer_state.save_file", rank=1, after=1)
    folder = scratch / "late" / "checkpoints"
    assert code != 0 and "its model alone is in model_000002" in log and "Traceback" not in log
    assert [row["step"] for row in rows(scratch / "late")] == [1, 2]
    assert {path.name for path in folder.iterdir()} >= {"last", "step_000001", "model_000002"}
    assert (folder / "last").resolve().name == "step_000001" and not (folder / "step_000002").exists()
    trained = load_model(folder / "model_000002", torch.float32)
    assert load_processor(folder / "model_000002")
    before = dict(load_model(folder / "last", torch.float32).named_parameters())
    assert any(not torch.equal(p, before[name]) for name, p in trained.named_parameters())
