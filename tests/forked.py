"""Runs in processes of their own, forked from one that has imported what a run needs: most of a short run's time."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path

from torch.distributed.elastic.utils.distributed import get_free_port

ROOT = Path(__file__).parents[2]


class Forked:
    """A run's ranks, forked from a process that has imported what they need, with what is used of subprocess.Popen."""

    def __init__(self, arguments: list[str], log: Path, ranks: int) -> None:
        places = [{}]  # of a single rank: none
        if ranks > 1:
            meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
            places = [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self._ranks = []
        for place in places:
            group = self.pid if self._ranks else 0
            self._ranks.append(FORKS.Process(target=_train, args=(arguments, str(log), place, group)))
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


def _train(arguments: list[str], log: str, place: dict[str, str], group: int) -> None:
    """`rethinker train` in this process, which is a fresh copy of the one that only imported."""
    os.setpgid(0, group)  # 0: a group of its own
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(output, number)
    os.chdir(ROOT)
    os.environ.update(place)
    from rethinker import cli

    sys.exit(cli.main(["train", *arguments]))


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    """rethinker.cli rethinker.run jsonargparse deepspeed torch.utils.tensorboard matplotlib.pyplot vllm.entrypoints.llm
    rethinker.rollout.vllm_engine vllm.v1.worker.cpu_worker vllm.model_executor.models.qwen2_5_vl""".split()
)
