"""The Triton kernels in Triton's interpreter, on this machine's CPU, and the proof that their tests find faults."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "rethinker_kernels"
KERNELS, EXPONENTIALS = "tests/kernels/fuzz_triton.py", "tests/kernels/fuzz_exponentials.py"


def interpreted(*arguments: str, kernels: Path = PACKAGE.parent) -> subprocess.CompletedProcess[str]:
    """Run pytest with TRITON_INTERPRET, which counts only if it is set before triton is imported."""
    options = ["-q", "-p", "no:cacheprovider", "-o", f"pythonpath={kernels}", "-W", "ignore::RuntimeWarning"]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(kernels), str(ROOT)])
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)


@pytest.mark.parametrize("part", ["test_log_softmax", "not test_log_softmax"])
def test_the_kernels_equal_their_definitions(part):
    """The fuzzing suite: values, statistics and gradients over awkward shapes, strides and values."""
    pytest.importorskip("triton", reason="needs triton, which this platform has no package of")
    done = interpreted(KERNELS, "-k", part)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_product_that_leaves_exponentials():
    """Its own suite, of fp32 inputs: on a GPU it takes bf16 alone."""
    pytest.importorskip("triton", reason="needs triton, which this platform has no package of")
    done = interpreted(EXPONENTIALS)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


FAULTS = {
    "none": ("log_softmax.py", [], "near and uniform and 7-129 or k3 or out_of_range or beyond"),
    "padding columns enter the sum": (
        "log_softmax.py",
        [('mask=columns < end, other=-float("inf")).to(tl.float32)\n        higher',
          "mask=columns < end, other=0.0).to(tl.float32)\n        higher")],
        "near and uniform and 7-129",
    ),
    "32-bit offsets": ("log_softmax.py", [(".to(tl.int64)", "")], "beyond_32_bits"),
    "the dual clip is left out": (
        "linear_loss.py",
        [("flat = flat | ((advantage < 0) & (ratio > dual)) |", "flat = flat |")],
        "test_linear_grpo_loss and options1-dtype0 and token",
    ),
    "k3's slope as it is written": (
        "linear_loss.py",
        [("tl.where(near, small * series, tl.exp(x) - 1.0)", "tl.exp(x) - 1.0")],
        "k3",
    ),
    "an index out of range is clamped": (
        "log_softmax.py",
        [("    valid = (index >= 0) & (index < vocabulary)",
          "    index = tl.minimum(tl.maximum(index, 0), vocabulary - 1)\n    valid = index >= 0")],
        "out_of_range",
    ),
    "a banned entry is 0 * -inf": (
        "log_softmax.py",
        [("return tl.maximum(d, NO_MASS, propagate_nan=tl.PropagateNan.ALL)", "return d")],
        "test_log_softmax and banned-7-129",
    ),
    "a row without a gradient is left as it was": (
        "log_softmax.py",
        [("        write_zeros(place, start, end, TILE)", "        pass")],
        "unused_outputs",
    ),
    "an offset that is too low stays": (
        "exponentials.py", [("        tl.atomic_max(work + 1, tiles)", "        pass")], "any_old_log_prob and 0"
    ),
    "columns beyond the vocabulary have exponentials": (
        "exponentials.py", [("tl.where(inside, d, NO_MASS)", "d")], "near_uniform"
    ),
    "the chosen entry keeps its exponential": (
        "exponentials.py", [("(e - s).to(", "e.to(")], "test_log_probs and 129-40-7"
    ),
}  # fmt: skip
"""Per fault: file, replacements, and the tests that must fail. "none" is the control: the same tests pass."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, tmp_path):
    """Each fault, planted in a copy of the kernels, makes the suite fail; the copy itself does not."""
    pytest.importorskip("triton", reason="needs triton, which this platform has no package of")
    file, replacements, select = FAULTS[fault]
    copy = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    source = copy / "triton_kernels" / file
    text = source.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    source.write_text(text)
    suite = EXPONENTIALS if file == "exponentials.py" else KERNELS
    done = interpreted(suite, "-k", select, "-x", kernels=tmp_path)
    if fault == "none":
        assert done.returncode == 0, done.stdout[-3000:]
    else:  # a failed test, or reading out of bounds (a signal)
        assert (done.returncode == 1 and "AssertionError" in done.stdout) or done.returncode < 0, done.stdout[-3000:]
