"""Every rank's file has its messages, what ended it, and the stacks of a crash, also after the file was rotated."""

from __future__ import annotations

import faulthandler
import logging
import logging.config
import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest

from rethinker.runtime import logs
from rethinker.runtime.logs import RankLog, follow

log = logging.getLogger("rethinker.tests")


def test_messages_carry_time_rank_level_and_module(tmp_path):
    """A line of rank 3's file says when, who, how bad, where; the folder is made."""
    with RankLog(tmp_path / "logs", rank=3) as rank_log:
        log.warning("left out %s", "query 7")
    assert rank_log.path == tmp_path / "logs" / "rank_00003.log"
    when, rest = rank_log.path.read_text().split(" ", 1)
    assert len(when) == len("2026-01-01T00:00:00.000")
    assert rest == "rank 3 WARNING rethinker.tests: left out query 7\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_warnings_reach_the_screen_from_rank_0_only(tmp_path, capsys, rank):
    """Messages of level WARNING and Python's warnings: both in the file of every rank, on stderr from the first."""
    with RankLog(tmp_path, rank) as rank_log:
        log.warning("a check scored 0")
        log.info("not shown")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            logging.captureWarnings(True)  # pytest's and this block's own handling put aside
            warnings.warn("deprecated", stacklevel=1)
    screen = capsys.readouterr().err
    assert ("a check scored 0" in screen, "deprecated" in screen) == (rank == 0, rank == 0)
    assert "not shown" not in screen
    written = rank_log.path.read_text()
    assert "a check scored 0" in written and "UserWarning: deprecated" in written


def test_libraries_that_do_not_propagate_are_heard(tmp_path):
    """vLLM configures logging when it is imported, which closes every handler: `follow` attaches the file again."""
    vllm = logging.getLogger("vllm")
    propagate, vllm.propagate = vllm.propagate, False
    try:
        with RankLog(tmp_path, 1) as rank_log:
            vllm.error("first")
            logging.config.dictConfig(
                {"version": 1, "disable_existing_loggers": False, "loggers": {"vllm": {"handlers": []}}}
            )
            follow("vllm")
            follow("vllm")
            vllm.error("second")
            log.error("third")
        vllm.error("after the end")
    finally:
        vllm.propagate = propagate
    lines = [line.split(": ")[1] for line in rank_log.path.read_text().splitlines()]
    assert lines == ["first", "second", "third"]
    assert not vllm.handlers


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_ended_the_run_is_kept(tmp_path, capsys):
    """The error that leaves the block is in the file with its traceback, and goes on; a thread's is there too."""

    def fails():
        raise ValueError("in a thread")

    with pytest.raises(ZeroDivisionError), RankLog(tmp_path, 0) as rank_log:
        thread = threading.Thread(target=fails, name="feeder")
        thread.start()
        thread.join()
        raise ZeroDivisionError("division by zero")
    written = rank_log.path.read_text()
    assert "CRITICAL rethinker: ended by ZeroDivisionError: division by zero\nTraceback" in written
    assert 'raise ZeroDivisionError("division by zero")' in written
    assert "thread feeder ended by an error" in written and "ValueError: in a thread" in written
    assert "ZeroDivisionError" not in capsys.readouterr().err  # Python itself will say it


def test_the_log_rotates_and_stacks_follow_it(tmp_path, monkeypatch):
    """The folder stays below its bound; after any number of rotations a stack dump is in the newest file."""
    monkeypatch.setattr(logs, "MAX_BYTES", 2000)
    monkeypatch.setattr(logs, "OLDER_FILES", 2)
    with RankLog(tmp_path, 0) as rank_log:
        for number in range(200):
            log.error("message %d %s", number, "x" * 50)
            if number % 50 == 49:
                faulthandler.dump_traceback(file=rank_log.descriptor)
                assert "test_the_log_rotates_and_stacks_follow_it" in rank_log.path.read_text()
        log.error("last")
        assert rank_log.path.read_text().endswith("last\n")
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["rank_00000.log", "rank_00000.log.1", "rank_00000.log.2"]
    assert max(path.stat().st_size for path in tmp_path.iterdir()) < 2000 + 20_000  # a dump is not cut


CRASH = """
import ctypes, pathlib, sys
from rethinker.runtime import logs
logs.MAX_BYTES = 500
def falls_over():
    ctypes.string_at(0)
with logs.RankLog(pathlib.Path(sys.argv[1]), 0):
    import logging
    for _ in range(20):
        logging.getLogger("rethinker").error("x" * 100)
    falls_over()
"""


def test_a_crash_in_c_leaves_its_stack(tmp_path):
    """A segmentation fault: the Python stack at that moment is in the newest file."""
    done = subprocess.run([sys.executable, "-c", CRASH, tmp_path], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGSEGV
    written = (tmp_path / "rank_00000.log").read_text()
    assert "Segmentation fault" in written and "in falls_over" in written
    assert (tmp_path / "rank_00000.log.1").is_file()


def test_nothing_stays_behind(tmp_path):
    """Handlers, hooks and faulthandler are as before, and no descriptor is left open."""

    def state():
        return logging.getLogger().handlers[:], threading.excepthook, faulthandler.is_enabled(), os.listdir("/dev/fd")

    before = state()
    for _ in range(3):
        with RankLog(tmp_path, 0):
            log.warning("x")
    after = state()
    assert before[:3] == after[:3] and len(before[3]) == len(after[3])
