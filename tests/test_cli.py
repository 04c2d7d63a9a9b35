"""The command: a mistake is one line on stderr and exit code 2, soon; what it prints can be used."""

from __future__ import annotations

import subprocess
import sys
import time
import types

import pytest
import yaml

import rethinker as package
from rethinker import cli
from rethinker.config import ConfigError


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "easy_vqa_cpu", "--train.max_step", "3"],
        ["train", "easy_vqa_cpu", "--train.batch_pairs", "500"],
        ["train", "no_such_recipe"],
    ],
)
def test_mistakes_end_in_one_line_and_code_2(rethinker, tmp_path, arguments):
    """A settings mistake: exit code 2 within 20 s, one line on stderr, nothing on stdout, nothing written."""
    start = time.monotonic()
    result = rethinker(*arguments)
    assert result.returncode == 2
    assert time.monotonic() - start < 20
    assert result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_torchrun_tells_a_mistake_once(tmp_path):
    """Under torchrun the ranks share a mistake: one of them says it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "rethinker", "train", "easy_vqa_cpu", "--train.max_step", "3"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert result.returncode != 0
    assert result.stderr.count("error: unknown setting 'train.max_step'") == 1
    assert "exitcode  : 2" in result.stderr


def test_other_ranks_wait_for_the_first_to_tell(monkeypatch, capsys):
    """A rank other than 0 waits before it tells a mistake: torchrun ends it meanwhile if rank 0 has the same one."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", "no_such_recipe"]) == 2
    assert waits == [3]
    assert capsys.readouterr().err.count("error: no recipe") == 2


def test_settings_are_checked_before_anything_slow_is_imported():
    """The command and the whole check of the settings import neither torch nor what builds on it."""
    code = (
        "import sys; from rethinker import cli, settings; settings.load_config('easy_vqa_cpu');"
        "print([m for m in ('torch', 'transformers', 'vllm', 'deepspeed', 'datasets') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "[]\n"


def test_a_mistake_found_while_training_starts_is_told_the_same_way(monkeypatch, capsys):
    """A ConfigError from the data or the model, of several lines even, is one line and code 2; a bug is a traceback."""

    def bad_data(recipe, overrides):
        raise ConfigError("data.train=x.parquet\nhas no column 'question'")

    monkeypatch.setattr(cli, "train", bad_data)
    assert cli.main(["train", "easy_vqa_cpu"]) == 2
    assert capsys.readouterr().err == "error: data.train=x.parquet has no column 'question'\n"

    monkeypatch.setattr(cli, "train", lambda recipe, overrides: [][0])
    with pytest.raises(IndexError):
        cli.main(["train", "easy_vqa_cpu"])

    seen = []
    monkeypatch.setattr(cli, "train", lambda *given: seen.append(given))
    assert cli.main(["train", "easy_vqa_cpu", "--train.max_steps", "5", "--replay.alpha=-1"]) == 0
    assert seen == [("easy_vqa_cpu", ["--train.max_steps", "5", "--replay.alpha=-1"])]


def test_print_config_prints_yaml_with_docs(capsys):
    """--print_config shows the resolved settings, documented, wherever it stands among the options."""
    assert cli.main(["train", "easy_vqa_cpu", "--print_config", "--train.max_steps", "20"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["train"]["max_steps"] == 20
    assert "# Stop after this many optimizer steps" in printed


def test_help_and_version(capsys):
    """Help lists the commands, the recipes and the presets; the version is the package's."""
    assert cli.main([]) == 0 and "rethinker doctor" in capsys.readouterr().out
    assert cli.main(["train", "--help"]) == 0
    listed = capsys.readouterr().out
    assert "easy_vqa_cpu" in listed and "released_code" in listed and "--print_config" in listed
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == f"rethinker {package.__version__}\n"


def test_unknown_commands(capsys):
    """A command that does not exist, and a train without a recipe, name what does."""
    assert cli.main(["trian"]) == 2
    assert "commands are train, plan, eval, curate, report, export, serve, doctor" in capsys.readouterr().err
    assert cli.main(["train"]) == 2 and "name a recipe first: crop_cpu, easy_vqa_cpu" in capsys.readouterr().err
    assert cli.main(["doctor", "now"]) == 2 and "takes no arguments" in capsys.readouterr().err


def test_doctor_here(capsys):
    """Where the tests run, training can run: doctor says so with exit code 0 and lists the parts' versions."""
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for part in ("python", "torch", "vllm", "deepspeed", "transformers", "C++ compiler", "memory", "disk"):
        assert part in printed
    assert "Training can run here" in printed


def test_doctor_names_what_is_missing(monkeypatch, capsys):
    """Without a part that training needs doctor ends with 1 and prints the command that adds it."""
    from rethinker import doctor

    found = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "vllm" else found(name))
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "Training cannot run here yet." in printed
    assert "pip install" in printed and "# vllm" in printed


def test_doctor_sees_a_containers_shared_memory(monkeypatch):
    """The 64 MB of /dev/shm that containers start with are named with their fix; they block nothing."""
    import shutil
    from pathlib import Path

    from rethinker import doctor

    usage = shutil.disk_usage
    small = types.SimpleNamespace(total=64 * 2**20, used=0, free=64 * 2**20)
    monkeypatch.setattr(Path, "is_dir", lambda self: True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: small if str(path) == "/dev/shm" else usage(path))
    finding = next(finding for finding in doctor._machine() if finding.part == "shared memory")
    assert not finding.ok and not finding.blocks and "--shm-size" in finding.fix
