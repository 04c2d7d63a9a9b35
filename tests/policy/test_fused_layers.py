"""policy.fused_layers: Liger's layers compute what the plain ones do, in one instance only, on a GPU only."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rethinker.checks
from rethinker.config import ConfigError
from rethinker.families import FAMILIES
from rethinker.settings import load_config
from tests.conftest import ROOT
from tests.policy.switches import batch_for, create_family, errors, make, outcome


@pytest.mark.parametrize("tests", ["not soak", pytest.param("soak", marks=pytest.mark.soak)])
def test_the_layers_in_tritons_interpreter(tests):
    """The tests of fused_interpreted.py: the families, and (soak) a ZeRO-3 step."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel: pip install liger-kernel")
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning"]
    command += ["tests/policy/fused_interpreted.py", "-m", tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_on_a_gpu(family, tmp_path):
    """As in the interpreter, by the compiled kernels, in fp32."""
    folder = create_family(family, tmp_path / "model")
    plain, fused = (make(folder, "cuda", attention="sdpa", fused_layers=switch) for switch in (False, True))
    batch = batch_for(folder, plain, tmp_path).to(torch.device("cuda"))
    logp_error, gradient_error = errors(outcome(fused, batch), outcome(plain, batch))
    assert logp_error <= 1e-4
    assert gradient_error <= 1e-4


def test_refused_without_a_gpu(monkeypatch, tmp_path):
    """The setting is named before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="policy.fused_layers=true needs a CUDA device"):
        load_config("easy_vqa_cpu", {"policy.fused_layers": True, "run.dir": str(tmp_path)})


def test_refused_without_liger(monkeypatch, tmp_path):
    """The setting, the package and the command that installs it are named."""
    find = rethinker.checks.find_spec
    monkeypatch.setattr(rethinker.checks, "find_spec", lambda name: None if name == "liger_kernel" else find(name))
    with pytest.raises(ConfigError, match="policy.fused_layers=true needs the package liger_kernel.*pip install"):
        load_config("easy_vqa_cpu", {"policy.fused_layers": True, "run.dir": str(tmp_path)})
