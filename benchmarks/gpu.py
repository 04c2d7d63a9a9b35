"""Checks and measures everything on the GPU at hand, the most telling part first, within a budget of minutes.

    make gpu                                   # or:
    python -m benchmarks.gpu [--minutes 8] [--parts NAME ...] [--redo] [--list]

Every part runs in processes of its own with a limit, and its result is written to results/<gpu>/<part>.json, with the
machine, the versions and the commit, before the next part begins. A part whose result for this very code is there is
not run again (--redo does), so a run that was cut off is taken up by the same command. A part that no longer fits into
the budget, or whose tool or package is missing, is named with the reason; a part that fails does not stop the rest. The
exit status is 1 if a part that checks correctness failed or was cut off.

Without a GPU (or with --dry-run) every part runs at toy size on the CPU, several at a time, which proves that the
commands work and says nothing about a GPU; commands that take long even so have their arguments checked only.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import cores

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"

SANITIZED = (
    "(test_log_softmax and near and 7-129) or out_of_range or (test_linear_grpo_loss and options1 and token-token) "
    "or (test_grpo_loss and all and token-token) or (test_group_advantages and std) or (test_grpo and options0-token)"
)
"""A part of the fuzzing suite that reaches every kernel: compute-sanitizer slows it down a hundred times."""

TRAIN = (
    "python -m rethinker train easy_vqa_cpu --run.dir {out}/runs --run.name tiny --train.max_steps 5 "
    "--policy.warmup.steps 60 --policy.warmup.look_steps 60 --train.batch_pairs 128 --train.episode_queries 64 "
    "--validation.size 64 --rollout.backend "
)
STEP = "python -m benchmarks.train_step --layers 8 --queries 4 --repeats 2 --variants eager liger rethinker --out {out}"
END_TO_END = (
    "python -m benchmarks.end_to_end --size 3B --layers 8 --queries 8 --steps 2 --max-new-tokens 128 "
    "--trl-micro-batch 8 --json {out}/end_to_end.json"
)
METRICS = (
    "dram__bytes_read.sum,dram__bytes_write.sum,lts__t_sector_hit_rate.pct,gpu__time_duration.sum,"
    "sm__warps_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct,launch__registers_per_thread"
)
PYTEST = "python -m pytest -q -p no:cacheprovider -W ignore"
FUZZ = "tests/kernels/fuzz_triton.py tests/kernels/fuzz_exponentials.py"


@dataclass(frozen=True)
class Part:
    """Commands, and how long they may take. In a command {out} is an empty folder for results, {workers} a number of
    processes, {gpu_tests} the files with tests marked gpu; NAME=value before it sets its environment."""

    name: str
    about: str
    commands: tuple[str, ...]
    toy: tuple[str, ...]  # the same for a dry run
    seconds: int  # it took on an H200
    limit: int  # seconds
    needs: tuple[str, ...] = ()  # packages and programs
    checks: bool = False  # whether it decides the exit status
    side_by_side: bool = False  # its commands; only where nothing is timed


PARTS = (
    Part(
        "ceilings",
        "what the device can do: a copy, matrix products in a burst and sustained",
        ("python -m benchmarks.ceilings --out {out}/ceilings.json",),
        ("python -m benchmarks.ceilings --out {out}/ceilings.json",),
        seconds=20,
        limit=90,
    ),
    Part(
        "correctness",
        "the kernels' fuzzing suite and all tests marked gpu",
        (
            PYTEST + " {workers} -m '' " + FUZZ + " --junitxml {out}/fuzz.xml",
            PYTEST + " {workers} -m gpu {gpu_tests} -k 'not fuzz_on and not sanitizer' --junitxml {out}/gpu_tests.xml",
        ),
        (
            "TRITON_INTERPRET=1 " + PYTEST + " tests/kernels/fuzz_triton.py -k 'near and uniform and 7-129 or test_k3' "
            "--junitxml {out}/fuzz.xml",
            PYTEST + " -m gpu {gpu_tests} --junitxml {out}/gpu_tests.xml",
        ),
        seconds=40,
        limit=300,
        checks=True,
        side_by_side=True,
    ),
    Part(
        "sum_tree",
        "replay's sampler: microseconds per call and per launch",
        ("python -m benchmarks.replay --sizes 1048576 --repeats 30 --methods 'rethinker C++' --out {out}",),
        ("python -m benchmarks.replay --sizes 1000 --repeats 3 --methods 'rethinker C++' --out {out}",),
        seconds=25,
        limit=90,
    ),
    Part(
        "ops",
        "the fused ops beside plain PyTorch and against floors measured here",
        ("python -m benchmarks.kernels --providers rethinker pytorch --out {out}",),
        ("python -m benchmarks.kernels --providers rethinker pytorch --repeats 1 --out {out}",),
        seconds=45,
        limit=120,
    ),
    Part(
        "sweeps",
        "chunk rows and row tiles",
        ("python -m benchmarks.sweeps --out {out}/sweeps.json",),
        ("TRITON_INTERPRET=1 python -m benchmarks.sweeps --out {out}/sweeps.json",),
        seconds=40,
        limit=150,
    ),
    Part(
        "peers",
        "the head's loss beside every installed peer",
        ("python -m benchmarks.kernels linear_grpo --repeats 5 --without torch.compile --out {out}",),
        (
            "python -m benchmarks.kernels linear_grpo --repeats 1 --out {out} --providers rethinker "
            "'cut-cross-entropy, cross-entropy only'",
        ),
        seconds=60,
        limit=180,
    ),
    Part(
        "attention",
        "shared prompts: the policy's kernels, varlen with prompts repeated, FlexAttention",
        ("python -m benchmarks.attention --out {out}/attention.json",),
        ("python -m benchmarks.attention --out {out}/attention.json",),
        seconds=75,
        limit=200,
        checks=True,
    ),
    Part(
        "training",
        "rethinker train on the tiny model, sampled with transformers, 5 steps",
        (TRAIN + "hf",),
        (TRAIN + "hf --print_config",),
        seconds=35,
        limit=180,
        needs=("deepspeed", "datasets", "easy_vqa", "jsonargparse"),
        checks=True,
    ),
    Part(
        "train_step_3b",
        "forward and backward of a step at 3B shapes, 8 layers: own, eager, Liger",
        (STEP + " --size 3B",),
        (STEP + " --size 3B --help",),
        seconds=75,
        limit=240,
        checks=True,
    ),
    Part(
        "train_step_7b",
        "the same at 7B shapes",
        (STEP + " --size 7B",),
        (STEP + " --size 7B --help",),
        seconds=75,
        limit=240,
        checks=True,
    ),
    Part(
        "end_to_end",
        "a whole step beside TRL's, 3B shapes, 8 layers",
        (END_TO_END,),
        (END_TO_END + " --help",),
        seconds=120,
        limit=300,
        needs=("trl", "deepspeed", "datasets", "jsonargparse"),
    ),
    Part(
        "vllm",
        "rethinker train with vLLM in the same process, asleep while a step trains",
        (TRAIN + "vllm",),
        (TRAIN + "vllm --print_config",),
        seconds=90,
        limit=240,
        needs=("vllm", "deepspeed", "datasets", "easy_vqa", "jsonargparse"),
        checks=True,
    ),
    Part(
        "sanitizer",
        "compute-sanitizer over a part of the fuzzing suite",
        tuple(
            f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool {tool} --error-exitcode 9 {PYTEST} "
            f"{FUZZ} -k '{SANITIZED}' --junitxml {{out}}/{tool}.xml"
            for tool in ("memcheck", "racecheck")
        ),
        ("TRITON_INTERPRET=1 " + PYTEST + f" tests/kernels/fuzz_triton.py -k '{SANITIZED}' --collect-only",),
        seconds=120,
        limit=300,
        needs=("compute-sanitizer",),
        checks=True,
        side_by_side=True,
    ),
    Part(
        "ncu",
        "hardware counters of the row kernel: does its second read come from the L2 cache?",
        (
            f"ncu --clock-control none --kernel-name regex:grpo_rows --launch-count 1 --metrics {METRICS} --csv "
            "--log-file {out}/ncu.csv python -m benchmarks.sweeps tiles --out {out}/under_ncu.json",
        ),
        ("TRITON_INTERPRET=1 python -m benchmarks.sweeps tiles --out {out}/under_ncu.json",),
        seconds=40,
        limit=120,
        needs=("ncu",),
    ),
)


# Running


def missing(part: Part) -> str | None:
    """Which package or program the part needs and this machine lacks."""
    lacks = [name for name in part.needs if not (importlib.util.find_spec(name) or shutil.which(name))]
    return f"not installed: {', '.join(lacks)}" if lacks else None


def gpu_tests() -> list[str]:
    """Test files that hold tests marked gpu."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if re.search(r"mark\.gpu\b", file.read_text())]


