"""policy.fused_layers in Triton's interpreter, on the CPU; run by test_fused_layers.py, which sets TRITON_INTERPRET.

The interpreter lacks two things that Liger's kernels use, and gets them here: a float argument as a scalar of the
device (`gate_multiplier.to(tl.float32)`), and libdevice's rsqrt.
"""

from __future__ import annotations

import inspect
import sys

import liger_kernel.ops.rms_norm
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from rethinker.config import Config, PolicyConfig, TrainConfig
from rethinker.families import FAMILIES
from rethinker.policy.engine import PolicyEngine
from rethinker.policy.fused_layers import ROTARY
from rethinker.policy.model import load_model
from rethinker.runtime import distributed
from tests.integration.zero3_steps import gradients_at_step
from tests.policy.switches import batch_for, create_family, encoder_for, errors, make, outcome, short_samples

convert = interpreter._implicit_cvt


def convert_floats_too(value):
    if isinstance(value, float):
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)
    return convert(value)


interpreter._implicit_cvt = convert_floats_too
liger_kernel.ops.rms_norm.rsqrt = lambda x: 1.0 / tl.sqrt(x)


# Qwen2-VL's language model is Qwen2.5-VL's.
@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.soak) if name == "qwen2_vl" else name for name in FAMILIES],
)
def folder(request, tmp_path_factory):
    return create_family(request.param, tmp_path_factory.mktemp(request.param))


def test_log_probs_and_gradients_are_those_of_the_plain_layers(folder, tmp_path):
    """In each family: log-probs within 1e-5 and gradients within 1e-5 relative; every norm, SwiGLU and attention of
    the language model is fused; and nothing outside the instance has changed."""
    plain, fused = make(folder, layers=1), make(folder, layers=1, fused_layers=True)
    batch = batch_for(folder, plain, tmp_path)
    logp_error, gradient_error = errors(outcome(fused, batch), outcome(plain, batch))
    print(f"{folder.name}: log-probs {logp_error:.1e}, gradients {gradient_error:.1e}", file=sys.stderr)
    assert logp_error <= 1e-5
    assert gradient_error <= 1e-5
    layers = fused.hf.model.language_model.layers
    parts = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
    assert all("forward" in vars(getattr(layer, part)) for layer in layers for part in parts)
    later = load_model(folder, torch.float32)  # as the hf rollout loads it
    assert not [name for name, module in later.named_modules() if "forward" in vars(module)]
    called = vars(inspect.getmodule(type(layers[0].self_attn)))[ROTARY]
    assert called.__module__.startswith("transformers.")


@pytest.mark.soak
def test_a_zero3_step_is_that_of_the_plain_layers(tmp_path):
    """With ZeRO-3's hooks and gradient checkpointing: loss, entropy and gradients within 1e-5 relative."""
    folder = create_family("qwen2_vl", tmp_path / "model")
    encoder = encoder_for(folder)
    samples = short_samples(encoder, tmp_path, [2])
    ranks = distributed.start(60)
    found = {}
    for fused in (False, True):
        policy = PolicyConfig(dtype="float32", fused_layers=fused, gradient_checkpointing=True)
        config = Config(policy=policy, train=TrainConfig(learning_rate=1e-3))
        engine = PolicyEngine(config, folder, encoder, ranks, total_steps=2)
        gradients = gradients_at_step(engine)
        found[fused] = engine.train_step(samples), gradients
    distributed.stop()
    for name in ("loss", "entropy", "grad_norm"):
        assert found[True][0][name] == pytest.approx(found[False][0][name], rel=1e-5, abs=1e-7)
    for name, gradient in found[False][1].items():
        assert (found[True][1][name] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-6), name
