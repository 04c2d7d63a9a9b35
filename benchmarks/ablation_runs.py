"""The processes of a benchmark: several at a time, each done once, and each after the one that it starts from."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rethinker.config import ConfigError

STOP_S = 60  # a run that is asked to stop ends its step and saves itself


class UnfinishedError(Exception):
    """A process that ended well has not done its work; the message says what is missing."""


@dataclass(frozen=True, eq=False)
class Job:
    """One process, and the file that says it is done."""

    name: str
    done: Path
    """Whoever has this file is not run again."""
    command: Callable[[], list[str]]
    """Made when the job starts, when the results of those before it are known."""
    finish: Callable[[], None]
    """Writes `done` from what the process left; raises UnfinishedError where that is not whole."""
    after: Job | None = None
    """The job that this one needs the results of."""


def run_all(
    jobs: Sequence[Job], at_once: int, threads: int, logs: Path, finished: Callable[[Job], None]
) -> dict[str, str]:
    """Run what is not done, in this order, as far as no job waits for another; `finished` is called after each.

    Args:
        jobs: every job that another one is `after` stands before it.
        at_once: processes that run at a time.
        threads: OpenMP threads of each.
        logs: folder for what each process prints, <name>.log.

    Returns:
        By name of a job that failed or could not start: its exit code and its log's last lines, or the reason. A failed
        job stops none but those that need it.
    """
    waiting = [job for job in jobs if not job.done.is_file()]
    running: dict[Job, subprocess.Popen[bytes]] = {}
    failed: dict[str, str] = {}
    try:
        while waiting or running:
            for job in list(waiting):
                if job.after and job.after.name in failed:
                    failed[job.name] = f"was not started, since {job.after.name} failed"
                    waiting.remove(job)
                elif len(running) < at_once and (job.after is None or job.after.done.is_file()):
                    waiting.remove(job)
                    try:
                        running[job] = _start(job, threads, logs)
                    except ConfigError as problem:  # of what the job makes before it starts
                        failed[job.name] = f"was not started: {problem}"
            for job, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[job]
                try:
                    if process.returncode:
                        raise UnfinishedError(f"exit code {process.returncode}")
                    job.finish()
                    finished(job)
                except UnfinishedError as problem:
                    lines = (logs / f"{job.name}.log").read_text("utf-8", errors="replace").splitlines()
                    failed[job.name] = "\n".join([str(problem), *(f"    {line}" for line in lines[-6:])])
            time.sleep(0.1)  # Popen can wait for one process only, not for the first of several
    finally:
        _stop(list(running.values()))
    return failed


def _start(job: Job, threads: int, logs: Path) -> subprocess.Popen[bytes]:
    """The job's process, in a session of its own: Ctrl-C reaches this process alone, which then stops the others."""
    logs.mkdir(parents=True, exist_ok=True)
    with (logs / f"{job.name}.log").open("wb") as log:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        return subprocess.Popen(
            job.command(), stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask the processes to stop, and end those that do not within STOP_S, with all that they started."""
    try:
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:  # also where a second Ctrl-C breaks off the waiting
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
