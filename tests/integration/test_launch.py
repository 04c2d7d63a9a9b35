"""The launch files: under a stand-in for Slurm's commands, with real torchrun and real ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.interruptions import OPTIONS, ROOT, prepare, rows, wait_for

LAUNCH = ROOT / "rethinker" / "recipes" / "launch"

# Slurm's commands as far as slurm.sh uses them, for one node that is this machine.
SRUN = """#!/bin/sh
while :; do case "$1" in --*) shift ;; *) break ;; esac; done
exec "$@"
"""
SCONTROL = """#!/bin/sh
[ "$1" = requeue ] && echo "$2" > "$QUEUE"
[ "$1" = show ] && echo localhost
exit 0
"""


@pytest.fixture
def slurm(tmp_path):
    """A folder to run in, and the environment of a Slurm job with two GPUs' worth of ranks."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = {"SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_ID": "77"}
    return tmp_path, os.environ | job | {"PATH": path, "QUEUE": str(tmp_path / "requeued")}


def arguments(folder: Path) -> list[str]:
    return [
        *("easy_vqa_cpu", "--run.name", "job", "--run.dir", str(folder), "--policy.model", str(folder / "model")),
        *("--data.train", str(folder / "questions.jsonl"), "--data.category_weights", "{}"),
        *("--reward.function", f"{folder / 'reward.py'}:parity", *OPTIONS),
    ]


def test_a_job_needs_a_name(slurm):
    """Without --run.name the next job would not find the run: refused before anything starts."""
    environment = slurm[1]
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sh", "easy_vqa_cpu"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and "give --run.name NAME" in done.stderr


@pytest.mark.soak
def test_a_job_out_of_time_saves_and_queues_itself_again(slurm):
    """Slurm's warning signal: both ranks save and end, the job is queued again, and the next one goes on and ends."""
    folder, environment = slurm
    prepare(folder)
    command = ["bash", str(LAUNCH / "slurm.sh"), *arguments(folder), "--train.max_steps", "6"]
    with (folder / "job.log").open("a") as log:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        wait_for(lambda: len(rows(folder / "job")) >= 2, job)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(120) == 0, (folder / "job.log").read_text()[-3000:]
        assert (folder / "requeued").read_text().strip() == "77"
        saved = len(rows(folder / "job"))
        assert 2 <= saved < 6
        (folder / "requeued").unlink()
        assert subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log).returncode == 0
    assert len(rows(folder / "job")) == 6 and not (folder / "requeued").exists()
    assert "resumed from" in (folder / "job.log").read_text()


@pytest.mark.soak
def test_torchrun_script(slurm):
    """The script for nodes without a scheduler trains on this one."""
    folder, environment = slurm
    prepare(folder)
    command = [str(LAUNCH / "torchrun.sh"), *arguments(folder), "--train.max_steps", "2"]
    done = subprocess.run(command, cwd=ROOT, env=environment | {"GPUS": "2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(rows(folder / "job")) == 2
