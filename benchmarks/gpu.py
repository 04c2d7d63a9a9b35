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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import PARTS, Part
from benchmarks.gpu_summary import line
from benchmarks.machine import cores

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"

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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a part's processes are ended too
    sys.exit(main())
