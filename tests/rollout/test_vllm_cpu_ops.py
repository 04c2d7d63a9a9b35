"""Quicker classes in place of vLLM's own on a CPU: the same numbers, also where a kernel does not fit."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from rethinker.rollout.vllm_settings import cpu_block_size

if torch.cuda.is_available():
    pytest.skip("vLLM's GPU build has no CPU kernels", allow_module_level=True)

BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def vllm():
    """The classes under test, of vLLM and in their place; imported here, since it takes long."""
    pytest.importorskip("vllm")
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    from rethinker.rollout import vllm_cpu_ops

    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(mode=0))):
        torch.manual_seed(0)
        yield vllm_cpu_ops


@pytest.fixture
def must_take(monkeypatch):
    """A function after which a layer of this class may leave nothing to vLLM's own forward."""

    def must_take(layer: type) -> None:
        def left_to_vllm(*arguments):
            raise AssertionError("the kernel was not called")

        monkeypatch.setattr(layer, "forward_cpu", left_to_vllm, raising=False)

    return must_take


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=BOUND[found.dtype], rtol=BOUND[found.dtype])


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("size", [32, 96, 128, 100, 8])
def test_rms_norm(size, dtype, vllm, must_take):
    if size % vllm.BLOCK == 0:
        must_take(vllm.RMSNorm)
    layer = vllm.RMSNorm(size, eps=1e-6, dtype=dtype)
    assert layer._forward_method.__func__ is vllm.KernelRMSNorm.forward_cpu
    layer.weight.data.normal_()
    x, residual = torch.randn(2, 7, size, dtype=dtype)
    close(layer(x.clone()), layer.forward_native(x.clone()))
    for found, expected in zip(layer(x.clone(), residual.clone()), layer.forward_native(x, residual), strict=True):
        close(found, expected)


def test_norms_that_the_kernel_does_not_take(vllm):
    """Queries of a fused projection are a strided view; some models normalize by a part, or without weights."""
    layer = vllm.RMSNorm(64)
    view = torch.randn(5, 3 * 64)[:, 64:128]
    close(layer(view), layer.forward_native(view.clone()))
    x, residual = torch.randn(5, 64), torch.randn(5, 128)[:, :64]
    for found, expected in zip(layer(x.clone(), residual.clone()), layer.forward_native(x, residual), strict=True):
        close(found, expected)
    for layer in (vllm.RMSNorm(64, var_hidden_size=32), vllm.RMSNorm(64, has_weight=False)):
        close(layer(x), layer.forward_native(x))


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_silu_and_mul(dtype, vllm):
    layer = vllm.SiluAndMul()
    assert layer._forward_method.__func__ is vllm.InPlaceSiluAndMul.forward_cpu
    x = torch.randn(7, 2 * 100, dtype=dtype)
    before = x.clone()
    for given in (x, x.expand(3, 7, -1), x[:, 20:180]):
        close(layer(given), layer.forward_native(given))
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("size", [32, 128, 24])
def test_rotations(size, interleaved, dtype, vllm, must_take):
    """Of several steps, whose positions may lie in the same memory, and several layers of each."""
    half = size // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    layer = vllm.MRotaryEmbedding(
        size, size, 64, 1e4, True, dtype, mrope_section=sections, mrope_interleaved=interleaved
    )
    assert layer._forward_method.__func__ is vllm.KernelMRotaryEmbedding.forward_cpu
    one, pair = torch.arange(5), torch.randn(2, 5, 2 * size, dtype=dtype)
    for found, wanted in zip(layer(one, *pair), layer.forward_native(one, *pair), strict=True):
        close(found, wanted)
    if size % vllm.BLOCK == 0:
        must_take(vllm.MRotaryEmbedding)
    positions = torch.empty(3, 9, dtype=torch.int64)
    for tokens in (9, 9, 5):
        positions.random_(0, 64)
        for _ in range(2):
            fused = torch.randn(tokens, 4 * size, dtype=dtype)  # 2 query heads, one key, one value
            query, key, value = fused.split([2 * size, size, size], dim=1)
            expected = layer.forward_native(positions[:, :tokens], query.clone(), key.clone())
            before = value.clone()
            for found, wanted in zip(layer(positions[:, :tokens], query, key), expected, strict=True):
                close(found, wanted)
            assert torch.equal(value, before)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_every_head_is_rotated(dtype, vllm):
    """Also where heads are a dimension of their own, as LFM2 hands them over."""
    layer = vllm.RotaryEmbedding(32, 32, 64, 1e4, True, dtype)
    assert layer._forward_method.__func__ is vllm.EveryHeadRotaryEmbedding.forward_cpu
    places, (query, key) = torch.randint(0, 64, (5,)), torch.randn(2, 5, 3 * 32, dtype=dtype)
    expected = layer.forward_native(places, query.clone(), key.clone())
    for heads in (query.shape, (5, 3, 32)):
        found = layer(places, query.clone().view(heads), key.clone().view(heads))
        for part, wanted in zip(found, expected, strict=True):
            close(part, wanted.view(heads))


def test_a_server_has_them_before_its_model_is_built(vllm):
    """A server's worker imports its extension first; this process may have registered the classes already."""
    code = """
from rethinker.runtime.torchvision_cpu import make_importable
make_importable()
import rethinker.rollout.server.worker
from vllm.model_executor.custom_op import op_registry_oot
from vllm.v1.attention.backends.registry import AttentionBackendEnum
print(*(layer.__name__ for layer in op_registry_oot.values()), AttentionBackendEnum.CPU_ATTN.get_path())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    layers = ["KernelRMSNorm", "InPlaceSiluAndMul", "EveryHeadRotaryEmbedding", "KernelMRotaryEmbedding"]
    assert done.stdout.split()[-6:] == [
        "AnyGatedDeltaNetAttention",
        *layers,
        f"{vllm.__name__}.SmallBlockAttention",
    ]


@pytest.mark.parametrize(
    ("dtype", "machine", "size"),
    [("float32", "x86_64", 16), ("float32", "aarch64", 32), ("float32", "arm64", 32), ("bfloat16", "x86_64", 32)],
)
def test_attention_has_a_kernel_for_its_blocks(dtype, machine, size, vllm, monkeypatch):
    """vLLM chooses the kernel by type, size and processor: that of 16 lanes for 16 tokens, AMX's or ARM's for 32."""
    from vllm.platforms import CpuArchEnum
    from vllm.v1.attention.backends import cpu_attn
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.setattr("platform.machine", lambda: machine)
    assert cpu_block_size(dtype) == size
    assert AttentionBackendEnum.CPU_ATTN.get_class() is vllm.SmallBlockAttention
    arch = CpuArchEnum.X86 if machine == "x86_64" else CpuArchEnum.ARM
    monkeypatch.setattr(cpu_attn.current_platform, "get_cpu_architecture", lambda: arch)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    kernel = cpu_attn._get_attn_isa(getattr(torch, dtype), size, 128)
    assert kernel == {16: "vec16", 32: "amx" if machine == "x86_64" else "neon"}[size]
