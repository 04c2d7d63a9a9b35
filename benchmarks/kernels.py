"""Speed and memory of the fused ops, beside plain PyTorch, torch.compile and every installed peer.

    python -m benchmarks.kernels [OP ...] [--size 7B] [--repeats 20] [--providers NAME ...] [--without NAME ...]

Writes results/<gpu>/kernels.json, with the machine, and one chart per op. Without a GPU it says so and measures the CPU
paths at a small size, which says nothing about a GPU. Inputs come from one factory per op; a peer is skipped, with the
reason, where it is not installed or does not take the inputs. Floors come from a copy and from plain matrix products
of the same shapes, timed the same way just before the op (benchmarks.ceilings).

Legend: R rows (tokens), D hidden size, V vocabulary.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rethinker_kernels as ours
from benchmarks import kernel_peers as peers
from benchmarks import reference
from benchmarks.ceilings import HEADS, ROWS, SMALL, copy_bytes_per_s, head_products
from benchmarks.machine import describe
from benchmarks.timing import Step, kernels_of, measure

RESULTS = Path(__file__).parent / "results"


# Inputs: the one factory of every op


def head_inputs(rows: int, width: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """Hidden states, a head that makes logits of size 3, tokens, and what the loss needs per token.

    The behaviour log-probs are near the policy's, so that hardly a row is clipped and every provider has all its work.
    """
    g = torch.Generator(device).manual_seed(0)
    options = {"device": device, "generator": g}
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(rows, width, **options).to(dtype)
    weight = (3 * torch.randn(vocabulary, width, **options) / width**0.5).to(dtype)
    index = torch.randint(vocabulary, (rows,), **options)
    logps = ours.linear_selective_log_softmax(hidden, weight, index)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.requires_grad_(),
        "index": index,
        "old_logps": logps + 0.03 * torch.randn(rows, **options),
        # One per sequence, as all peers have it.
        "advantages": torch.randn(peers.SEQUENCES, **options).repeat_interleave(rows // peers.SEQUENCES),
    }


def logits_inputs(rows: int, width: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    inputs = head_inputs(rows, 1, 8, device)
    g = torch.Generator(device).manual_seed(0)
    logits = torch.empty(rows, vocabulary, device=device, dtype=inputs["hidden"].dtype)
    return {
        "logits": logits.normal_(0, 3, generator=g).requires_grad_(),
        "index": torch.randint(vocabulary, (rows,), device=device, generator=g),
    }


def vector_inputs(rows: int, width: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    inputs = head_inputs(rows, 1, 8, device)
    logps = (inputs["old_logps"] + 0.1).requires_grad_()
    return {"logps": logps, "old_logps": inputs["old_logps"], "advantages": inputs["advantages"]}


def reward_inputs(rows: int, width: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    return {
        "rewards": torch.rand(rows, device=device).round(),
        "group_offsets": torch.arange(0, rows + 1, 8, device=device),
    }


# Providers: (inputs) -> one step, forward or forward and backward


def log_softmax_forward(op: Callable) -> Callable[[dict], Step]:
    def provider(inputs: dict) -> Step:
        return torch.no_grad()(lambda: op(inputs["logits"], inputs["index"]))

    return provider


def log_softmax_step(op: Callable) -> Callable[[dict], Step]:
    def provider(inputs: dict) -> Step:
        def step():
            outputs = op(inputs["logits"], inputs["index"])
            inputs["logits"].grad = None
            (outputs[0] if isinstance(outputs, tuple) else outputs).sum().backward()

        return step

    return provider


def linear_forward(op: Callable) -> Callable[[dict], Step]:
    def provider(inputs: dict) -> Step:
        return torch.no_grad()(lambda: op(inputs["hidden"], inputs["weight"], inputs["index"]))

    return provider


def loss_step(op: Callable[[dict], Tensor]) -> Callable[[dict], Step]:
    """Forward and backward of a loss of hidden states and the head's weight."""

    def provider(inputs: dict) -> Step:
        def step():
            inputs["hidden"].grad = inputs["weight"].grad = None
            op(inputs).backward()

        return step

    return provider


def grpo_of(module: Any) -> Callable[[dict], Tensor]:
    return lambda inputs: module.linear_grpo_loss(**inputs, normalizer=float(len(inputs["index"])))[0]


def surrogate_step(op: Callable) -> Callable[[dict], Step]:
    def provider(inputs: dict) -> Step:
        def step():
            inputs["logps"].grad = None
            op(**inputs, normalizer=1000.0)[0].backward()

        return step

    return provider


def advantages_of(module: Any) -> Callable[[dict], Step]:
    return lambda inputs: lambda: module.group_advantages(**inputs)


