"""What the user sees while a run goes on: one line per step, one per validation, and a summary at the end."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from rethinker.samples import Accuracy, RunResult

T = TypeVar("T")

# Label on the screen, metric, format: what one line has room for; metrics.jsonl has the rest.
_COLUMNS = (
    ("reward", "reward_mean", ".3f"),
    ("effective", "effective_query_ratio", ".2f"),
    ("replay", "replay_fraction", ".2f"),
    ("length", "response_length_mean", ".1f"),
    ("fast", "fast_ratio", ".2f"),
    ("rethink", "rethink_ratio", ".2f"),
    ("tools", "tool_use_ratio", ".2f"),
    ("turns", "turns_mean", ".2f"),
    ("entropy", "entropy", ".3f"),
    ("tok/s", "tokens_per_s", ",.0f"),
    ("s/step", "step_s", ".2f"),
)
MOST_CATEGORIES = 6
"""Of replay's draws, in the line after a validation: those with most draws."""


class Display:
    """Shows the steps of a run on stdout; silent on all ranks but the first."""

    def __init__(self, total_steps: int, enabled: bool = True, done: int = 0) -> None:
        """`done` of the `total_steps` lie behind a resumed run; with enabled=False nothing is shown."""
        self.total_steps, self.enabled, self._done_before = total_steps, enabled, done
        self._start = time.perf_counter()
        self._first_step: float | None = None  # when steps began: the estimate leaves the start-up out

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show one optimizer step; a metric that is missing or null is left out."""
        now, done = time.perf_counter(), metrics["step"]
        self._first_step = self._first_step or now - (metrics.get("step_s") or 0.0)
        seconds = (now - self._first_step) / (done - self._done_before) * (self.total_steps - done)
        known = {name for name in metrics if metrics[name] is not None}
        if "tool_use_ratio" in known:  # whose place the line has not; the one after a validation tells of fast answers
            # Where nothing calls a tool, as with `verify`, the turns are what there is to see.
            known -= {"fast_ratio", "turns_mean" if metrics["tool_use_ratio"] else "tool_use_ratio"}
        shown = [f"{label} {metrics[name]:{form}}" for label, name, form in _COLUMNS if name in known]
        self._print("  ".join([f"step {done}/{self.total_steps}", *shown, f"left {timedelta(seconds=round(seconds))}"]))

    def validated(self, step: int, accuracy: Accuracy, data: str, rows: Sequence[Mapping[str, Any]] = ()) -> None:
        """Show a validation, the one before training with its data set, and how the model answered in the steps since
        the last one, whose metrics are `rows`."""
        when = f"on data.validation={data} before training" if step == 0 else f"after step {step}"
        details = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.by_category.items())
        details = f" ({details})" if len(accuracy.by_category) > 1 else ""
        self._print(f"greedy accuracy {when}: {accuracy.overall:.3f} of {accuracy.questions} questions{details}")
        known = [row for row in rows if row.get("fast_ratio") is not None]
        if known:
            fast, rethinking = (mean(row[name] for row in known) for name in ("fast_ratio", "rethink_ratio"))
            kinds = {"fast": fast, "slow": max(0.0, 1 - fast - rethinking), "rethinking": rethinking}
            drawn = _replay_draws(known)
            largest = sorted(sorted(drawn, key=drawn.get)[-MOST_CATEGORIES:])
            text = "since the last one: answers " + ", ".join(f"{share:.0%} {kind}" for kind, share in kinds.items())
            text += "; replay drew " * bool(drawn) + ", ".join(f"{name} {drawn[name]:.0%}" for name in largest)
            self._print(f"  {text}")

    def resumed(self, checkpoint: Path) -> None:
        """Say from where the run goes on."""
        self._print(f"resumed from {checkpoint}")

    def stopped(self, signal: str, step: int, folder: Path, ranks: int) -> None:
        """Say that the run was asked to stop, is saved, and how to go on."""
        self._print(f"{signal}: saved after step {step}/{self.total_steps}; to go on:")
        launcher = f"torchrun --nproc-per-node {ranks} -m " if ranks > 1 else ""
        self._print(f"  {launcher}rethinker train {folder}/config.yaml --resume auto")

    def summary(self, run: RunResult, report: Path | None = None) -> None:
        """Say what was learned, how long it took and where the run lies."""
        rewards, before, after = [row["reward_mean"] for row in run.metrics], run.accuracy_before, run.accuracy_after
        lines = ["", f"{len(rewards)} steps in {timedelta(seconds=round(time.perf_counter() - self._start))}"]
        if rewards:
            few = max(1, len(rewards) // 10)  # single steps are noisy
            first, last = sum(rewards[:few]) / few, sum(rewards[-few:]) / few
            of = f"mean of the first and last {few} steps" if few > 1 else "first and last step"
            lines.append(f"sampled reward   {first:.3f} -> {last:.3f}  ({of})")
        if before is not None and after is not None:
            points = f"{100 * (after.overall - before.overall):+.1f} points"
            change = f"{before.overall:.3f} -> {after.overall:.3f}  ({points}"
            lines.append(f"greedy accuracy  {change} on {after.questions} held-out questions)")
        lines += [f"checkpoint       {run.best_checkpoint}", f"run              {run.folder}"]
        lines += [f"report           {report}"] if report else []
        self._print("\n".join(lines))

    def _print(self, text: str) -> None:
        if self.enabled:
            print(text, flush=True)


def _replay_draws(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """Share of the steps' replay draws by category, where replay drew any."""
    draws: Counter[str] = Counter()
    for row in rows:
        for name, share in row["replay_by_category"].items():
            draws[name] += share * row["replay_fraction"] * row["trained_pairs"]
    return Counter({name: count / draws.total() for name, count in draws.items()})


def progress(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Pass items on while a bar shows how far they have come; in a log file it is written twice a minute."""
    from tqdm import tqdm

    yield from tqdm(items, label, total, file=sys.stdout, mininterval=0.2 if sys.stdout.isatty() else 30)
