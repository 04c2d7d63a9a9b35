"""`rethinker eval` as a user types it: a foreign checkpoint through real vLLM, and every mistake as one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace

import pyarrow.parquet as parquet
import pytest
import yaml

from rethinker import cli
from rethinker.config import ConfigError, RethinkConfig
from rethinker.evaluation import command
from rethinker.evaluation.command import find_checkpoint, parse
from rethinker.evaluation.settings import eval_config, recorded, run_settings
from rethinker.families import SUPPORTED
from rethinker.settings import resolve_config, to_yaml
from tests.rollout.dialogues import model_whose_turns_end

SMALL = ["--data.min_pixels", "4096", "--data.max_pixels", "4096", "--rollout.max_new_tokens", "12"]
SMALL += ["--rollout.kv_cache_gb", "0.25", "--policy.dtype", "float32"]


def test_a_foreign_checkpoint_through_vllm_and_hf(checkpoint, rethinker, tmp_path, capsys):
    """A folder of transformers' save_pretrained: two benchmarks and forced rethinking in vLLM; transformers' generate
    gives the same tokens; the results compare."""
    arguments = ["eval", str(checkpoint), "--limit", "6", *SMALL]
    forced = ["--benchmark", "digits,easy_vqa", "--mode", "forced"]
    result = rethinker(*arguments, *forced, timeout=200)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    folder = tmp_path / "evaluations/qwen/digits-forced"
    assert f"result.json in {folder.relative_to(tmp_path)}" in result.stdout
    assert "easy-VQA test, mode forced" in result.stdout and "second pass on 6 answers" in result.stdout
    written = json.loads((folder / "result.json").read_text())
    assert written["questions"] == 6 and written["mode"] == "forced" and written["model"] == str(checkpoint)
    assert {"torch", "transformers", "rethinker"} <= written["versions"].keys()
    rows = parquet.read_table(folder / "responses.parquet").to_pylist()
    assert all(row["trigger"] and row["trigger_end"] > row["trigger_start"] for row in rows)

    # The same in this process: vLLM's first answers are transformers' first answers, token for token.
    command.main([*arguments[1:], "--benchmark=digits", "--rollout.backend=hf", f"--output={tmp_path / 'plain'}"])
    plain = parquet.read_table(tmp_path / "plain/responses.parquet").to_pylist()
    assert [row["query_id"] for row in plain] == [row["query_id"] for row in rows]
    for ours, theirs in zip(rows, plain, strict=True):
        end = ours["trigger_start"]
        assert ours["token_ids"][:end] == theirs["token_ids"][:end] and end >= len(theirs["token_ids"]) - 1
        assert ours["first_response"] == theirs["response"]
    capsys.readouterr()
    assert cli.main(["eval", "--compare", str(tmp_path / "plain"), str(folder)]) == 0
    compared = capsys.readouterr().out
    assert "the same 6 questions" in compared and "note: rollout.backend differs" in compared


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--benchmark", "mathvist"], "--benchmark mathvist: did you mean mathvista? known are digits"),
        (["x"], "the following arguments are required: --benchmark"),
        (["x", "--benchmark", ","], "name a benchmark: digits, easy_vqa"),
        (["--benchmark", "digits"], "name the checkpoint first"),
        (["--data.prompt", "{question}", "--benchmark", "digits", "x"], "name the checkpoint first"),
        (
            ["runs/none/checkpoints/best", "--benchmark", "digits"],
            "checkpoint runs/none/checkpoints/best is not a folder",
        ),
        (["Qwen/x", "y", "--benchmark", "digits"], "unexpected argument 'y'"),
        (
            ["x", "--benchmark", "digits", "--mode", "fast"],
            "argument --mode: invalid choice: 'fast'",
        ),
        (["x", "--benchmark", "digits", "--limit", "0"], "--limit 0: give a number"),
        (["x", "--benchmark", "digits", "--limit"], "argument --limit: expected one argument"),
        (["Qwen/x", "--benchmark", "digits", "--bench", "1"], "unknown setting 'bench'"),
        (
            ["Qwen/x", "--benchmark", "digits", "--mode", "oracle", "--environment.use", "[crop]"],
            "--mode oracle goes on behind a response's end, and environment.use=['crop'] makes",
        ),
        (["--compare", "a"], "--compare needs at least two result folders"),
        (["--compare", "--mode", "forced"], "--mode holds no result.json: give the folder"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    """Exit code 2, one line that names the argument, and nothing written."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["eval", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1 and captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_mistakes_about_a_checkpoint_and_settings(checkpoint, capsys, tmp_path, monkeypatch):
    """Answers longer than the model, another model, folders in use: named before any engine."""
    monkeypatch.chdir(tmp_path)

    def error_of(*arguments: str) -> str:
        small = [
            "--limit",
            "1",
            "--data.min_pixels=4096",
            "--data.max_pixels=4096",
        ]  # quick even where this law is broken
        assert cli.main(["eval", *arguments, *small, "--benchmark", "digits"]) == 2
        return capsys.readouterr().err

    here = str(checkpoint)
    assert "unknown setting 'data.promt': did you mean 'data.prompt'?" in error_of(here, "--data.promt", "x")
    assert "rollout.backend=recorded" in error_of(here, "--rollout.backend", "recorded")
    assert "rollout.max_new_tokens=4096 leaves no room for a prompt" in error_of(
        here, "--rollout.max_new_tokens", "4096"
    )
    assert "leaves no room" in error_of(here, "--mode", "forced", "--rollout.max_new_tokens", "2048")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "llama"}')
    assert "checkpoint other is a 'llama' model; supported: " + SUPPORTED in error_of("other")
    (other / "model.safetensors").write_bytes(b"x" * 20)
    assert "checkpoint ./other is a 'llama' model; supported: " + SUPPORTED in error_of("./other")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    assert "--output taken holds files already" in error_of(here, "--output", "taken")
    for below in ("taken/file", "taken/file/results"):  # known now, and not after hours of answers
        assert f"--output {below}: {tmp_path}/taken/file is no folder" in error_of(here, "--output", below)
    (tmp_path / "digits.yaml").write_text("{title: Digits, data: digits}")
    assert "two of digits, digits share a name" in error_of(here, "--benchmark", "digits.yaml")
    assert "--data x is for one --benchmark" in error_of(here, "--data", "x", "--benchmark", "easy_vqa")


