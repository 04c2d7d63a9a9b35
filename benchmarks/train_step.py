"""One training step's forward and backward on Qwen2.5-VL: this project beside eager, torch.compile and Liger.

    python -m benchmarks.train_step [--size 3B] [--layers N] [--variants NAME ...] [--repeats 5]

Timed is the work of all micro-batches of a step (zeroing the gradients, copying to the device, forward, backward) from
the same random weights on the same queries and responses. The optimizer, the rollout and the layout of batches are not.
Every variant has a process of its own: on a GPU one after another, on a CPU taking turns. Before it is timed, its loss
and a part of every parameter's gradient must agree with the first variant's. One that disagrees, is missing or runs out
of memory is reported with the reason.

Variants: `eager` (transformers' model, one copy of prompt and image per response, padded batches sorted by length,
whole logits of the response columns, plain PyTorch loss), `torch.compile` (the same, decoder layers and loss compiled),
`liger` (Liger's layers, fused head and GRPO loss, same batches), `rethinker` (shared prompts, fused loss),
`rethinker per-sample` (the same without sharing), `rethinker sdpa` (SDPA instead of flash attention). `eager`
and its kin compute no entropy; `rethinker` does.

Useful tokens are those of the per-sample layout without padding, the same number for every variant; processed tokens
are what a variant's language model runs over, padding included and shared prompts once. MFU likewise, by the formula of
train_step_workload.flops over the GPU's dense bf16 peak: above 1 is possible over useful work, as sharing avoids some.
Writes results/<gpu>/train_step.json and train_step.svg. Without a GPU it says so and takes a small model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import cores, describe
from benchmarks.train_step_run import TOLERANCES, Job, compare, score
from benchmarks.train_step_variants import VARIANTS, Settings
from benchmarks.train_step_workload import CPU_TRAFFIC, GPU_TRAFFIC, SIZES, Workload, described

RESULTS = Path(__file__).parent / "results"
DRIFT = 0.08  # of the behaviour's log-probs, nats: about 1% of the tokens are clipped


def _line(result: dict[str, Any]) -> str:
    if "median_s" not in result:
        return next(f"{kind}: {result[kind]}" for kind in ("skipped", "failed") if kind in result)
    low, high = result["quartiles_s"]
    text = (
        f"{result['median_s']:8.3f} s ({low:.3f} to {high:.3f})  {result['useful_tokens_per_s']:9,.0f} useful tokens/s"
        f"  {result['processed_tokens_per_s']:9,.0f} processed tokens/s  {result['memory_gib']:7.2f} GiB"
    )
    if result["useful_mfu"]:
        text += f"  MFU {result['useful_mfu']:.1%} useful, {result['processed_mfu']:.1%} processed"
    return text


def chart(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Bars of step time, with quartiles, and of memory beyond the weights."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    measured = {name: r for name, r in results.items() if "median_s" in r}
    colours = ["C0" if name.startswith("rethinker") else "0.7" for name in measured]
    figure, (times, memory) = pyplot.subplots(1, 2, figsize=(10, 0.45 * len(measured) + 1.8), sharey=True)
    spread = [[abs(r["quartiles_s"][i] - r["median_s"]) for r in measured.values()] for i in (0, 1)]
    times.barh(list(measured), [r["median_s"] for r in measured.values()], xerr=spread, color=colours)
    memory.barh(list(measured), [r["memory_gib"] for r in measured.values()], color=colours)
    times.invert_yaxis()
    times.set(xlabel="seconds of a step (median, quartiles)")
    memory.set(xlabel="peak memory beyond the weights, GiB")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, with defaults for the machine at hand."""
    on_gpu = torch.cuda.is_available()
    traffic = GPU_TRAFFIC if on_gpu else CPU_TRAFFIC
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--size", choices=SIZES, default="3B" if on_gpu else "small", help="which Qwen2.5-VL (default: %(default)s)")
    add("--layers", type=int, help="decoder layers, for a model that would not fit; the result says so")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME", help=", ".join(VARIANTS))
    add("--queries", type=int, default=traffic.queries, help="queries of a step (default: %(default)s)")
    add("--group-size", type=int, default=traffic.group_size, help="responses per query (default: %(default)s)")
    add("--response-median", type=int, default=traffic.response_median, help="tokens (default: %(default)s)")
    add("--response-max", type=int, default=traffic.response_max, help="tokens (default: %(default)s)")
    add("--seed", type=int, default=0, help="of lengths, tokens and pixels")
    add(
        "--micro-batch-tokens",
        type=int,
        default=16_384 if on_gpu else 2_048,
        help="most tokens of a micro-batch, padding included, for every variant (default: %(default)s)",
    )
    add("--gradient-checkpointing", action="store_true", help="in every variant")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if on_gpu else "float32")
    add(
        "--peer-attention",
        choices=["sdpa", "flash_attention_2"],
        default="sdpa",
        help="of eager, torch.compile and liger; flash_attention_2 needs flash-attn (default: %(default)s)",
    )
    add("--repeats", type=int, default=5, help="timed steps of each variant (default: %(default)s)")
    add("--threads", type=int, default=cores(), help="CPU threads (default: %(default)s)")
    add("--trace", type=Path, help="folder for a torch profiler trace of one step of each variant")
    add("--out", type=Path, default=RESULTS, help="folder of results (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: quartiles need at least 2")
    if options.group_size < 2:
        parser.error(f"--group-size {options.group_size}: a group of one has no advantage; at least 2")
    if options.layers is not None and not 1 <= options.layers <= SIZES[options.size].layers:
        parser.error(f"--layers {options.layers}: {options.size} has 1 to {SIZES[options.size].layers}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the result; 1 if a variant of this project failed or disagreed."""
    options = parse(arguments)
    os.environ.update(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    if not on_gpu:
        print("No CUDA device: a small model on the CPU. These figures say nothing about a GPU.")
    traffic = replace(
        GPU_TRAFFIC if on_gpu else CPU_TRAFFIC,
        queries=options.queries,
        group_size=options.group_size,
        response_median=options.response_median,
        response_max=options.response_max,
        seed=options.seed,
    )
    workload = Workload(SIZES[options.size], traffic)
    settings = Settings(
        device,
        getattr(torch, options.dtype),
        options.micro_batch_tokens,
        options.gradient_checkpointing,
        options.peer_attention,
    )
    about = described(options.size, traffic, options.layers)
    print(f"Qwen2.5-VL {options.size}, {about['reduced'] or 'all decoder layers'}: {about['traffic']}", flush=True)
    chosen = [name for name in VARIANTS if name in options.variants]
    common = (SIZES[options.size], options.layers, workload, settings, options.repeats, options.threads, options.trace)
    jobs = [Job(name, *common) for name in chosen]
    # In a process of its own, so that this one stays small and holds no GPU memory.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as aside:
        workload.set_behaviour(aside.submit(score, jobs[0]).result(), DRIFT)
    results = {}
    for name, result in compare(jobs, in_turns=not on_gpu):
        results[name] = result
        print(f"  {name:22} {_line(result)}", flush=True)
    machine = describe()
    loss_tolerance, gradient_tolerance = TOLERANCES[settings.dtype]
    report = {
        "machine": machine,
        "settings": {name: value for name, value in vars(options).items() if name not in ("out", "trace")},
        "model": about,
        "useful": asdict(workload.useful),
        "agreement_within": {"loss": loss_tolerance, "gradient_error": gradient_tolerance},
        "note": None if on_gpu else "Measured without a GPU: says nothing about one.",
        "variants": results,
    }
    folder = options.out / (re.sub(r"\W+", "-", machine["gpu"]).strip("-").lower() if on_gpu else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_step.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    title = f"Forward and backward of one step, Qwen2.5-VL {options.size}"
    if about["reduced"]:
        title += f" ({about['reduced']})"
    chart(results, f"{title}, {machine['gpu'] or machine['cpu']}", folder / "train_step.svg")
    print(f"wrote {folder / 'train_step.json'} and train_step.svg")
    return int(any("failed" in result for name, result in results.items() if name.startswith("rethinker")))


if __name__ == "__main__":
    sys.exit(main())
