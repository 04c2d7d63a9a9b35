"""Attention over shared prompts: the policy's own kernel beside FlexAttention and a varlen call that repeats prompts.

    python -m benchmarks.attention [--out FILE]

One layer's attention at the head sizes of Qwen2.5-VL 7B on micro-batches as training packs them: time forward, and
forward with backward, after outputs and gradients at a small size have been held against the masked definition in
fp64. All rates are over the same FLOP, those of the pairs of tokens that see each other with prompts shared, so a
repeated prompt or a masked pair makes a rate lower. A provider that is missing or fails is reported with the reason.
Without a GPU toy sizes, which say nothing about one.

Legend: T tokens of the packed row, L tokens as the kernel sees them, H heads of size E.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Step, measure
from benchmarks.train_step_workload import GPU_TRAFFIC, SIZES, Traffic, Workload
from rethinker.policy import attention as policy_attention
from rethinker.policy.packing import pack, plan_micro_batches
from rethinker.policy.segment_attention import moved
from rethinker.samples import PackedBatch

CASES = {
    "8 queries, responses of about 400": GPU_TRAFFIC,
    "1 query, responses of about 2,000": replace(GPU_TRAFFIC, queries=1, response_median=2000, response_max=4096),
    "16 queries, responses of about 100": replace(GPU_TRAFFIC, queries=16, response_median=100),
}
SMALL = Traffic(2, 3, (2, 3), (3, 20), 6, 40)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query [1, H, L, E], key and value [1, H or a divisor of it, L, E]) -> [1, L, H, E]"""


@dataclass
class Prepared:
    """A provider, ready for a packed row."""

    index: Tensor  # [L] int64: the packed row's position that stands there
    position: Tensor  # [T] int64: where a token of the packed row went; if to several places, one of them
    attend: Attend


def batch_of(traffic: Traffic) -> PackedBatch:
    """One micro-batch of everything; its images count as tokens only."""
    workload = Workload(SIZES["7B"], traffic)
    ((bundles,),) = plan_micro_batches(workload.samples, budget=10**9, world_size=1)
    return pack(bundles, workload.encode, lambda query: {}, lambda p, _: torch.arange(len(p.token_ids)).expand(3, -1))


def visible(prompt: Tensor, response: Tensor) -> Callable[..., Tensor]:
    """The predicate of shared prompts, as FlexAttention's mask_mod, from prompt and response ids [T]."""

    def mask(_batch, _head, i, j):
        return (i >= j) & (prompt[i] == prompt[j]) & ((response[j] == 0) | (response[j] == response[i]))

    return mask


def dense_mask(batch: PackedBatch) -> Tensor:
    """[T, T] bool."""
    place = torch.arange(batch.tokens)
    return visible(batch.prompt_id, batch.response_id)(None, None, place[:, None], place[None])


def visible_pairs(batch: PackedBatch) -> int:
    """Pairs (i, j) that see each other."""
    pairs = 0
    for number in range(int(batch.prompt_id.max()) + 1):
        response = batch.response_id[batch.prompt_id == number]
        P, *lengths = torch.bincount(response).tolist()
        pairs += P * (P + 1) // 2 + sum(n * P + n * (n + 1) // 2 for n in lengths)
    return pairs


# Providers: (batch, device, scale) -> Prepared


def of_policy(batch: PackedBatch, device: str, scale: float) -> Prepared:
    """policy.attention=flash, through the policy's own layout and attention function."""
    layout = moved(policy_attention.lay_out(batch, "flash"), torch.device(device))
    row = torch.arange(batch.tokens, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        function = policy_attention.row_attention
        return function(nn.Identity(), q, k, v, None, scaling=scale, visible=layout.visible)[0]

    return Prepared(row, row, attend)


def varlen_unshared(batch: PackedBatch, device: str, scale: float) -> Prepared:
    """torch's varlen attention over ordinary sequences: every response with a copy of its prompt."""
    from torch.nn.attention.varlen import varlen_attn

    parts = []
    for number in range(int(batch.prompt_id.max()) + 1):
        (own,) = torch.nonzero(batch.prompt_id == number, as_tuple=True)
        response = batch.response_id[own]
        parts += [own[(response == 0) | (response == r)] for r in range(1, int(response.max()) + 1)] or [own]
    index, longest = torch.cat(parts).to(device), max(map(len, parts))
    bounds = torch.tensor([0, *map(len, parts)], device=device).cumsum(0).int()
    position = torch.zeros(batch.tokens, dtype=torch.int64, device=device)
    position[index] = torch.arange(len(index), device=device)
    takes = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in takes else {}
    options |= {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (q, k, v))
        return varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scale, **options)[None]

    return Prepared(index, position, attend)


