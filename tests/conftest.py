"""What all tests share: an environment without the model hub, and a way to run the command as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rethinker.runtime.torchvision_cpu import make_importable

ROOT = Path(__file__).parents[1]

# A shell's background job ignores Ctrl-C, one under nohup a lost terminal, and so would all that a test starts and
# interrupts.
if threading.current_thread() is threading.main_thread():
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)

# Two files run at a time, and a forked copy of a process has no OpenMP threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a download
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])

make_importable()  # many tests import transformers' processors, and they import torchvision


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, by name of the hardware, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def rethinker(tmp_path):
    """Runs the `rethinker` command in a process of its own, in an empty folder."""

    def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "rethinker", *arguments]
        return subprocess.run(
            command, **{"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60} | options
        )

    return run