def test_the_checkpoint_is_found_or_named(tmp_path, monkeypatch):
    """A run's folder leads to its best checkpoint; a Hugging Face name passes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a/checkpoints/best").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"runs/a is a run's folder; did you mean runs/a/checkpoints/best\?"):
        find_checkpoint("runs/a")
    with pytest.raises(ConfigError, match=r"checkpoint runs/a/checkpoints/bset is not a folder"):
        find_checkpoint("runs/a/checkpoints/bset")
    assert find_checkpoint("Qwen/Qwen2.5-VL-3B-Instruct") == "Qwen/Qwen2.5-VL-3B-Instruct"


def test_a_runs_checkpoint_is_asked_as_the_run_asked_it(checkpoint, tmp_path):
    """Prompt, pixel limits, length and rules come from the run's config.yaml; the command line has the last word."""
    best = tmp_path / "run/checkpoints/best"
    best.mkdir(parents=True)
    settings = {"data": {"prompt": "{question}\nThink: {x}", "min_pixels": 4096, "max_pixels": 8192, "train": "digits"}}
    settings["data"]["chat_template_kwargs"] = {"enable_thinking": False}
    settings |= {"rollout": {"max_new_tokens": 24, "backend": "hf", "group_size": 4}, "train": {"unknown": 1}}
    settings |= {"reward": {"percent": False, "rounding": 0.05, "function": "mine.py:f"}}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings))
    config = eval_config(str(best), ["--rollout.max_new_tokens=48"])
    assert config.data.prompt == "{question}\nThink: {x}" and config.data.max_pixels == 8192
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert config.rollout.max_new_tokens == 48 and config.rollout.backend == "hf"
    assert (config.reward.percent, config.reward.rounding, config.reward.function) == (False, 0.05, "boxed")
    assert config.rollout.group_size == 8 and config.policy.model == str(best)
    assert run_settings(str(checkpoint)) == {}
    assert eval_config(str(checkpoint), []).rollout.gpu_memory_utilization == 0.9


LOOK = """
from PIL import Image
from rethinker.environments import Observation

def look(state, text):
    state["turns"] = state.get("turns", 0) + 1
    shown = Image.new("RGB", (64, 48), "red")
    again = Observation("<image> again", images=[shown], calls=1, failures=("blur",))
    return again if state["turns"] == 1 else Observation(done=True)
"""


