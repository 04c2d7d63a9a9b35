"""Signals: the first asks to stop, one and the same twice is one, a later one leaves at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from rethinker.rollout.deadline import Deadline
from rethinker.runtime import signals


@pytest.mark.parametrize("number", signals.SIGNALS)
def test_a_signal_only_asks(number, monkeypatch):
    """Within `handled` it ends nothing and is remembered by name; afterwards the process is as before."""
    before = signal.getsignal(number)
    with signals.handled():
        assert signals.requested() is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a launcher passes on what the terminal has sent already
        assert signals.requested() == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_rollout_may_be_broken_off_and_validation_not():
    """Work with a deadline checks for a stop as well, but only where it is done again after a resume."""
    with signals.handled(), Deadline("the rollout", 60) as deadline:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline.check()
        with pytest.raises(signals.StopRequested), signals.interruptible():
            deadline.check()
        deadline.check()


def test_an_ignored_signal_stays_ignored():
    """Under nohup SIGHUP does not stop a run."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.requested() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_signal_leaves_at_once():
    """A process that ignores the request still goes on the second one, by the code of the signal, in no time."""
    code = (
        "import time; from rethinker.runtime import signals\n"
        "with signals.handled():\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.05)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        assert p.stdout.readline() == "ready\n"
        p.send_signal(signal.SIGINT)
        time.sleep(signals._SAME_S + 0.3)
        assert p.poll() is None
        p.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert p.wait(10) == 128 + signal.SIGINT and time.monotonic() - start < 2
        assert "once more leaves at once" in (told := p.stderr.read()) and "without saving" in told
