"""The Triton kernels in Triton's interpreter, on this machine's CPU, and the proof that their tests find faults."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kernels.interpreter import Interpreter

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "rethinker_kernels"
KERNELS, EXPONENTIALS = "tests/kernels/fuzz_triton.py", "tests/kernels/fuzz_exponentials.py"


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory):
    pytest.importorskip("triton", reason="needs triton, which this platform has no package of")
    process = Interpreter(tmp_path_factory.mktemp("interpreter") / "output")
    yield process
    process.close()


@pytest.mark.parametrize("suite", [KERNELS, EXPONENTIALS])
def test_the_kernels_equal_their_definitions(suite, interpreter):
    """The fuzzing suites: values, statistics and gradients over awkward shapes, strides and values. That of the product
    that leaves exponentials takes fp32 inputs here: on a GPU it takes bf16 alone."""
    status, output = interpreter.run(suite)
    assert status == 0, output[-6000:]


FAULTS = {
    "none": ("log_softmax.py", [], "near and uniform and 7-129 or soft_cap or k3 or out_of_range or beyond"),
    "padding columns enter the sum": (
        "log_softmax.py",
        [('-float("inf"), SOFTCAP)\n        higher', "0.0, SOFTCAP)\n        higher")],
        "near and uniform and 7-129",
    ),
    "padding columns are capped": (
        "log_softmax.py", [("tl.where(inside, tanh(x / SOFTCAP), outside)", "tanh(x / SOFTCAP)")],
        "test_log_softmax_of_capped_logits and near and 129",
    ),
    "a gradient without the cap's slope": (
        "log_softmax.py", [("gradient *= (1.0 - x * x) / SOFTCAP", "gradient /= SOFTCAP")],
        "test_linear_grpo_loss and options3-dtype0 and token",
    ),
    "tanh as it is written": (
        "log_softmax.py", [("tl.where(tl.abs(x) < 0.625, near, ", "tl.where(tl.abs(x) < 0.0, near, ")],
        "test_a_soft_cap_is_accurate",
    ),
    "tanh with a coefficient that is off": (
        "log_softmax.py", [("0.13331442", "0.13341442")], "test_a_soft_cap_is_accurate",
    ),
    "32-bit offsets": ("log_softmax.py", [(".to(tl.int64)", "")], "beyond_32_bits"),
    "the dual clip is left out": (
        "linear_loss.py",
        [("flat = flat | ((advantage < 0) & (ratio > dual)) |", "flat = flat |")],
        "test_linear_grpo_loss and options1-dtype0 and token",
    ),
    "an entropy bonus without the token's weight": (
        "linear_loss.py",
        [("per_entropy = -entropy_coef * factor", "per_entropy = -entropy_coef")],
        "test_linear_grpo_loss and options2-dtype0 and token",
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
        [("        write_zeros(place, vocabulary, TILE)", "        pass")],
        "unused_outputs",
    ),
    "an offset that is too low stays": (
        "exponentials.py", [("        tl.atomic_max(work + 1, tiles)", "        pass")], "any_old_log_prob and 0"
    ),
    "columns beyond the vocabulary have exponentials": (
        "exponentials.py", [("tl.where(inside, d, NO_MASS)", "d")], "near_uniform"
    ),
    "the chosen entry keeps its exponential": (
        "exponentials.py", [("(e - s).to(", "e.to(")], "test_log_probs and 129-40-33"
    ),
}  # fmt: skip
"""Per fault: file, replacements, and the tests that must fail. "none" is the control: the same tests pass."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, tmp_path, interpreter):
    """Each fault, planted in a copy of the kernels, makes the suite fail; the copy itself does not."""
    file, replacements, select = FAULTS[fault]
    copy = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    source = copy / "triton_kernels" / file
    text = source.read_text()
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    source.write_text(text)
    suite = EXPONENTIALS if file == "exponentials.py" else KERNELS
    status, output = interpreter.run(suite, "-k", select, "-x", kernels=tmp_path)
    if fault == "none":
        assert status == 0, output[-3000:]
    else:  # a failed test, or reading out of bounds (a signal)
        assert (status == 1 and "AssertionError" in output) or status < 0, output[-3000:]
