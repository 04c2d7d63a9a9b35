"""Processes of their own, forked from one that has imported what a run needs: most of a short run's time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch.distributed.elastic.utils.distributed import get_free_port

from rethinker import cli

ROOT = Path(__file__).parents[1]


class Forked:
    """A function's ranks, forked from a process that has imported what they need; it has what is used of Popen."""

    def __init__(self, function: Callable[[], int | None], log: Path, ranks: int) -> None:
        """
        Args:
            function: runs on every rank and returns its exit code.
            log: what the ranks print is appended to it.
        """
        places = [{}]  # of a single rank: none
        if ranks > 1:
            meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
            places = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self._ranks = []
        for place in places:
            group = self.pid if self._ranks else 0
            self._ranks.append(FORKS.Process(target=_work, args=(function, str(log), place, group)))
            self._ranks[-1].start()
            while os.getpgid(self._ranks[-1].pid) != self.pid:  # until it is in the group, which can be killed
                time.sleep(0.01)

    @property
    def pid(self) -> int:
        return self._ranks[0].pid

    @property
    def returncode(self) -> int | None:
        codes = [rank.exitcode for rank in self._ranks]
        return None if None in codes else next(filter(None, codes), 0)

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        for rank in self._ranks:
            rank.join(timeout)
        assert self.returncode is not None, f"the run has not ended in {timeout} s"
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def training(arguments: list[str]) -> Callable[[], int]:
    """`rethinker train` with these arguments."""
    return partial(cli.main, ["train", *arguments])


def run(function: Callable[[], int | None], log: Path, ranks: int = 1, seconds: float = 300) -> None:
    """The function on so many ranks, to an end that must be a good one."""
    forked = Forked(function, log, ranks)
    try:
        code = forked.wait(seconds)
        assert code == 0, log.read_text()[-6000:]
    finally:
        if forked.returncode is None:
            os.killpg(forked.pid, signal.SIGKILL)


def _work(function: Callable[[], int | None], log: str, place: dict[str, str], group: int) -> None:
    """The function in this process, which is a fresh copy of the one that only imported."""
    os.setpgid(0, group)  # 0: a group of its own
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.chdir(ROOT)
    os.environ.update(place)
    sys.exit(function())


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])
