"""Runs made by hand, written as training writes them: settings, metrics, validations and completions."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

from PIL import Image

from rethinker.config import AlgorithmConfig, Config, PolicyConfig, RunConfig, TrainConfig
from rethinker.runtime.completions import validation_name, write_completions, write_groups
from rethinker.samples import Completion, Group, Observed, Query, Rethought
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
        "fast_ratio": 0.6 - 0.05 * step,
        "rethink_ratio": 0.02 * step,
        **{"turns_mean": None, "tool_calls_mean": None, "tool_use_ratio": None, "environment_failures": {}},
        "effective_query_ratio": 1 - step / 10,
        "replay_fraction": step / 10 if ssr else 0.0,
        "reward_by_category": {"2 terms": 0.8, "6 terms": step / 20},
        "queries_by_category": {"2 terms": 0.75, "6 terms": 0.25},
        "replay_by_category": {"2 terms": 0.5, "6 terms": 0.5} if ssr and step > 1 else {},
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
    model: Path | str = "tiny",
    answers: dict[int, list[Group]] | None = None,
    **metrics,
) -> Path:
    """A run of this algorithm from this model; `answers` are to held-out questions, by step; `metrics` replace those of
    every step."""
    folder.mkdir(parents=True)
    config = Config(
        seed=seed,
        run=RunConfig(name=folder.name),
        policy=PolicyConfig(model=str(model)),
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
    for step, answered in (answers or {}).items():
        (folder / "validation").mkdir(exist_ok=True)
        write_groups(folder / "validation" / validation_name(step), answered)
    return folder


FAST, SLOW = "\\boxed{3}", "6-0=6\n6+8=14\n14-6=8\n8-7=1\n\\boxed{1}"
RETHINKS = f"6-0=6\n6+8=15\n\\boxed{{2}}\n\nWait, I should check.\n{SLOW}"


def write_stages(folder: Path) -> tuple[Path, Path]:
    """A run of 6 steps and one of 4 that goes on from its best checkpoint, with answers to two questions: fast and
    wrong before, slow and right after stage 1, and one of them rethought after stage 2."""

    def answered(*texts: tuple[str, float]) -> list[Group]:
        return [
            group(number, [pair], "What is the result?", f"{4 + number} terms", picture(176, 16))
            for number, pair in enumerate(texts)
        ]

    before, middle = [(FAST, 0.0)] * 2, [(SLOW + " ", 1.0), (SLOW, 0.0)]
    completions = [group(0, [("of stage 1", 1.0), ("no", 0.0)])], [group(0, [("of stage 2", 1.0), ("no", 0.0)])]
    first = write_run(
        folder / "stage1",
        accuracies={0: 0.25, 3: 0.5, 6: 0.45},
        answers={0: answered(*before), 6: answered(*middle)},
        groups=completions[0],
    )
    second = write_run(
        folder / "stage2",
        steps=4,
        model=first / "checkpoints" / "best",
        accuracies={0: 0.5, 4: 0.75},
        answers={0: answered(*middle), 4: answered((SLOW * 40, 1.0), (RETHINKS, 1.0))},
        groups=completions[1],
    )
    return first, second


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


CALL = '<tool_call>\n{"name": "crop", "arguments": {"box": [0, 0, 32, 32]}}\n</tool_call>'


def conversation(*parts: str | dict, finish_reason: str = "stop") -> Completion:
    """A response of several turns: what the policy said, and as fields of `Observed` what it was answered; a token is a
    character of either."""
    ids, logprobs, text, observed = [], [], "", []
    for part in parts:
        heard = "" if isinstance(part, str) else part.get("text", "")
        start, said = len(ids), part if isinstance(part, str) else heard
        ids += [ord(c) for c in said]
        logprobs += [-1.0 if isinstance(part, str) else math.nan] * len(said)
        if isinstance(part, str):
            text += part
        else:
            images = tuple({"bytes": image} for image in part.get("images", ()))
            observed.append(Observed(start, len(ids), len(text), **part | {"images": images}))
    return Completion(ids, logprobs, text, finish_reason, observed=tuple(observed))


def looked(number: int, *responses: tuple[Completion, float]) -> Group:
    """A judged group of (response, reward) whose responses are made by hand."""
    judged = group(number, [(response.text, reward) for response, reward in responses], image=picture())
    return replace(judged, completions=[response for response, _ in responses])


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