def grpo_from(log_probs: Callable, sign: float = 1.0) -> Callable[[dict], Tensor]:
    """The GRPO loss over a peer's own log-probs (or, with sign -1, their negatives)."""

    def loss(inputs: dict) -> Tensor:
        logps = sign * log_probs(inputs["hidden"], inputs["weight"], inputs["index"])[0]
        about = inputs["old_logps"], inputs["advantages"]
        return ours.grpo_loss(logps.float(), *about, normalizer=float(len(logps)))[0]

    return loss


def compiled(function: Callable) -> Callable:
    """The function through torch.compile, whose own import takes seconds, from its first call on."""
    made = functools.cache(lambda: torch.compile(function, dynamic=False))
    return lambda *given, **options: made()(*given, **options)


def with_entropy(op: Callable) -> Callable:
    return lambda logits, index: op(logits, index, return_entropy=True)


def head_with_entropy(module: Any) -> Callable:
    return lambda *given: module.linear_selective_log_softmax(*given, return_entropy=True)


# Floors: (size, repeats) -> milliseconds


def copy_floor(passes: int) -> Callable[[tuple[int, int, int], int], float]:
    """Of so many passes over the logits, at the rate of a copy."""

    def floor(size: tuple[int, int, int], repeats: int) -> float:
        width = 2 if torch.cuda.is_available() else 4
        return 1e3 * passes * width * size[0] * size[2] / copy_bytes_per_s(repeats)

    return floor


def product_floor(products: int) -> Callable[[tuple[int, int, int], int], float]:
    """The head's plain matrix products, over as long a time as the op."""
    return lambda size, repeats: measure(head_products(size, products), repeats)["median_ms"]


OPS: dict[str, dict[str, Any]] = {
    "selective_log_softmax forward": {
        "inputs": logits_inputs,
        "floor": copy_floor(1),
        "providers": {
            "rethinker": log_softmax_forward(with_entropy(ours.selective_log_softmax)),
            "pytorch": log_softmax_forward(with_entropy(reference.selective_log_softmax)),
            "torch.compile": log_softmax_forward(compiled(with_entropy(reference.selective_log_softmax))),
            "trl": log_softmax_forward(peers.trl_log_softmax),
        },
    },
    "selective_log_softmax forward+backward": {
        "inputs": logits_inputs,
        "floor": copy_floor(3),
        "providers": {
            "rethinker": log_softmax_step(with_entropy(ours.selective_log_softmax)),
            "pytorch": log_softmax_step(with_entropy(reference.selective_log_softmax)),
            "torch.compile": log_softmax_step(compiled(with_entropy(reference.selective_log_softmax))),
            "trl": log_softmax_step(peers.trl_log_softmax),
        },
    },
    "linear_selective_log_softmax forward": {
        "inputs": head_inputs,
        "floor": product_floor(1),
        "providers": {
            "rethinker": linear_forward(head_with_entropy(ours)),
            "pytorch": linear_forward(head_with_entropy(reference)),
            "liger (CuTe on sm_90)": linear_forward(peers.liger_scaled_cross_entropy),
            "verl": linear_forward(peers.verl_log_probs),
        },
    },
    "linear_grpo_loss": {
        "inputs": head_inputs,
        "floor": product_floor(3),
        "providers": {
            "rethinker": loss_step(grpo_of(ours)),
            "pytorch": loss_step(grpo_of(reference)),
            "torch.compile": loss_step(compiled(grpo_of(reference))),
            "liger grpo": loss_step(peers.liger_grpo),
            "liger (CuTe on sm_90), log-probs": loss_step(grpo_from(peers.liger_scaled_cross_entropy, -1.0)),
            "verl, log-probs": loss_step(grpo_from(peers.verl_log_probs)),
            "liger, cross-entropy only": loss_step(peers.liger_cross_entropy),
            "cut-cross-entropy, cross-entropy only": loss_step(peers.cut_cross_entropy),
            "quack, cross-entropy only": loss_step(peers.quack_cross_entropy),
        },
    },
    "grpo_loss": {
        "inputs": vector_inputs,
        "floor": None,
        "providers": {
            "rethinker": surrogate_step(ours.grpo_loss),
            "pytorch": surrogate_step(reference.grpo_loss),
            "torch.compile": surrogate_step(compiled(reference.grpo_loss)),
        },
    },
    "group_advantages": {
        "inputs": reward_inputs,
        "floor": None,
        "providers": {"rethinker": advantages_of(ours)},
    },
}


# Measuring


def gradient_error(inputs: dict, name: str) -> float:
    """Largest error of the gradient of the first 256 hidden states against fp64, relative to the largest entry.

    A row's gradient depends on its own row only. Peers that know the cross-entropy alone are held against its mean.
    """
    some = slice(0, 256)
    hidden = inputs["hidden"].detach()[some].double().requires_grad_()
    logps = reference.linear_selective_log_softmax(hidden, inputs["weight"].detach().double(), inputs["index"][some])
    rows = float(len(inputs["index"]))
    if "cross-entropy only" in name:
        loss = -logps.sum() / rows
    else:
        about = inputs["old_logps"][some], inputs["advantages"][some]
        loss, _ = reference.grpo_loss(logps, *about, normalizer=rows)
    loss.backward()
    return ((inputs["hidden"].grad[some].double() - hidden.grad).abs().max() / hidden.grad.abs().max()).item()


