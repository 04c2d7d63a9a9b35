"""Work that hangs ends with a message that names the setting."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rethinker.rollout.deadline import Deadline

HANG = """
import threading
from rethinker.rollout import deadline
deadline.GRACE_S = 0.1
with deadline.Deadline("the weight sync", 0.1):
    threading.Event().wait(60)  # never returns to a check, as a hung collective
"""


def test_check_raises_after_the_deadline_only():
    """In time nothing happens; late, the error names work, setting and progress."""
    with Deadline("the rollout", 100) as deadline:
        deadline.check()
    with (
        Deadline("the rollout", 0) as deadline,
        pytest.raises(TimeoutError, match=r"^the rollout did not .* rollout\.timeout_s=0 seconds.*\(3 of 4\)$"),
    ):
        deadline.check("3 of 4")


def test_work_that_never_returns_ends_the_process():
    """A call that hangs in C is beyond an exception: the process ends with the message and where it hung."""
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=50)
    assert done.returncode == 1
    assert "the weight sync did not end within rollout.timeout_s=0.1 seconds" in done.stderr
    assert "in wait" in done.stderr