def flex(batch: PackedBatch, device: str, scale: float) -> Prepared:
    """FlexAttention, compiled for this length (a row padded to its blocks of 128)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    on_gpu = device == "cuda"
    T = batch.tokens
    L = -(-T // 128) * 128
    padding = -1 - torch.arange(L - T)  # prompts of their own
    prompt = torch.cat([batch.prompt_id, padding]).to(device)
    response = torch.cat([batch.response_id, torch.zeros_like(padding)]).to(device)
    mask = create_block_mask(visible(prompt, response), None, None, L, L, device=device, _compile=on_gpu)
    function = torch.compile(flex_attention, dynamic=False) if on_gpu else flex_attention
    index = torch.cat([torch.arange(T), torch.zeros_like(padding)]).to(device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, block_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)

    return Prepared(index, index[:T], attend)


PROVIDERS: dict[str, Callable[[PackedBatch, str, float], Prepared]] = {
    "rethinker flash": of_policy,
    "varlen, prompts repeated": varlen_unshared,
    "flex": flex,
}


# Measuring


def random_inputs(tokens: int, heads: tuple[int, int, int], device: str, dtype: torch.dtype) -> list[Tensor]:
    """query, key and value as `Attend` takes them, in memory as a layer makes them, and the gradient of its result."""
    H, K, E = heads
    generator = torch.Generator(device).manual_seed(0)
    made = [torch.randn(1, tokens, n, E, device=device, generator=generator).to(dtype) for n in (H, K, K, H)]
    return [*(x.transpose(1, 2) for x in made[:3]), made[3]]


def outputs(attend: Attend, inputs: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    out.backward(inputs[3])
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def definition(batch: PackedBatch, device: str, scale: float) -> Attend:
    """Every pair computed, those that do not see each other masked."""
    mask = dense_mask(batch).to(device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)

    return attend


def errors(provider: Callable, device: str, dtype: torch.dtype) -> dict[str, list[float]]:
    """Relative L2 errors of the result and the gradients of q, k, v against fp64: the provider's, and those of the
    definition in the provider's own type."""
    batch, scale = batch_of(SMALL), 64**-0.5
    inputs = random_inputs(batch.tokens, (8, 2, 64), device, dtype)
    prepared = provider(batch, device, scale)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return prepared.attend(*(x[:, :, prepared.index] for x in (q, k, v)))[:, prepared.position]

    plain = definition(batch, device, scale)
    want = outputs(plain, [x.double() for x in inputs])

    def error(got: list[Tensor]) -> list[float]:
        return [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]

    return {"provider": error(outputs(attend, inputs)), "definition": error(outputs(plain, inputs))}


def run(
    provider: Callable, batch: PackedBatch, heads: tuple[int, int, int], device: str, repeats: int
) -> dict[str, Any]:
    """Times of one provider on one batch."""
    start = time.perf_counter()
    prepared = provider(batch, device, heads[2] ** -0.5)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    *leaves, upstream = random_inputs(len(prepared.index), heads, device, dtype)

    def both() -> None:
        for leaf in leaves:
            leaf.grad = None
        prepared.attend(*leaves).backward(upstream)

    forward: Step = torch.no_grad()(lambda: prepared.attend(*leaves))
    flop = 4 * heads[0] * heads[2] * visible_pairs(batch)
    forward_only = measure(forward, repeats)
    for leaf in leaves:
        leaf.requires_grad_()
    with_backward = measure(both, repeats)
    return {
        "tokens": len(prepared.index),
        "forward": forward_only | {"tflop_per_s": flop / forward_only["median_ms"] / 1e9},
        "forward+backward": with_backward | {"tflop_per_s": 3.5 * flop / with_backward["median_ms"] / 1e9},
        "seconds_in_all": time.perf_counter() - start,  # what compiling takes shows here
    }


def attempt(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Its result, or why there is none."""
    try:
        return function(*arguments)
    except ImportError as error:
        return {"skipped": str(error).splitlines()[0]}
    except Exception as error:  # a provider's failure is a result of its own
        return {"failed": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the result; 1 if the policy's own kernel failed or is inexact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result here, after every provider")
    options = parser.parse_args(arguments)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    size = SIZES["7B"]
    heads = (size.heads, size.kv_heads, size.hidden // size.heads) if on_gpu else (4, 2, 16)
    cases = CASES if on_gpu else {"toy": SMALL}
    result: dict[str, Any] = {"heads_kv_heads_size": heads, "errors": {}, "cases": {}}
    wrong = []
    for name, provider in PROVIDERS.items():
        found = result["errors"][name] = attempt(errors, provider, device, dtype)
        pairs = zip(found.get("provider", [torch.inf]), found.get("definition", [0.0]), strict=True)
        if name.startswith("rethinker") and not all(mine <= 1.5 * plain + 1e-6 for mine, plain in pairs):
            wrong.append(name)
        print(f"{name:28} relative errors {found}", flush=True)
    for case, traffic in cases.items():
        batch = batch_of(traffic)
        shared = result["cases"][case] = {"traffic": asdict(traffic), "tokens": batch.tokens, "providers": {}}
        print(f"{case}: T = {batch.tokens:,}")
        for name, provider in PROVIDERS.items():
            found = shared["providers"][name] = attempt(run, provider, batch, heads, device, 7 if on_gpu else 1)
            print(f"  {name:28} {_line(found)}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(result, indent=2) + "\n")
    for name in wrong:
        print(f"{name} is not as exact as its definition")
    return int(bool(wrong))


def _line(found: dict[str, Any]) -> str:
    if "forward" not in found:
        return next(f"{key}: {value}" for key, value in found.items())
    return "   ".join(
        f"{name} {found[name]['median_ms']:.3f} ms ({found[name]['tflop_per_s']:.0f} TFLOP/s)"
        for name in ("forward", "forward+backward")
    )


if __name__ == "__main__":
    sys.exit(main())