def run(op: str, size: tuple[int, int, int], repeats: int, chosen: list[str]) -> dict[str, Any]:
    """An op's providers of these names on the same inputs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about, results, kernels = OPS[op], {}, None
    floor = about["floor"](size, repeats) if about["floor"] else None
    inputs = about["inputs"](*size, device)
    for name, provider in about["providers"].items():
        if name not in chosen or (device == "cpu" and name == "torch.compile"):
            continue  # compiling for a CPU takes longer than the measurement is worth
        for tensor in inputs.values():
            tensor.grad = None
        try:
            step = provider(inputs)
            results[name] = measure(step, repeats)
            if name == "rethinker":
                kernels = kernels_of(step)
        except ImportError as error:
            results[name] = {"skipped": str(error).splitlines()[0]}
        except Exception as error:  # a peer's failure is a result of its own
            if name == "rethinker":
                raise
            results[name] = {
                "failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            }
        if op == "linear_grpo_loss" and "median_ms" in results[name]:
            results[name]["gradient_error"] = gradient_error(inputs, name)
        if floor and "median_ms" in results[name]:
            results[name]["share_of_floor"] = floor / results[name]["median_ms"]
        print(f"  {name:38} {_line(results[name])}", flush=True)
    return {"op": op, "rows_width_vocabulary": size, "floor_ms": floor, "providers": results, "our_kernels": kernels}


def _line(result: dict[str, Any]) -> str:
    if "median_ms" not in result:
        return next(f"{key}: {value}" for key, value in result.items())
    low, high = result["quartiles_ms"]
    text = f"{result['median_ms']:10.3f} ms ({low:.3f} to {high:.3f}), host {result['host_ms']:.3f} ms"
    if result["memory_mib"] is not None:
        text += f" {result['memory_mib']:10.0f} MiB"
    if "gradient_error" in result:
        text += f"  gradient error {result['gradient_error']:.1e}"
    return text + (f"  {result['share_of_floor']:.0%} of the floor's speed" if "share_of_floor" in result else "")


def chart(result: dict[str, Any], title: str, path: Path) -> None:
    """Horizontal bars of milliseconds, with the floor as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    measured = {name: r for name, r in result["providers"].items() if "median_ms" in r}
    figure, axes = pyplot.subplots(figsize=(7, 0.5 * len(measured) + 1.6))
    medians = [r["median_ms"] for r in measured.values()]
    spread = [[abs(r["quartiles_ms"][i] - r["median_ms"]) for r in measured.values()] for i in (0, 1)]
    axes.barh(list(measured), medians, xerr=spread, color=["C0" if n == "rethinker" else "0.7" for n in measured])
    if result["floor_ms"]:
        axes.axvline(result["floor_ms"], color="C3", linestyle="--", label="floor")
        axes.legend()
    axes.invert_yaxis()
    axes.set(xlabel="ms (median, quartiles)", title=title)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"what to measure, by the start of its name: {', '.join(OPS)}")
    parser.add_argument("--size", choices=HEADS, default="7B", help="whose head (GPU only)")
    parser.add_argument("--rows", type=int, default=ROWS, help="tokens (GPU only)")
    parser.add_argument("--repeats", type=int, default=20)
    names = sorted({name for op in OPS.values() for name in op["providers"]})
    parser.add_argument("--providers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--without", nargs="+", choices=names, default=[], metavar="NAME", help="leave these out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    machine = describe()
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        print("No CUDA device: the CPU paths only, at a small size. These figures say nothing about a GPU.")
    size = (args.rows, *HEADS[args.size]) if on_gpu else SMALL
    chosen = [op for op in OPS if not args.ops or any(op.startswith(name) for name in args.ops)]
    if not chosen:
        parser.error(f"no op starts with {', '.join(args.ops)}; there are {', '.join(OPS)}")
    folder = args.out / (re.sub(r"\W+", "-", machine["gpu"]).strip("-").lower() if on_gpu else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine, "head": args.size if on_gpu else "small", "results": []}
    providers = [name for name in args.providers if name not in args.without]
    for op in chosen:
        print(f"{op}, R, D, V = {size}", flush=True)
        result = run(op, size, args.repeats, providers)
        label = f"{op}, R, D, V = {', '.join(f'{n:,}' for n in size)}, {machine['gpu'] or machine['cpu']}"
        chart(result, label, folder / f"kernels_{re.sub(r'[^a-z_]+', '_', op)}.svg")
        report["results"].append(result)
        report["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        (folder / "kernels.json").write_text(json.dumps(report, indent=2) + "\n")  # what follows may be cut off
    print(f"wrote {folder / 'kernels.json'}")


if __name__ == "__main__":
    main()
