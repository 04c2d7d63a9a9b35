"""How long replay's sampler takes to update and to draw, over table sizes, beside what else could do it.

    python -m benchmarks.replay [--sizes 1000 1048576] [--capacity 65536] [--repeats 200] [--out DIR]

Each repeat gives 512 random slots new priorities and then draws 512 slots; calls are timed one by one, through the
public functions, on one thread. Writes results/<cpu or gpu>/replay.json and replay.svg. A peer that is not installed is
skipped with the reason. The whole buffer, full at --capacity, is timed under each rule: 512 samples come and 512 are
drawn. With a CUDA device it also writes the time of each CUDA launch, from a captured CUDA graph.

Peers: torch.multinomial; cumsum and searchsorted; torchrl's SumSegmentTree (its prioritized sampler's default: fp32,
NumPy's random numbers), compiled from the sources in its wheel where the wheel was built for another PyTorch; and
the `sumtree` package. They read priorities as they are (alpha = 1, so do we).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.samplers import BATCH, METHODS, OURS, Method, Unavailable, multinomial, searchsorted
from rethinker.algorithm.replay import ReplayBuffer
from rethinker.config import ReplayConfig
from rethinker.samples import Query, RemoteCompletion, Sample
from rethinker_kernels import SumTree

RESULTS = Path(__file__).parent / "results"
SIZES = (10**3, 10**4, 10**5, 2**20, 10**7)
SECONDS = 5.0
"""No more repeats once a method has taken this long at one size."""

# Measuring


def inputs(size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random slots and new priorities, for ever; the same ones for every method."""
    source = torch.Generator().manual_seed(1)
    while True:
        indices = torch.randint(size, (BATCH,), generator=source)
        yield indices, torch.rand(BATCH, dtype=torch.float64, generator=source)


def measure(method: Method, size: int, repeats: int) -> dict[str, Any]:
    """Microseconds per call of each of the method's operations: median, quartiles, repeats."""
    times: dict[str, list[float]] = {name: [] for name in method}
    given, begin = inputs(size), time.perf_counter()
    for repeat in range(repeats + 3):  # three of them to warm up
        arguments = next(given)
        for name, call in method.items():
            start = time.perf_counter()
            call(*arguments) if name == "update" else call()
            if repeat >= 3:
                times[name].append(1e6 * (time.perf_counter() - start))
        if repeat >= 12 and time.perf_counter() - begin > SECONDS:
            break
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, Any]:
    low, median, high = statistics.quantiles(values, n=4)
    return {"median_us": median, "quartiles_us": [low, high], "repeats": len(values)}


