"""The ablation's processes: each done once, after those it needs. Small ones stand for the training runs."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import ablation_runs
from benchmarks.ablation_runs import Job, UnfinishedError, run_all
from rethinker.config import ConfigError


def script(tmp_path: Path, name: str, code: str, after: Job | None = None) -> Job:
    """A job that runs Python code in a folder, and is done when the code has made a file of the job's name."""

    def finish() -> None:
        if not (tmp_path / name).is_file():
            raise UnfinishedError(f"it left no {name}")

    command = [sys.executable, "-IS", "-c", f"import os, sys, time, signal\nos.chdir({str(tmp_path)!r})\n{code}"]
    return Job(name, tmp_path / name, lambda: command, finish, after)


def raises(error: Exception) -> list[str]:
    raise error


class TestProcesses:
    def run(self, tmp_path: Path, jobs: list[Job], at_once: int = 2, finished=lambda job: None) -> dict[str, str]:
        return run_all(jobs, at_once, 3, tmp_path / "logs", finished)

    def test_a_failed_job_stops_those_alone_that_need_it(self, tmp_path):
        bad = script(tmp_path, "bad", "print('why it failed'); sys.exit(3)")
        below = script(tmp_path, "below", "open('below', 'w')", bad)
        further = script(tmp_path, "further", "open('further', 'w')", below)
        empty = script(tmp_path, "empty", "print('no file')")
        unmade = script(tmp_path, "unmade", "")
        unmade = replace(unmade, command=functools.partial(raises, ConfigError("no package")))
        good = script(tmp_path, "good", "open('good', 'w').write(os.environ['OMP_NUM_THREADS'])")
        seen: list[str] = []
        failed = self.run(
            tmp_path, [bad, below, further, empty, unmade, good], finished=lambda job: seen.append(job.name)
        )
        assert set(failed) == {"bad", "below", "further", "empty", "unmade"}
        assert failed["unmade"] == "was not started: no package"
        assert "exit code 3" in failed["bad"] and "why it failed" in failed["bad"]
        assert failed["below"] == "was not started, since bad failed" and "below" in failed["further"]
        assert "it left no empty" in failed["empty"] and "no file" in failed["empty"]
        assert seen == ["good"] and (tmp_path / "good").read_text() == "3"
        assert not (tmp_path / "below").exists()

    def test_as_many_at_once_as_asked_and_each_after_its_own(self, tmp_path):
        """Two jobs that wait for each other's file both end; a third one, which may not see them run, does so too."""
        meet = "open('{0}.here', 'w')\nwhile not os.path.exists('{1}.here'): time.sleep(0.01)\n"
        meet += "time.sleep(0.1); open('{0}', 'w'); open('{0}.gone', 'w')"
        left = script(tmp_path, "left", meet.format("left", "right"))
        right = script(tmp_path, "right", meet.format("right", "left"))
        third = script(tmp_path, "third", "open('third', 'w') if os.path.exists('left.gone') else sys.exit(1)", left)
        one = "os.mkdir('alone'); time.sleep(0.1); os.rmdir('alone'); open('{0}', 'w')"
        assert self.run(tmp_path, [left, third, right]) == {}
        assert self.run(tmp_path, [script(tmp_path, n, one.format(n)) for n in "abc"], at_once=1) == {}

    def test_what_is_done_is_not_run_again(self, tmp_path):
        (tmp_path / "done").write_text("before")
        done = script(tmp_path, "done", "open('done', 'w').write('again')")
        after = script(tmp_path, "after", "open('after', 'w')", done)
        assert self.run(tmp_path, [done, after]) == {}
        assert (tmp_path / "done").read_text() == "before" and (tmp_path / "after").exists()

    @pytest.mark.parametrize("stubborn", [False, True])
    def test_an_interruption_ends_what_runs(self, tmp_path, monkeypatch, stubborn):
        """A run is asked to stop and saves itself; one that does not is ended."""
        monkeypatch.setattr(ablation_runs, "STOP_S", 0.3 if stubborn else 20)
        code = "open('pid', 'w').write(str(os.getpid()))\n"
        code += "def stop(*_): open('saved', 'w')" + ("\n" if stubborn else "; sys.exit(0)\n")
        code += "signal.signal(signal.SIGTERM, stop)\nopen('ready', 'w')\nwhile True: time.sleep(0.01)"
        long = script(tmp_path, "long", code)
        short = script(tmp_path, "short", "while not os.path.exists('ready'): time.sleep(0.01)\nopen('short', 'w')")

        def interrupt(job: Job) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path, [long, short], finished=interrupt)
        assert (tmp_path / "saved").exists()
        assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()