def workers() -> str:
    """pytest's option for several processes, where pytest-xdist and cores for them are there."""
    number = min(cores() - 2, 10)
    return f"-n {number}" if importlib.util.find_spec("xdist") and number > 1 else ""


def start(command: str, out: Path, log: Path) -> subprocess.Popen:
    """Start a part's command in a session of its own, its output in `log`."""
    filled = command.format(out=out, workers=workers(), gpu_tests=" ".join(gpu_tests()))
    words = shlex.split(filled)
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        environment[name] = value
    words = [sys.executable if word == "python" else word for word in words]
    with log.open("wb") as output:
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def end(process: subprocess.Popen) -> None:
    """Kill a command and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(part: Part, limit: float, *, dry: bool) -> dict[str, Any]:
    """Run a part; never raises for what its commands do.

    Returns:
        `status` ("passed", "failed", "cut off" at the limit), `seconds`, `result` by file, and, unless it passed, the
        ends of what its commands printed in `output`.
    """
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        out = Path(scratch) / "out"
        out.mkdir()
        commands = part.toy if dry else part.commands
        logs = [Path(scratch) / f"{number}.log" for number in range(len(commands))]
        codes: list[int | None] = []
        running: list[subprocess.Popen] = []

        def wait() -> None:
            for process in running[len(codes) :]:
                try:
                    codes.append(process.wait(max(0.0, begin + limit - time.monotonic())))
                except subprocess.TimeoutExpired:
                    codes.append(None)

        try:
            for command, log in zip(commands, logs, strict=True):
                running.append(start(command, out, log))
                if not part.side_by_side:
                    wait()
            wait()
        finally:
            for process in running:
                end(process)
        status = "cut off" if None in codes else "failed" if any(codes) else "passed"
        record = {"status": status, "seconds": round(time.monotonic() - begin, 1), "exit_codes": codes}
        record["result"] = collect(out)
        if status != "passed":
            record["output"] = [_without_paths(log.read_text(errors="replace"))[-6000:] for log in logs if log.exists()]
        record["charts"] = {chart.name: chart.read_text() for chart in out.rglob("*.svg")}
    return record


def _without_paths(text: str) -> str:
    for folder, name in ((ROOT, "."), (Path(sys.prefix), "PREFIX"), (Path.home(), "~")):
        text = text.replace(str(folder), name)
    return text


# Reading what the commands wrote


def collect(out: Path) -> dict[str, Any]:
    """What the commands left: JSON as it is, tests by outcome, metrics.jsonl as rows, ncu's counters by name."""
    found: dict[str, Any] = {}
    for file in sorted([*out.glob("*.json"), *out.glob("*/*.json")]):
        found[file.stem] = json.loads(file.read_text())
        if isinstance(found[file.stem], dict):
            found[file.stem].pop("machine", None)  # the record has it
    for file in sorted(out.glob("*.xml")):
        found[file.stem] = tests(file)
    for file in out.glob("runs/*/metrics.jsonl"):
        found["metrics"] = [json.loads(line) for line in file.read_text().splitlines()]
    for file in out.glob("*.csv"):
        found[file.stem] = counters(file.read_text())
    return found