def run(name: str, sizes: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """One method over all sizes: measurements by size, and how its cost grows."""
    results: dict[str, Any] = {}
    for size in sizes:
        try:
            method = METHODS[name](torch.rand(size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
            results[str(size)] = measure(method, size, repeats)
        except Unavailable as error:
            return {"skipped": str(error)}
        except RuntimeError as error:  # a peer's limit is a result of its own
            if name in OURS:
                raise
            results[str(size)] = {"failed": str(error).splitlines()[0]}
        print(f"  {size:>10,}  {_line(results[str(size)])}", flush=True)
    return {"sizes": results, "growth": growth(results)}


RULES = {
    "by advantage": {},
    "by advantage and age": {"age_decay": 10.0},
    "by advantage^0.6 and age": {"age_decay": 10.0, "alpha": 0.6},
    "by correctness": {"priority": "correctness"},
    "by correctness and age": {"priority": "correctness", "age_decay": 10.0},
}


def run_buffer(rules: dict[str, Any], capacity: int, repeats: int) -> dict[str, Any]:
    """Microseconds that a full ReplayBuffer takes to `add` 512 samples of 256 queries, and to `draw` 512."""
    numbers, response = itertools.count(), RemoteCompletion(100, 100)

    def fresh(queries: int) -> list[Sample]:
        samples = []
        for number in itertools.islice(numbers, queries):
            query, known = Query(str(number), "?", "!"), {"group": number, "correctness": 0.125 + number % 7 / 8}
            samples += [Sample(query, response, size, 0, right=size > 0, **known) for size in (1.0 + number % 5, -0.7)]
        return samples

    buffer = ReplayBuffer(ReplayConfig(capacity=capacity, **rules), seed=0)
    buffer.add(fresh(capacity))
    times: dict[str, list[float]] = {"add": [], "draw": []}
    for repeat in range(repeats + 3):  # three of them to warm up
        samples = fresh(BATCH // 2)
        for name, call in (("add", lambda samples=samples: buffer.add(samples)), ("draw", lambda: buffer.draw(BATCH))):
            start = time.perf_counter()
            call()
            if repeat >= 3:
                times[name].append(1e6 * (time.perf_counter() - start))
    return {name: summary(values) for name, values in times.items()}


def growth(results: dict[str, Any]) -> dict[str, float]:
    """Per operation the exponent b of time ~ N^b between the smallest and the largest size: 1 is linear."""
    measured = {int(size): result for size, result in results.items() if "failed" not in result}
    if len(measured) < 2:
        return {}
    small, large = min(measured), max(measured)

    def exponent(name: str) -> float:
        return math.log(measured[large][name]["median_us"] / measured[small][name]["median_us"]) / math.log(
            large / small
        )

    return {name: exponent(name) for name in measured[small]}


def _line(result: dict[str, Any]) -> str:
    if "failed" in result:
        return f"failed: {result['failed']}"
    return "   ".join(
        f"{name} {r['median_us']:.1f} us ({r['quartiles_us'][0]:.1f} to {r['quartiles_us'][1]:.1f})"
        for name, r in result.items()
    )


def compare(results: dict[str, Any], size: int) -> dict[str, float]:
    """How many times as long each peer takes as the compiled tree, to draw from a table of this size."""

    def median(name: str) -> float | None:
        return results[name].get("sizes", {}).get(str(size), {}).get("sample", {}).get("median_us")

    ours = median("rethinker C++")
    return {name: m / ours for name in results if ours and (m := median(name))}


# With a CUDA device


def run_cuda(sizes: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Microseconds per launch, from graphs of 100 launches: no host time is in them."""
    results: dict[str, Any] = {}
    for size in sizes:
        weights = torch.rand(size, dtype=torch.float64, device="cuda")
        key = torch.zeros(2, dtype=torch.int64, device="cuda")
        tree = SumTree(size, "cuda")
        tree.update(torch.arange(size, device="cuda"), weights)
        indices = torch.randint(size, (BATCH,), device="cuda")
        new = torch.rand(BATCH, dtype=torch.float64, device="cuda")
        peer = {"searchsorted": searchsorted(weights)["sample"], "multinomial": multinomial(weights)["sample"]}
        calls = {
            "rethinker update": lambda tree=tree, indices=indices, new=new: tree.update(indices, new),
            "rethinker sample": lambda tree=tree, key=key: tree.sample(BATCH, generator=key),
        } | peer
        results[str(size)] = {"compiled": tree.device.type == "cuda"}
        for name, call in calls.items():
            try:
                results[str(size)][name] = graph_time(call, repeats)
            except RuntimeError as error:
                if name not in peer:
                    raise
                results[str(size)][name] = {"failed": str(error).splitlines()[0]}
    return results


def graph_time(call: Callable[[], Any], repeats: int, launches: int = 100) -> dict[str, Any]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / launches)
    return summary(times[3:])


# Output


def chart(results: dict[str, Any], title: str, path: Path) -> None:
    """Time against table size, log-log, one panel per operation, with the quartiles as bands."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "replay", "svg.fonttype": "none"}
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True)
    for axes, operation in zip(panels, ("sample", "update"), strict=True):
        for name, result in results.items():
            points = {int(s): r[operation] for s, r in result.get("sizes", {}).items() if operation in r}
            if points:
                low, high = zip(*(r["quartiles_us"] for r in points.values()), strict=True)
                medians = [r["median_us"] for r in points.values()]
                width = 2.5 if name == OURS[0] else 1.2
                (line,) = axes.loglog(list(points), medians, marker="o", markersize=3, linewidth=width, label=name)
                axes.fill_between(list(points), low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel="slots in the table", title=f"{operation} {BATCH}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("microseconds per call")
    panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, as the sampler has in training: the other cores have their own work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peers() -> dict[str, str]:
    """Versions of the installed peers."""
    found = {}
    for name in ("torchrl", "sumtree", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="slots in the table")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="METHOD")
    parser.add_argument("--capacity", type=int, default=65_536, help="samples in the buffer")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="torch.utils.cpp_extension")
    machine, sizes = describe(), tuple(args.sizes)
    results = {}
    with one_thread():
        for name in args.methods:
            print(name, flush=True)
            results[name] = run(name, sizes, args.repeats)
            if "skipped" in results[name]:
                print(f"  skipped: {results[name]['skipped']}")
        buffers = {name: run_buffer(rules, args.capacity, min(50, args.repeats)) for name, rules in RULES.items()}
        for name, result in buffers.items():
            print(f"buffer of {args.capacity:,}, {name}\n              {_line(result)}", flush=True)
    folder = args.out / (re.sub(r"\W+", "-", machine["gpu"]).strip("-").lower() if machine["gpu"] else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine, "peers": peers(), "batch": BATCH, "threads": 1, "results": results}
    report["buffer"] = {"capacity": args.capacity, "rules": buffers}
    if OURS[0] in results:
        report["sample_time_relative_to_ours"] = {str(size): compare(results, size) for size in sizes}
    if machine["gpu"]:
        report["cuda"] = run_cuda(sizes, args.repeats)
    (folder / "replay.json").write_text(json.dumps(report, indent=2) + "\n")
    chart(results, f"{machine['cpu']}, one thread; median and quartiles", folder / "replay.svg")
    print(f"wrote {folder / 'replay.json'}")


if __name__ == "__main__":
    main()
