"""`rethinker export`: a folder that loads, a card with the run's own numbers, and nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from rethinker.config import ConfigError
from rethinker.embedded.tiny import create_tiny
from rethinker.export import export, model_card
from rethinker.policy.loading import load_model, load_processor
from rethinker.report.runs import read_run
from tests.report.examples import write_run


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = write_run(tmp_path / "runs" / "mine", accuracies={0: 0.25, 4: 0.75, 8: 0.5})
    for number, name in enumerate(("step_000008", "best_000004")):
        create_tiny(folder / "checkpoints" / name, seed=number)
        (folder / "checkpoints" / name / "COMPLETE").write_text("{}")
        (folder / "checkpoints" / name / "trainer").mkdir()
        (folder / "checkpoints" / name / "trainer" / "optimizer_00000.safetensors").write_bytes(b"x")
    for link, name in (("last", "step_000008"), ("best", "best_000004")):
        path = folder / "checkpoints" / link
        if path.is_dir():
            path.rmdir()
        path.symlink_to(name)
    return folder


def test_the_folder_is_the_checkpoint_without_the_trainer(run):
    """Weights and processor load and are those of the best checkpoint; optimizer and marker stay behind."""
    folder = export(run)
    assert folder == Path("exports/mine")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "learning.png", "rethinker.yaml"} <= names
    assert not names & {"COMPLETE", "trainer", "step_000008"}
    model, best = (load_model(f, torch.float32).state_dict() for f in (folder, run / "checkpoints" / "best_000004"))
    assert all(torch.equal(model[name], best[name]) for name in best)
    assert load_processor(folder).tokenizer("red").input_ids
    assert {path.name for path in Path("exports").iterdir()} == {"mine"}


def test_a_checkpoint_by_name(run):
    """--checkpoint takes that one; one that is not there is named with those that are, and a path is no name."""
    export(run, "out", "step_000008")
    model, last = (load_model(f, torch.float32).state_dict() for f in (Path("out"), run / "checkpoints" / "last"))
    assert all(torch.equal(model[name], last[name]) for name in last)
    for name in ("step_000004", "../../elsewhere"):
        with pytest.raises(ConfigError, match=r"has no checkpoint .*; it has best, best_000004, last, step_000008"):
            export(run, "other", name)
    assert not Path("other").exists()


def test_the_card_says_what_was_trained(run):
    """Front matter the hub reads; accuracy, steps, changed settings from the run's own files."""
    folder = export(run)
    card = (folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["library_name"] == "transformers" and header["pipeline_tag"] == "image-text-to-text"
    record = read_run(run)
    values = record.series("val_accuracy")
    assert f"{values.iloc[0]:.3f} to {values.iloc[-1]:.3f}" in card
    assert f"| Steps | {values.index.max()}" in card and "vllm serve" in card and "(learning.png)" in card


def test_a_lora_run_has_its_adapters(run):
    """The adapters are in the folder, and the card says rank, alpha and that the weights are merged; else neither."""
    assert not (export(run) / "adapter").exists() and "LoRA" not in Path("exports/mine/README.md").read_text()
    adapter = run / "checkpoints" / "best_000004" / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text(name)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["policy"]["lora"] = {"rank": 8, "alpha": 24.0}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    folder = export(run, "with_adapters")
    assert {path.name for path in (folder / "adapter").iterdir()} == {path.name for path in adapter.iterdir()}
    card = (folder / "README.md").read_text()
    assert "LoRA (rank 8, alpha 24.0)" in card and "merged" in card


def test_a_card_runs_nothing(run):
    """A name or setting with Markdown or HTML in it is shown as it is spelled."""
    record = read_run(run)
    evil = "<script>alert(1)</script>|[x](javascript:1)"
    record.settings["policy.model"] = evil
    card = model_card(record, "best_000004")
    assert "<script>" not in card and "[x]" not in card and r"\<script\>" in card and r"\[x\](" in card


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(28, "No space left on device"), (ConfigError, "--output new cannot be written: .*No space left")),
        (ValueError("no such colour"), (ValueError, "no such colour")),
    ],
)
def test_nothing_is_overwritten_or_left(run, monkeypatch, error, seen):
    """A folder that is there is an error; a full disk, or whatever ends it halfway, leaves no half folder."""
    Path("taken").mkdir()
    with pytest.raises(ConfigError, match="--output taken exists"):
        export(run, "taken")

    def fail(*_, **__):
        assert Path(".new.partial").exists()
        raise error

    monkeypatch.setattr("rethinker.export.learning_curve", fail)
    with pytest.raises(seen[0], match=seen[1]):
        export(run, "new")
    assert not Path("new").exists() and not Path(".new.partial").exists()
