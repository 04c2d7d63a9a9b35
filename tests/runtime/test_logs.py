"""Every rank's file has its messages, what ended it, and the stacks of a crash and of a phase that hangs."""

from __future__ import annotations

import faulthandler
import logging
import logging.config
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import pytest

from rethinker.runtime.logs import follow, rank_log
from rethinker.runtime.profiling import phase

log = logging.getLogger("rethinker.tests")


def test_messages_carry_time_rank_level_and_module(tmp_path):
    """A line of rank 3's file says when, who, how bad, where; the folder is made."""
    with rank_log(tmp_path / "logs", 3, 60) as path:
        log.warning("left out %s", "query 7")
    assert path == tmp_path / "logs" / "rank_00003.log"
    when, rest = path.read_text().split(" ", 1)
    assert len(when) == len("2026-01-01T00:00:00.000")
    assert rest == "rank 3 WARNING rethinker.tests: left out query 7\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_warnings_reach_the_screen_from_rank_0_only(tmp_path, capsys, rank):
    """Messages of level WARNING and Python's warnings: both in the file of every rank, on stderr from the first."""
    with rank_log(tmp_path, rank, 60) as path:
        log.warning("a check scored 0")
        log.info("not shown")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)  # pytest's and this block's own handling put aside
            warnings.warn("deprecated", stacklevel=1)
    screen = capsys.readouterr().err
    assert ("a check scored 0" in screen, "deprecated" in screen) == (rank == 0, rank == 0)
    assert "not shown" not in screen
    written = path.read_text()
    assert "a check scored 0" in written and "UserWarning: deprecated" in written


def test_libraries_that_do_not_propagate_are_heard(tmp_path):
    """vLLM configures logging when it is imported, which closes every handler: `follow` attaches the file again."""
    vllm = logging.getLogger("vllm")
    propagate, vllm.propagate = vllm.propagate, False
    try:
        with rank_log(tmp_path, 1, 60) as path:
            vllm.error("first")
            logging.config.dictConfig(
                {"version": 1, "disable_existing_loggers": False, "loggers": {"vllm": {"handlers": []}}}
            )
            follow("vllm")
            follow("vllm")
            vllm.error("second")
            with phase("rollout"):  # the stack writer has a file of its own
                pass
            log.error("third")
        vllm.error("after the end")
    finally:
        vllm.propagate = propagate
    lines = [line.split(": ")[1] for line in path.read_text().splitlines()]
    assert lines == ["first", "second", "third"]
    assert not vllm.handlers


def test_what_ended_the_run_is_kept(tmp_path, capsys):
    """The error that leaves the block is in the file with its traceback, and goes on."""
    with pytest.raises(ZeroDivisionError), rank_log(tmp_path, 0, 60) as path:
        raise ZeroDivisionError("division by zero")
    written = path.read_text()
    assert "CRITICAL rethinker: ended by ZeroDivisionError: division by zero\nTraceback" in written
    assert 'raise ZeroDivisionError("division by zero")' in written
    assert "ZeroDivisionError" not in capsys.readouterr().err  # Python itself will say it


def test_what_ended_a_thread_is_kept(tmp_path):
    """Python would show it on stderr alone. A thread that leaves by sys.exit() has ended well."""
    before = threading.excepthook
    with rank_log(tmp_path, 1, 60) as path:
        for name, target in (("leaves", sys.exit), ("fails", lambda: 1 / 0)):
            thread = threading.Thread(target=target, name=name)
            thread.start()
            thread.join()
    written = path.read_text()
    assert "ERROR root: <Thread(fails" in written and "ZeroDivisionError: division by zero" in written
    assert "Thread(leaves" not in written and threading.excepthook is before


CRASH = """
import ctypes, pathlib, sys
from rethinker.runtime.logs import rank_log
def falls_over():
    ctypes.string_at(0)
with rank_log(pathlib.Path(sys.argv[1]), 0, 60):
    falls_over()
"""


def test_a_crash_in_c_leaves_its_stack(tmp_path):
    """A segmentation fault: the Python stack at that moment is in the newest file."""
    done = subprocess.run([sys.executable, "-c", CRASH, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGSEGV
    written = (tmp_path / "rank_00000.log").read_text()
    assert "Segmentation fault" in written and "in falls_over" in written


def stacks(tmp_path, work) -> str:
    with rank_log(tmp_path, 1, 1.0) as path:
        work()
    return path.read_text()


def hang_here(seconds: float) -> None:
    time.sleep(seconds)


def test_a_phase_that_hangs_leaves_its_stack(tmp_path):
    """After run.stall_s and after as long again; nothing is ended."""

    def work():
        with phase("train"):
            hang_here(2.5)

    assert stacks(tmp_path, work).count("in hang_here") == 2


def test_the_beginning_and_the_end_of_a_phase_are_progress(tmp_path):
    """A phase that is long because its parts go on is left alone; what comes after it has the whole time again."""

    def work():
        with phase("train"):
            for _ in range(5):
                with phase("forward"):
                    time.sleep(0.3)
        time.sleep(0.3)

    assert stacks(tmp_path, work) == ""


GIL = """
import ctypes, pathlib, sys
from rethinker.runtime.logs import rank_log
def holds_the_interpreter():
    ctypes.PyDLL(None).usleep(800_000)
with rank_log(pathlib.Path(sys.argv[1]), 0, 0.3):
    holds_the_interpreter()
"""


def test_c_code_that_keeps_the_interpreter_is_reported(tmp_path):
    """No Python thread can run then; faulthandler's own thread still writes the stack."""
    subprocess.run([sys.executable, "-c", GIL, tmp_path], check=True, timeout=60)
    assert "in holds_the_interpreter" in (tmp_path / "rank_00000.log").read_text()


def test_nothing_stays_behind(tmp_path):
    """Handlers, hooks and faulthandler are as before, and no descriptor is left open."""

    def state():
        return logging.getLogger().handlers[:], faulthandler.is_enabled(), os.listdir("/dev/fd")

    before = state()
    for _ in range(3):
        with rank_log(tmp_path, 0, 60):
            log.warning("x")
    after = state()
    assert before[:2] == after[:2] and len(before[2]) == len(after[2])
