"""Faults of a whole run: a rank dies, a run goes on for long; and what is left of it afterwards: its folder alone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.integration.interruptions import finish, prepare, rows, start, wait_for


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    prepare(folder)
    return folder


def processes_of(folder: Path) -> list[psutil.Process]:
    """Launcher, ranks, answer checkers: every living process that names the folder, as all of them do."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if any(str(folder) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def ranks_of(launcher: int) -> list[psutil.Process]:
    """The training processes of a launcher, in the order of their ranks."""
    children = psutil.Process(launcher).children()
    return sorted((child for child in children if "rethinker" in child.cmdline()), key=lambda p: p.environ()["RANK"])


@pytest.mark.parametrize("lost", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_rank_that_dies_ends_the_run(scratch, lost):
    """One of two ranks is killed: the launcher ends with its rank and signal, and no process or port is left.

    The launcher may be told to start again (--max-restarts); here it is not.
    """
    process = start(scratch, f"lost_{lost}", "--rollout.backend", "hf", ranks=2, torchrun=())
    wait_for(lambda: len(rows(scratch / f"lost_{lost}")) >= 1, process)
    victim, ports = ranks_of(process.pid)[lost], listening(process.pid)
    victim.send_signal(signal.SIGKILL)
    start_s = time.monotonic()
    assert process.wait(60) != 0
    seconds = time.monotonic() - start_s
    wait_for_none(scratch, 5)
    log = (scratch / f"lost_{lost}.log").read_text()
    assert "Signal 9 (SIGKILL)" in log and f"local_rank: {lost}" in log.replace("\n", " ")
    assert ports and not ports & {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    print(f"rank {lost} lost: the run ended after {seconds:.1f} s")


def listening(launcher: int) -> set[int]:
    """Ports that a launcher and its ranks listen on."""
    tree = [psutil.Process(launcher), *psutil.Process(launcher).children(recursive=True)]
    connections = [c for process in tree for c in process.net_connections("tcp")]
    return {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


def wait_for_none(folder: Path, seconds: float) -> None:
    """Until no process of the folder is left."""
    end = time.monotonic() + seconds
    while left := processes_of(folder):
        assert time.monotonic() < end, [process.cmdline() for process in left]
        time.sleep(0.1)


@pytest.mark.soak
def test_a_lost_rank_is_replaced(scratch):
    """With --max-restarts and --resume auto the launcher starts all ranks again, and the run ends as undisturbed."""
    finish(scratch, "undisturbed", ranks=2)
    process = start(scratch, "restarted", "--resume", "auto", ranks=2, torchrun=("--max-restarts", "1"))
    wait_for(lambda: len(rows(scratch / "restarted")) >= 3, process)
    ranks_of(process.pid)[1].send_signal(signal.SIGKILL)
    assert process.wait(200) == 0
    assert "resumed from" in (scratch / "restarted.log").read_text()
    assert rows(scratch / "restarted") == rows(scratch / "undisturbed")


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_nothing_grows_over_300_steps(scratch):
    """Host memory, file handles, threads and processes of a run stay flat after its warm-up.

    The slope of memory over the steps 100-300 is smaller than its own uncertainty (two standard errors of a straight
    line through it), or than 20 kB a step.
    """
    run = scratch / "long"
    every = ("--checkpoint.every", "20", "--validation.every", "10")
    process = start(scratch, "long", "--train.max_steps", "300", "--train.max_generated_tokens", "1000000", *every)
    trainer, samples = psutil.Process(process.pid), []
    while process.poll() is None:
        done = len(rows(run))
        if done and (not samples or samples[-1][0] < done):
            with_children = [trainer, *trainer.children(recursive=True)]
            memory = sum(p.memory_info().rss for p in with_children)
            samples.append((done, memory, trainer.num_fds(), trainer.num_threads(), len(with_children)))
        time.sleep(0.05)
    assert process.returncode == 0 and len(rows(run)) == 300
    step, memory, handles, threads, processes = np.array([s for s in samples if 100 <= s[0] < 300], dtype=float).T
    (slope, _), covariance = np.polyfit(step, memory, 1, cov=True)
    error = covariance[0, 0] ** 0.5
    print(f"memory {memory.mean() / 2**20:.0f} MiB, slope {slope / 1e3:.2f} +- {error / 1e3:.2f} kB a step")
    for name, values in (("handles", handles), ("threads", threads), ("processes", processes)):
        print(f"{name}: {values[:20].mean():.1f} in the first 20 of them, {values[-20:].mean():.1f} in the last")
        assert abs(values[-20:].mean() - values[:20].mean()) <= 1
    assert slope < max(2 * error, 20e3)


def test_processes_are_found(scratch):
    """The test of what is left finds what is there: this very process, if it names the folder."""
    with subprocess.Popen([sys.executable, "-c", "input()", str(scratch)], stdin=subprocess.PIPE) as process:
        assert [p.pid for p in processes_of(scratch)] == [process.pid]
        process.communicate(b"\n")
    wait_for_none(scratch, 5)