def tests(junit: Path) -> dict[str, Any]:
    """`passed`, and `failed` and `skipped` tests with the reason, of a pytest run."""
    outcome: dict[str, Any] = {"passed": 0, "failed": {}, "skipped": {}}
    for case in ElementTree.parse(junit).iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        kinds = {child.tag: child.get("message") or "" for child in case}
        for kind, found in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if kind in kinds:
                outcome[found][name] = _without_paths(kinds[kind])[:500]
                break
        else:
            outcome["passed"] += 1
    return outcome


def counters(text: str) -> dict[str, str]:
    """ncu's counters of its first kernel: value and unit by name."""
    rows = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))
    return {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip() for row in rows}


# What the summary says of a part, from its result


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


# The whole


def code() -> str:
    """A fingerprint of everything a result depends on: its commit alone would not tell changes apart."""
    digest = hashlib.sha256()
    for folder in ("rethinker", "kernels", "csrc", "benchmarks", "tests"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in {".py", ".cpp", ".cu", ".h", ".yaml"}:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """benchmarks.machine.describe, in a process of its own: this one would hold GPU memory."""
    program = "import json; from benchmarks.machine import describe; print(json.dumps(describe()))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def write(folder: Path, name: str, record: dict[str, Any]) -> None:
    """Write a part's record and charts whole or not at all."""
    for chart, text in record.pop("charts", {}).items():
        (folder / f"{name}_{chart}").write_text(text)
    file = folder / f"{name}.json"
    file.with_suffix(".tmp").write_text(json.dumps(record, indent=2) + "\n")
    file.with_suffix(".tmp").replace(file)


def earlier(file: Path, fingerprint: str) -> dict[str, Any] | None:
    """A part's record of this code, unless it was cut off."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return record if record.get("code") == fingerprint and record.get("status") in ("passed", "failed") else None


def main(arguments: list[str] | None = None) -> int:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="the budget (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--redo", action="store_true", help="also run parts that have a result for this code")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU")
    parser.add_argument("--list", action="store_true", help="say what the parts are, and end")
    parser.add_argument("--out", type=Path, help="folder of results (default: benchmarks/results; a dry run: none)")
    options = parser.parse_args(arguments)
    chosen = [part for part in PARTS if part.name in options.parts]
    if options.list:
        for part in chosen:
            print(f"{part.name:14} about {part.seconds:3} s, at most {part.limit} s: {part.about}")
        return 0
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part's processes are ended too
    found = machine()
    dry = options.dry_run or not found["gpu"]
    if dry:
        print("A dry run: toy sizes on the CPU. These figures say nothing about a GPU.", flush=True)
        os.environ.update(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    fingerprint, table = code(), {}
    with tempfile.TemporaryDirectory() as nowhere:
        results = options.out or (Path(nowhere) if dry else RESULTS)
        folder = results / ("dry_run" if dry else re.sub(r"\W+", "-", found["gpu"]).strip("-").lower())
        folder.mkdir(parents=True, exist_ok=True)

        def attend_to(part: Part) -> None:
            file = folder / f"{part.name}.json"
            left = 60 * options.minutes - (time.monotonic() - begin)
            before = None if options.redo else earlier(file, fingerprint)
            if before:
                table[part.name] = before | {"earlier": True}
            elif not dry and (reason := missing(part)):
                table[part.name] = {"status": "missing", "reason": reason}
            elif not dry and left < part.seconds:
                reason = f"left out: takes about {part.seconds} s, and {max(left, 0):.0f} s are left"
                table[part.name] = {"status": "left out", "reason": reason}
            else:
                print(f"[{time.monotonic() - begin:4.0f} s] {part.name}: {part.about}", flush=True)
                record = run(part, part.limit if dry else min(part.limit, left), dry=dry)
                record |= {"part": part.name, "about": part.about, "dry_run": dry, "code": fingerprint}
                record |= {"commands": part.toy if dry else part.commands, "limit_s": part.limit, "machine": found}
                write(folder, part.name, record)
                table[part.name] = record
                print("         " + line(part.name, record), flush=True)
            if table[part.name]["status"] == "missing" and not file.exists():
                write(folder, part.name, table[part.name] | {"part": part.name, "code": fingerprint, "machine": found})

        if dry:
            with ThreadPoolExecutor(cores()) as pool:
                list(pool.map(attend_to, chosen))
        else:  # in this thread, which is the one that a signal interrupts
            for part in chosen:
                attend_to(part)
    print()
    for part in chosen:
        print(line(part.name, table[part.name]))
    wrong = [part.name for part in chosen if part.checks and table[part.name]["status"] in ("failed", "cut off")]
    print(
        f"\n{time.monotonic() - begin:.0f} s; " + (f"NOT CORRECT: {', '.join(wrong)}" if wrong else "no check failed")
    )
    if not dry:
        print(f"results: {folder}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
