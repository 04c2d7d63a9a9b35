"""The table at the end of `make gpu`: a line for each part, from what its commands wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _tests_line(result: dict[str, Any]) -> str:
    counts = {kind: 0 for kind in ("passed", "failed", "skipped")}
    for outcome in result.values():
        counts["passed"] += outcome["passed"]
        counts["failed"] += len(outcome["failed"])
        counts["skipped"] += len(outcome["skipped"])
    return ", ".join(f"{number} {kind}" for kind, number in counts.items())


def _ceilings_line(result: dict[str, Any]) -> str:
    found = result["ceilings"]
    square = found["square_tflop_per_s"]
    heads = ", ".join(f"{name} {r['ms']:.1f} ms" for name, r in found["head_products"].items())
    return (
        f"copy {found['copy_tb_per_s']:.2f} TB/s, matmul {square['burst']:.0f} TFLOP/s in a burst, "
        f"{square['sustained']:.0f} sustained; a head's three products: {heads}"
    )


def _ops_line(result: dict[str, Any]) -> str:
    parts = []
    for op in result["kernels"]["results"]:
        ours = op["providers"]["rethinker"]
        share = f" ({ours['share_of_floor']:.0%} of the floor's speed)" if "share_of_floor" in ours else ""
        parts.append(f"{op['op']} {ours['median_ms']:.3f} ms{share}")
    return "; ".join(parts)


def _peers_line(result: dict[str, Any]) -> str:
    (op,) = result["kernels"]["results"]
    return ", ".join(
        f"{name} {r['median_ms']:.1f} ms" if "median_ms" in r else f"{name}: none"
        for name, r in op["providers"].items()
    )


def _sum_tree_line(result: dict[str, Any]) -> str:
    (sizes,) = (method["sizes"] for method in result["replay"]["results"].values())
    size, calls = max(sizes.items(), key=lambda item: int(item[0]))
    times = ", ".join(f"{name} {r['median_us']:.1f} us" for name, r in calls.items())
    launches = {name: r for name, r in result["replay"].get("cuda", {}).get(size, {}).items() if name != "compiled"}
    on_device = [f"{name} {r['median_us']:.1f} us" for name, r in launches.items() if "median_us" in r]
    return f"{int(size):,} slots: {times}" + (f"; per launch: {', '.join(on_device)}" if on_device else "")


def _sweeps_line(result: dict[str, Any]) -> str:
    found = result["sweeps"]
    parts = []
    for head, rows in found["chunks"].items():
        own, best = rows[0], min(rows, key=lambda row: row["median_ms"])
        rows_of = f"{best['logits_rows']}/{best['gradient_rows']}" if best is not own else "its own"
        parts.append(f"{head}: own choice {own['median_ms']:.1f} ms, best {rows_of} {best['median_ms']:.1f} ms")
    best = min(found["tiles"], key=lambda row: row["grpo_rows"]["median_ms"])
    return "; ".join(parts) + f"; best tiles {best['tiles'] or 'own'}"


def _attention_line(result: dict[str, Any]) -> str:
    case = next(iter(result["attention"]["cases"].values()))
    both = {name: r.get("forward+backward") for name, r in case["providers"].items()}
    return ", ".join(f"{name} {r['median_ms']:.2f} ms" if r else f"{name}: none" for name, r in both.items())


def _train_step_line(result: dict[str, Any]) -> str:
    variants = result["train_step"]["variants"]
    return ", ".join(
        f"{name} {1e3 * r['median_s']:.0f} ms" if "median_s" in r else f"{name}: none" for name, r in variants.items()
    )


def _training_line(result: dict[str, Any]) -> str:
    rows = result["metrics"]
    return f"{len(rows)} steps of {', '.join(format(row['step_s'], '.2f') for row in rows)} s"


def _end_to_end_line(result: dict[str, Any]) -> str:
    ratio = result["end_to_end"]["summary"]["ratio"]
    return f"TRL's step takes {ratio['median']:.2f} times as long ({ratio['min']:.2f}-{ratio['max']:.2f})"


def _ncu_line(result: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in result["ncu"].items())


LINES: dict[str, Callable[[dict[str, Any]], str]] = {
    "ceilings": _ceilings_line,
    "correctness": _tests_line,
    "sum_tree": _sum_tree_line,
    "ops": _ops_line,
    "sweeps": _sweeps_line,
    "peers": _peers_line,
    "attention": _attention_line,
    "training": _training_line,
    "train_step_3b": _train_step_line,
    "train_step_7b": _train_step_line,
    "end_to_end": _end_to_end_line,
    "vllm": _training_line,
    "sanitizer": _tests_line,
    "ncu": _ncu_line,
}


def line(name: str, record: dict[str, Any]) -> str:
    """A part's row of the table."""
    try:
        told = record.get("reason") or LINES[name](record["result"])
    except (KeyError, IndexError, ValueError, StopIteration):  # nothing, or a part of it, was written
        printed = " ".join(record.get("output", [])).split()
        told = "no figures" + (f": {' '.join(printed)[-150:]}" if printed else "")
    seconds = f"{record['seconds']:6.1f} s" if "seconds" in record else " " * 8
    return f"{name:14} {record['status']:9} {seconds}  {'(earlier) ' if record.get('earlier') else ''}{told}"