def test_an_environment_at_test_time(tmp_path, capsys, monkeypatch):
    """A function of the user's shows each response an image; tools that nobody calls leave it at one turn. Both are in
    the table's last lines, in result.json and beside every response."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "look.py").write_text(LOOK)
    model = model_whose_turns_end(tmp_path / "model")
    asked = [
        str(model),
        "--benchmark=digits",
        "--limit=4",
        "--rollout.backend=hf",
        *SMALL,
        "--rollout.max_new_tokens=96",
    ]
    told = {}
    for use, turns, calls, failures in (("look.py:look", 2, 1, ["blur"]), ("crop", 1, 0, [])):
        folder = tmp_path / use[:4]
        command.main([*asked, f"--environment.use=[{use}]", f"--output={folder}"])
        rows = parquet.read_table(folder / "responses.parquet").to_pylist()
        assert [(row["turns"], row["calls"], row["failures"]) for row in rows] == [(turns, calls, failures)] * 4
        told[use] = json.loads((folder / "result.json").read_text())
        assert told[use]["environment"]["turns_mean"] == turns and told[use]["settings"]["environment.use"] == [use]
        assert f"environment: {turns}.00 turns and {calls}.00 tool calls per answer" in capsys.readouterr().out
    assert (
        told["look.py:look"]["environment"]["failures"] == {"blur": 4} and told["crop"]["environment"]["failures"] == {}
    )


def test_a_runs_environment_is_inherited_and_recorded(tmp_path):
    """The tools that answered the run's policy answer its checkpoint, and stand in the result with what shapes their
    answers; its reward's weight stays behind. Without them nothing is recorded."""
    best = tmp_path / "run/checkpoints/best"
    best.mkdir(parents=True)
    run = resolve_config("easy_vqa_cpu", ["--environment.use=[crop]", "--environment.boxes=thousandths"])
    run.environment.max_turns, run.environment.workers, run.environment.reward_weight = 7, 2, 0.5
    (tmp_path / "run/config.yaml").write_text(to_yaml(run))
    config = eval_config(str(best), [])
    assert config.environment == replace(run.environment, reward_weight=0.0)
    written = {name: value for name, value in recorded(config).items() if name.startswith("environment.")}
    assert written.pop("environment.use") == ["crop"] and written.pop("environment.boxes") == "thousandths"
    kept = {"use", "boxes", "workers", "reward_weight"}
    assert written == {f"environment.{k}": v for k, v in vars(run.environment).items() if k not in kept}
    plain = eval_config(str(best), ["--environment.use", "[]"])
    assert plain.environment.use == [] and not any(name.startswith("environment.") for name in recorded(plain))


def test_a_runs_code_is_named_again(tmp_path):
    """A folder from elsewhere may name any file of this machine: an environment is run only if the command says so."""
    best, file = tmp_path / "run/checkpoints/best", tmp_path / "mine.py"
    best.mkdir(parents=True)
    file.write_text("def look(state, text): ...")
    mine = f"[{file}:look]"
    run = resolve_config("easy_vqa_cpu", [f"--environment.use={mine}", "--environment.max_turns=7"])
    (tmp_path / "run/config.yaml").write_text(to_yaml(run))
    with pytest.raises(ConfigError, match=rf"give --environment.use '{re.escape(mine)}', or '\[\]'"):
        eval_config(str(best), [])
    for given in (mine, "[]"):
        for overrides in ([f"--environment.use={given}"], ["--environment.use", given]):
            assert eval_config(str(best), overrides).environment.max_turns == 7


def test_what_verify_says_is_inherited(tmp_path):
    """A run with `verify` asks its checkpoint by its own triggers, to the letter; no other run's triggers are taken."""
    best = tmp_path / "run/checkpoints/best"
    best.mkdir(parents=True)
    own = {**RethinkConfig().triggers, "doubt": '\n\nno: "Hm" é 😀 {x} ', "self_correction": " yes"}
    for use in (["verify"], ["crop"]):
        run = resolve_config("easy_vqa_cpu", [f"--environment.use={use}"])
        run.rethink.triggers = own
        (tmp_path / "run/config.yaml").write_text(to_yaml(run))
        config = eval_config(str(best), [])
        asked = use == ["verify"]
        assert config.rethink.triggers == (own if asked else RethinkConfig().triggers)
        assert recorded(config).get("rethink.triggers") == (own if asked else None)


def test_benchmarks_are_named_in_any_way():
    """Repeated, separated by commas, or both; each once."""
    options, overrides = parse(["x", "--benchmark", "digits,easy_vqa", "--benchmark=mmmu", "--benchmark", "digits"])
    assert options.benchmark == ["digits", "easy_vqa", "mmmu"] and overrides == []


def test_help_and_checks_import_nothing_slow(capsys):
    """The help lists every benchmark; it and every check of the arguments run before torch is imported."""
    assert cli.main(["eval", "--help"]) == 0
    text = capsys.readouterr().out
    assert "mathvista" in text and "--rollout.backend" in text and "{" not in text
    code = (
        "import sys; from rethinker import cli; cli.main(['eval', 'x/y/z', '--benchmark', 'digits']);"
        "print([m for m in ('torch', 'transformers', 'vllm', 'PIL', 'pyarrow', 'sklearn') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "[]\n"
