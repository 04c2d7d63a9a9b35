"""A phase that hangs is reported by every rank, with the line it hangs at, again and again, and nothing is ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rethinker.runtime.logs import RankLog
from rethinker.runtime.profiling import phase
from rethinker.runtime.watchdog import Watchdog

ROOT = Path(__file__).parents[2]


def hang_here(seconds: float) -> None:
    time.sleep(seconds)


def run(tmp_path, work, stall_s=0.2, step=7) -> str:
    with RankLog(tmp_path, 1) as log, Watchdog(stall_s, log, rank=1) as watchdog:
        watchdog.step = step
        work()
    return log.path.read_text()


def test_a_stalled_phase_is_reported_with_back_off(tmp_path, capfd):
    """After 1, 2 and 4 times stall_s: phases, step and elapsed time in the log, with the stack; a line on stderr."""

    def work():
        with phase("train"), phase("backward"):
            hang_here(1.1)

    written = run(tmp_path, work)
    reports = re.findall(r"no progress for ([\d.]+) s in train > backward of step 7", written)
    assert len(reports) == 3
    for late, after in zip(map(float, reports), (0.2, 0.4, 0.8), strict=True):
        assert after <= late < after + 0.3
    assert written.count("in hang_here") == 3 and "run.stall_s=0.2" in written
    screen = capfd.readouterr().err
    assert len(re.findall(r"rank 1: no progress for [\d.]+ s in train > backward of step 7", screen)) == 3
    assert str(tmp_path / "rank_00001.log") in screen


def test_progress_is_no_stall(tmp_path, capfd):
    """A phase that is long because its parts go on, one after the other, is left alone."""

    def work():
        with phase("train"):
            for _ in range(12):
                with phase("forward"):
                    time.sleep(0.05)

    assert run(tmp_path, work) == "" == capfd.readouterr().err


def test_the_end_of_a_phase_is_progress(tmp_path):
    """What comes after it has the whole deadline again."""

    def work():
        with phase("forward"):
            time.sleep(0.6)
        time.sleep(0.6)

    assert run(tmp_path, work, stall_s=1.0) == ""


def test_a_stall_between_phases_is_seen_and_its_end_told(tmp_path):
    """Collectives lie outside phases too; when the run goes on, the log says so, and the next stall is a new one."""

    def work():
        hang_here(0.35)
        with phase("sync"):
            pass
        hang_here(0.35)

    written = run(tmp_path, work)
    assert len(re.findall(r"no progress for [\d.]+ s between the phases of step 7", written)) == 2
    assert written.count("rank 1: step 7 goes on") == 1


GIL = """
import ctypes, pathlib, sys
from rethinker.runtime.logs import RankLog
from rethinker.runtime.profiling import phase
from rethinker.runtime.watchdog import Watchdog
def holds_the_interpreter():
    ctypes.PyDLL(None).usleep(1_500_000)
with RankLog(pathlib.Path(sys.argv[1]), 0) as log, Watchdog(0.4, log, 0), phase("rollout"):
    holds_the_interpreter()
"""


def test_c_code_that_keeps_the_interpreter_is_reported(tmp_path):
    """No Python thread can run then; faulthandler's own thread still writes the stack."""
    subprocess.run([sys.executable, "-c", GIL, tmp_path], check=True, timeout=60)
    written = (tmp_path / "rank_00000.log").read_text()
    assert "Timeout (0:00:00.6" in written.split("no progress")[0]
    assert "in holds_the_interpreter" in written


RANKS = """
import os, pathlib, sys, time
import torch.distributed as dist
from rethinker.runtime.logs import RankLog
from rethinker.runtime.profiling import phase
from rethinker.runtime.watchdog import Watchdog
dist.init_process_group("gloo")
rank = dist.get_rank()
def stuck_in_c():
    time.sleep(2)
def waits_for_the_other():
    dist.barrier()
with RankLog(pathlib.Path(sys.argv[1]), rank) as log, Watchdog(0.5, log, rank) as watchdog:
    watchdog.step = 12
    dist.barrier()
    print(f"fault at {time.time():.3f}", file=sys.stderr, flush=True)
    with phase("sync"):
        stuck_in_c() if rank == 1 else waits_for_the_other()
    if rank == 1:
        waits_for_the_other()
dist.destroy_process_group()
"""


def test_every_rank_reports_when_one_stalls(tmp_path):
    """Rank 1 hangs and rank 0 waits for it: both logs name phase and step, one the line at fault, one the barrier."""
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=100, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank, line in enumerate(("in waits_for_the_other", "in stuck_in_c")):
        written = (tmp_path / f"rank_0000{rank}.log").read_text()
        report = rf"rank {rank}: no progress for ([\d.]+) s in sync of step 12"
        assert re.search(report, done.stderr)
        first = re.search(report, written)
        assert line in written[first.end() :]
        seconds = first[1]
        print(f"rank {rank}: stall to its first report {seconds} s (run.stall_s=0.5)")


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_stall_s_must_be_positive(value):
    """The error names the setting."""
    from rethinker.config import ConfigError
    from rethinker.settings import load_config

    with pytest.raises(ConfigError, match="run.stall_s"):
        load_config("easy_vqa_cpu", ["--run.stall_s", value])
