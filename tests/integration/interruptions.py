"""A small run in processes of its own: started, killed, resumed, and compared with one that nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from rethinker.checkpoint.resume import read_state
from rethinker.embedded.easy_vqa import easy_vqa
from rethinker.embedded.tiny import create_tiny
from rethinker.runtime.completions import read_completions
from tests.forked import Forked, training

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 12, 2
CLOCK = {"step_s", "tokens_per_s", "mfu", "peak_memory_gb"}

# A random model never answers right; this reward makes its groups differ.
REWARD = """
def parity(response, answer, query):
    return float(len(response) % 2)
"""

# Everything with a past: replay across episodes, by age, second passes, scored log-probs, tokens masked for their
# entropy, four steps to an episode, a learning rate that follows the tokens (at most 1,024 an episode: the third is the
# last), a reference policy that moves.
OPTIONS = f"""
    --rollout.group_size 4 --train.batch_pairs 16 --train.episode_queries 16 --train.max_steps {STEPS}
    --rollout.max_new_tokens 16 --rollout.kv_cache_gb 0.1 --train.learning_rate 1e-3 --validation.size 8
    --checkpoint.every {EVERY} --checkpoint.keep 3 --replay.clear_every_episode false --replay.max_age 2
    --replay.age_decay 3 --replay.importance_exponent 0.4 --replay.importance_exponent_end 1 --algorithm.max_advantage 2
    --rethink.fraction 0.5 --algorithm.rollout_correction token_truncate --algorithm.top_entropy 0.5
    --train.schedule linear --train.max_generated_tokens 2050
    --algorithm.kl_coef 0.01 --algorithm.reference_every 2
""".split()


def prepare(folder: Path, questions: int = 64) -> None:
    """The model, the questions (few, so that caches are soon full) and the reward that all runs in a folder share."""
    with (folder / "questions.jsonl").open("w") as file:
        for query in easy_vqa("train")[:questions]:
            row = {"id": query.id, "question": query.question, "answer": query.answer, "images": list(query.images)}
            file.write(json.dumps(row) + "\n")
    (folder / "reward.py").write_text(REWARD)
    create_tiny(folder / "model", seed=0)


def arguments_of(folder: Path, name: str, *options: str) -> list[str]:
    """The arguments of `rethinker train` for a run in a folder."""
    arguments = ["easy_vqa_cpu", "--run.dir", str(folder), "--run.name", name, "--policy.model", str(folder / "model")]
    arguments += ["--data.train", str(folder / "questions.jsonl"), "--data.category_weights", "{}"]
    return [*arguments, "--reward.function", f"{folder / 'reward.py'}:parity", *OPTIONS, *options]


def start(
    folder: Path, name: str, *options: str, ranks: int = 1, torchrun: tuple[str, ...] | None = None
) -> Forked | subprocess.Popen:
    """Start, or with --resume continue, a run; its output goes to <name>.log.

    Args:
        torchrun: start the ranks with it and these options, in processes that share nothing with this one.
    """
    arguments = arguments_of(folder, name, *options)
    log = folder / f"{name}.log"
    if torchrun is None:
        return Forked(training(arguments), log, ranks)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *torchrun]
    with log.open("a") as output:
        command = [sys.executable, *launcher, "-m", "rethinker", "train", *arguments]
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)


def finish(folder: Path, name: str, *options: str, ranks: int = 1) -> None:
    """Run to the end."""
    code = start(folder, name, *options, ranks=ranks).wait(300)
    assert code == 0, (folder / f"{name}.log").read_text()[-4000:]


def kill(process: Forked | subprocess.Popen) -> None:
    """SIGKILL to the process and all it has started: what a power cut does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def rows(run: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    file = run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    lines = [line for line in lines if line.endswith("\n")]  # the last one may be on its way
    return [
        {key: value for key, value in json.loads(line).items() if key not in CLOCK and not key.startswith("time_")}
        for line in lines
    ]


def newest(run: Path) -> int | None:
    """The step of the newest checkpoint that is marked complete."""
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step_*/COMPLETE")), default=None)


def wait_for(condition, process: Forked | subprocess.Popen, seconds: float = 120) -> None:
    """Until the condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "the run does not come that far"
        time.sleep(0.01)


def disturb(folder: Path, name: str, kills: int, seed: int, options: tuple[str, ...] = ()) -> list[str]:
    """Kill a run `kills` times at random instants, or until it has come to its end; returns a line about each kill.

    A third of the instants lie within the steps, a third within a save, a third anywhere in a process's life.
    """
    chance, lines, run = random.Random(seed), [], folder / name
    for number in range(kills):
        process, started, back = start(folder, name, "--resume", "auto", *options), time.monotonic(), ""
        done, kind = len(rows(run)), ("in a step", "in a save", "anywhere")[number % 3]
        if kind == "anywhere":
            time.sleep(chance.uniform(0, 15))
        elif kind == "in a step":
            wait_for(lambda: len(rows(run)) not in (0, done), process)  # noqa: B023  (it is awaited here)
            back = f", first new step after {time.monotonic() - started:.1f} s"
            time.sleep(chance.uniform(0, 1.5))
        else:
            after = newest(run)
            wait_for(lambda: newest(run) != after, process)  # noqa: B023
            wait_for(lambda: any(run.glob("checkpoints/.step*partial")), process)
            time.sleep(chance.uniform(0, 0.03))
        if process.poll() is not None:
            break
        saving = [path.name for path in run.glob("checkpoints/.*.partial")]
        kill(process)
        steps, saved = len(rows(run)), newest(run)
        lines.append(f"kill {number + 1} {kind}: {steps} steps logged, checkpoint {saved}, writing {saving}{back}")
        # One checkpoint is written while the next steps run, so at most two of them are not there yet.
        assert steps - (saved or 0) <= 2 * EVERY, lines[-1]
    return lines


def assert_equal_runs(run: Path, reference: Path) -> None:
    """Metrics, validations, completions, weights, optimizer, replay, data order and random streams: bit for bit."""
    assert rows(run) == rows(reference)
    assert (run / "validation.jsonl").read_text() == (reference / "validation.jsonl").read_text()
    for episode in range(STEPS // 4):
        completions = [read_completions(folder / "completions", episode) for folder in (run, reference)]
        assert completions[0] == completions[1]
    a, b = (folder / "checkpoints" / "last" for folder in (run, reference))
    for file in ("model.safetensors", "trainer/optimizer_00000.safetensors", "trainer/reference_00000.safetensors"):
        one, other = load_file(a / file), load_file(b / file)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    one, other = (read_state(folder / "trainer" / "run") for folder in (a, b))
    for part in ("progress", "policy", "replay", "data"):
        assert repr(one[part]) == repr(other[part])
    assert repr(read_state(a / "trainer/rank_00000")) == repr(read_state(b / "trainer/rank_00000"))
