"""What only a GPU shows: exactness in 16 bits, repetition, 64-bit offsets, streams, CUDA graphs, a second GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import reference
from rethinker_kernels import (
    group_advantages,
    grpo_loss,
    linear_grpo_loss,
    linear_selective_log_softmax,
    selective_log_softmax,
)

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


def batch(rows: int, vocabulary: int, width: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Inputs of linear_grpo_loss: a head that makes logits of size 3, and ratios on both sides of the clips."""
    g = torch.Generator("cuda").manual_seed(rows)
    options = {"device": "cuda", "generator": g}
    hidden = torch.randn(rows, width, **options).to(dtype)
    weight = (3 * torch.randn(vocabulary, width, **options) / width**0.5).to(dtype)
    index = torch.randint(vocabulary, (rows,), **options)
    logps = linear_selective_log_softmax(hidden, weight, index)
    return {
        "hidden": hidden,
        "weight": weight,
        "index": index,
        "old_logps": logps + 0.2 * torch.randn(rows, **options),
        "advantages": torch.randn(rows, **options),
    }


def step(inputs: dict[str, torch.Tensor], op=linear_grpo_loss) -> list[torch.Tensor]:
    """Loss, log-probs, statistics and both gradients."""
    leaves = {k: inputs[k].detach().clone().requires_grad_() for k in ("hidden", "weight")}
    outputs = op(**inputs | leaves, normalizer=float(inputs["index"].numel()))
    outputs[0].backward()
    return [*(o.detach() for o in outputs), *(leaf.grad for leaf in leaves.values())]


def test_fuzz_on_the_gpu():
    """The interpreter's fuzzing suite, with compiled kernels."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    suites = [f"tests/kernels/fuzz_{part}.py" for part in ("triton", "exponentials")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suites]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """No access out of bounds and no race in a part of the fuzzing suite that reaches every kernel."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    # Every tensor an allocation of its own: a read beyond it is then one out of bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    environment.pop("TRITON_INTERPRET", None)
    part = "(test_log_softmax and near and 7-129) or out_of_range or linear_grpo_loss or any_loss or poisoned"
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q"]
    command += ["-p", "no:cacheprovider", "tests/kernels/fuzz_triton.py", "-k", part]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocabulary", [32_003, 151_936])
def test_as_exact_as_plain_pytorch(dtype, vocabulary):
    """Errors against fp64 from the same inputs: no larger than plain PyTorch's in the same type."""
    inputs = batch(300, vocabulary, 256, dtype)
    exact = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    want, plain = step(exact, reference.linear_grpo_loss), step(inputs, reference.linear_grpo_loss)
    for name, g, p, w in zip(("loss", "logps", "stats", "hidden", "weight"), step(inputs), plain, want, strict=True):
        if name != "stats":
            error, allowed = (g.double() - w).norm(), (p.double() - w).norm()
            assert error <= 1.05 * allowed + 1e-6 * w.norm(), (name, error.item(), allowed.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_log_prob_from_given_logits(dtype):
    """|error| <= 2e-5 against fp64 at a real vocabulary, entropy too."""
    logits = (4 * torch.randn(64, 151_936, device="cuda")).to(dtype)
    index = torch.randint(151_936, (64,), device="cuda")
    got = selective_log_softmax(logits, index, return_entropy=True)
    want = reference.selective_log_softmax(logits.double(), index, return_entropy=True)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() <= 2e-5


def test_bitwise_repeatable():
    """Two runs of the step and of the forward-only op agree bit for bit."""
    inputs = batch(1000, 50_000, 512)
    for a, b in zip(step(inputs), step(inputs), strict=True):
        assert torch.equal(a, b)
    args = inputs["hidden"], inputs["weight"], inputs["index"]
    assert torch.equal(linear_selective_log_softmax(*args), linear_selective_log_softmax(*args))


def test_more_than_2_to_the_31_logits():
    """Rows whose offset does not fit 32 bits, forward and backward."""
    rows, vocabulary = 2**31 // 151_936 + 64, 151_936
    if torch.cuda.mem_get_info()[0] < 14e9:
        pytest.skip("needs a GPU with 14 GB of free memory")
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[-32:] = torch.randn(32, vocabulary, device="cuda")
    logits.requires_grad_()
    index = torch.randint(vocabulary, (rows,), device="cuda")
    logps = selective_log_softmax(logits, index)
    logps[-32:].sum().backward()
    tail = logits.detach()[-32:].double().requires_grad_()
    want = reference.selective_log_softmax(tail, index[-32:])
    want.sum().backward()
    torch.testing.assert_close(logps[-32:].double(), want, atol=2e-5, rtol=0)
    torch.testing.assert_close(logits.grad[-32:].double(), tail.grad, atol=1e-6, rtol=1e-2)
    assert logits.grad[:-32].count_nonzero() == 0


def test_other_stream():
    """Work queued on a stream of its own reads what that stream wrote before."""
    inputs = batch(500, 30_000, 128)
    want = step(inputs)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        delayed = {k: v.clone() for k, v in inputs.items()}
        got = step(delayed)
    stream.synchronize()
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_tensors_on_another_gpu_than_the_current_one():
    """Kernels run where their tensors are, with the result that the first GPU gives."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = batch(300, 5_000, 64)
    offsets = torch.tensor([0, 100, 300], device="cuda")
    elsewhere = {k: v.to("cuda:1") for k, v in inputs.items()}
    assert torch.cuda.current_device() == 0
    got, want = step(elsewhere), step(inputs)
    for place, values, into in (("cuda:1", elsewhere, got), ("cuda:0", inputs, want)):
        args = (values["old_logps"], values["old_logps"] + 0.1, values["advantages"])
        into += grpo_loss(*args, normalizer=1.0)
        into += group_advantages(values["advantages"], offsets.to(place))
    for a, b in zip(got, want, strict=True):
        assert a.device.index == 1
        torch.testing.assert_close(a.to("cuda:0"), b)


def test_cuda_graph_replay():
    """Captured once, replayed with new inputs: what an eager call gives for them."""
    first, second = batch(256, 20_000, 128), batch(257, 20_000, 128)
    second = {k: v[:256] if k != "weight" else v for k, v in second.items()}
    offsets = torch.tensor([0, 100, 256], device="cuda")

    def work(inputs):
        outputs = step(inputs)
        logps = outputs[1].detach().requires_grad_()
        loss, _ = grpo_loss(logps, inputs["old_logps"], inputs["advantages"], normalizer=2.0)
        advantages, _ = group_advantages(inputs["advantages"], offsets)
        return [*outputs, *torch.autograd.grad(loss, logps), advantages]

    static = {k: v.clone() for k, v in first.items()}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work(static)
    for name, value in second.items():
        static[name].copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, work(second), strict=True):
        assert torch.equal(a, b)


def test_memory_stays_bounded():
    """A step allocates less than half of what the logits [R, V] alone would take."""
    inputs = batch(16_384, 151_936, 64)
    step({k: v[:128] if k != "weight" else v for k, v in inputs.items()})
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(inputs)
    assert torch.cuda.max_memory_allocated() - before < 16_384 * 151_936 * 2 / 2
