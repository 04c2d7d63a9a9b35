"""torchvision can be imported beside a CPU build of torch, here and in the processes that vLLM starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rethinker.runtime.torchvision_cpu import SITE_FOLDER, child_environment


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_transforms_work_after_the_repair():
    """The package that `rethinker serve` reads first brings the repair; repeated, it leaves one schema. No warning."""
    result = python(
        "import rethinker.rollout.vllm_settings\n"
        "from rethinker.runtime.torchvision_cpu import make_importable\n"
        "make_importable(); make_importable()\n"
        "import torch, torchvision.transforms.v2.functional as F\n"
        "make_importable()\n"
        "print(tuple(F.resize(torch.ones(3, 8, 8), [4, 4]).shape), torch.ops.torchvision.nms)"
    )
    assert result.returncode == 0 and result.stderr == "", result.stderr
    assert result.stdout == "(3, 4, 4) torchvision.nms\n"


def test_children_repair_themselves(tmp_path):
    """Under child_environment() a fresh Python imports torchvision with no call of ours, and pays nothing before."""
    code = "import sys; assert 'torch' not in sys.modules; import torchvision, torchvision.ops; print('imported')"
    result = python(code, **child_environment())
    assert result.stdout == "imported\n", result.stderr
    assert child_environment()["PYTHONPATH"].split(os.pathsep)[0] == str(SITE_FOLDER)


def test_a_hidden_sitecustomize_still_runs(tmp_path):
    """A sitecustomize that was there before runs too."""
    (tmp_path / "sitecustomize.py").write_text("print('theirs')")
    path = os.pathsep.join([str(SITE_FOLDER), str(tmp_path)])
    assert python("print('ours')", PYTHONPATH=path).stdout == "theirs\nours\n"


@pytest.mark.parametrize("state", ["absent", "complete"])
def test_nothing_is_touched_when_there_is_nothing_to_repair(tmp_path, state):
    """Without torchvision there is nothing to find; operators that somebody else defined stay theirs."""
    absent = "sys.path = [p for p in sys.path if 'packages' not in p]; torchvision_cpu.make_importable()\n"
    absent += "assert importlib.util.find_spec('torchvision') is None\n"
    complete = "import torch; theirs = torch.library.Library('torchvision', 'DEF')\n"
    complete += "theirs.define('nms(Tensor boxes) -> Tensor'); torchvision_cpu.declare_operators(pathlib.Path('x'))\n"
    result = python(
        "import importlib.util, pathlib, sys; from rethinker.runtime import torchvision_cpu\n"
        + (absent if state == "absent" else complete)
        + "print(torchvision_cpu._library)"
    )
    assert result.stdout == "None\n", result.stderr
