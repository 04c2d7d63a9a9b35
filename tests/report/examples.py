"""Runs made by hand, written as training writes them: settings, metrics, validations and completions."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from rethinker.config import AlgorithmConfig, Config, RunConfig, TrainConfig
from rethinker.runtime.completions import write_completions
from rethinker.samples import Completion, Group, Query, Rethought
from rethinker.settings import to_yaml

HISTOGRAMS = {"grpo": [6, 2, 1, 1, 0, 0], "filter": [0, 2, 1, 1, 0, 0], "ssr": [0, 3, 2, 2, 1, 2]}
TRIGGER = "\n\nWait, let's double check"


def metrics_of(step: int, algorithm: str = "ssr") -> dict:
    """A row of metrics.jsonl; every number depends on its step."""
    ssr = algorithm == "ssr"
    return {
        "step": step,
        "episode": (step - 1) // 2,
        "reward_mean": 0.4 + step / 20,
        "response_length_mean": 20.0 + step,
        "rethink_ratio": 0.02 * step,
        "effective_query_ratio": 1 - step / 10,
        "replay_fraction": step / 10 if ssr else 0.0,
        "replay_size": 50 * step if ssr else 0,
        "replay_age_mean": 0.1 * step if ssr else 0.0,
        "advantage_histogram": [count * (step if bin == 2 else 1) for bin, count in enumerate(HISTOGRAMS[algorithm])],
        "entropy": 1 / step,
        "old_kl": 0.001 * step,
        "kl": 0.0,
        "mismatch_kl": 1e-12,
        "clip_fraction_low": 0.01,
        "clip_fraction_high": 0.02,
        "grad_norm": 1.0,
        "loss": -0.1,
        "val_accuracy": None,
        "time_rollout_s": 2.0 * (step % 2),
        "time_reward_s": 0.1,
        "time_rethink_s": 0.3,
        "time_train_s": 1.0,
        "time_sync_s": 0.2,
        "time_checkpoint_s": 0.1,
        "step_s": 4.0,
    }


def write_run(
    folder: Path,
    algorithm: str = "ssr",
    *,
    steps: int = 6,
    accuracies: dict[int, float] | None = None,
    groups: list[Group] | None = None,
    seed: int = 0,
    finished: bool = True,
    **metrics,
) -> Path:
    """A run of this algorithm; `metrics` replace those of every step."""
    folder.mkdir(parents=True)
    config = Config(
        seed=seed,
        run=RunConfig(name=folder.name),
        algorithm=AlgorithmConfig(name=algorithm, clip_high=0.35),
        train=TrainConfig(max_steps=steps),
    )
    (folder / "config.yaml").write_text(to_yaml(config))
    rows = [metrics_of(step, algorithm) | metrics for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    validations = [
        {"step": step, "val_accuracy": value, "questions": 8, "by_category": {"yes/no": value, "color": value / 2}}
        for step, value in (accuracies or {}).items()
    ]
    if validations:
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in validations))
    if finished:
        (folder / "checkpoints" / "last").mkdir(parents=True)
        (folder / "learning.png").touch()
    if groups is not None:
        (folder / "completions").mkdir()
        write_completions(folder / "completions", 0, groups)
    return folder


def group(
    number: int,
    texts: dict[str, float] | list[tuple[str, float]],
    question: str = "how many sides?",
    category: str = "shape",
    image: bytes | str | None = None,
    rethought: dict[int, Rethought] | None = None,
) -> Group:
    """A judged group of (text, reward); `rethought` by place in the group; a token is a character."""
    pairs = list(texts.items()) if isinstance(texts, dict) else texts
    completions = [
        Completion([ord(c) for c in text], [-1.0] * len(text), text, "stop", (rethought or {}).get(i))
        for i, (text, _) in enumerate(pairs)
    ]
    images = () if image is None else ({"bytes": image},) if isinstance(image, bytes) else (image,)
    query = Query(f"q{number}", question, "four", images, {"category": category})
    rewards = [reward for _, reward in pairs]
    mean = sum(rewards) / len(rewards)
    return Group(query, completions, 0, rewards=rewards, advantages=[reward - mean for reward in rewards])


def picture(width: int = 64, height: int = 64, color: str = "teal") -> bytes:
    """A PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), color).save(file, "PNG")
    return file.getvalue()


def forced(text: str) -> Rethought:
    """Where TRIGGER stands in a text whose tokens are its characters."""
    start = text.index(TRIGGER)
    return Rethought(start, start + len(TRIGGER), "self_verification", start, start + len(TRIGGER))


def write_evaluation(folder: Path, model: str, benchmark: str, mode: str, accuracy: float, ratio: float = 0.5) -> Path:
    """A result of `rethinker eval`."""
    folder.mkdir(parents=True, exist_ok=True)
    low, high = accuracy - 0.01, accuracy + 0.01
    row = {"model": model, "benchmark": benchmark, "mode": mode, "accuracy": accuracy, "interval": [low, high]}
    row |= {"by_category": {}, "rethink_ratio": ratio, "questions": 100}
    (folder / "result.json").write_text(json.dumps(row))
    return folder
