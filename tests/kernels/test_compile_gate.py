"""Every Triton kernel compiles for sm_80, sm_90 and sm_100, without spills, within the chip's limits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "options", [[], pytest.param(["--all"], marks=pytest.mark.soak)], ids=["as training launches them", "all forms"]
)
def test_kernels_compile_without_spills(options, capsys):
    """No spills, no stack, shared memory that fits, and 16-byte loads of logits; the table goes to the terminal."""
    pytest.importorskip("triton", reason="needs triton, which this platform has no package of")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compile_gate", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert {"sm_80", "sm_90", "sm_100"} <= set(done.stdout.split())
