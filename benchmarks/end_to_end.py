"""One GRPO step, end to end: this trainer beside TRL's GRPOTrainer, on the same model, questions and machine.

    python -m benchmarks.end_to_end [--steps 5] [--queries 64] [--group-size 8] [--json FILE]

A step is rollout, reward, advantages, one optimizer step on all queries x group-size pairs and, here, the weight sync.
Each side runs in a process of its own with the same number of threads and does nothing while the other one works;
they take turns, after one step each that is not counted. TRL generates with transformers: on CPU its vLLM integration
stops at the first weight sync, as it loads weights into layers that vLLM's CPU kernels have packed. TRL gets what makes
it fastest: one generation per optimizer step, so that it needs no old log-probs; no gradient checkpointing; no reference
model, evaluation, logging or saving; the micro-batch that measured fastest.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.machine import cores, describe
from rethinker.config import Config
from rethinker.samples import Query
from rethinker.settings import load_config

_PHASES = ("rollout", "reward", "train", "sync", "total")
_DEADLINE_S = 1800  # of one step or of a side's start


@dataclass(frozen=True)
class Step:
    """One step of one side: seconds by phase, and the tokens of its queries x group-size pairs."""

    rollout_s: float
    reward_s: float
    train_s: float
    sync_s: float
    total_s: float
    prompt_tokens: int
    response_tokens: int
    reward_mean: float
    peak_memory_gb: float  # resident memory of the side's process so far, GiB


class Side:
    """A trainer in a process of its own that takes one step when told to."""

    def __init__(self, name: str, run: Callable[..., None], *arguments: Any) -> None:
        """
        Args:
            name: for messages.
            run: called as run(pipe, *arguments) in the new process; for each "step" it receives it answers a `Step`.
        """
        self.name = name
        spawn = multiprocessing.get_context("spawn")
        self._pipe, other = spawn.Pipe()
        self._process = spawn.Process(target=run, args=(other, *arguments))
        self._process.start()
        other.close()

    def step(self) -> Step:
        """Take one step while everything else waits.

        Raises:
            RuntimeError: the process ended; its own error stands on stderr.
            TimeoutError: no answer after half an hour.
        """
        self._pipe.send("step")
        try:
            if not self._pipe.poll(_DEADLINE_S):
                raise TimeoutError(f"{self.name} took no step in {_DEADLINE_S} s")
            return self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name} ended with exit code {self._process.exitcode}") from None

    def close(self) -> None:
        """End the process: its pipe closes, or it is killed."""
        self._pipe.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def rethinker_side(pipe: Connection, config: Config, model_dir: Path, steps: int) -> None:
    """This trainer: the loop of rethinker/train.py with one optimizer step per episode and nothing but the step."""
    from rethinker.algorithm.advantages import assign_advantages
    from rethinker.algorithm.replay import ReplayBuffer
    from rethinker.algorithm.selection import select_batch
    from rethinker.policy.engine import PolicyEngine
    from rethinker.policy.model import load_processor
    from rethinker.rollout import make_engine
    from rethinker.runtime import distributed
    from rethinker.runtime.profiling import phase
    from rethinker.tasks.prompts import PromptEncoder
    from rethinker.tasks.reward import AnswerChecker
    from rethinker.train import judge, roll_out, seed_everything

    ranks = distributed.start(config.rollout.timeout_s)
    seed_everything(config.seed)
    encoder = PromptEncoder(load_processor(model_dir), config.data)
    queries = first_queries(config, encoder, steps)
    policy = PolicyEngine(config, model_dir, encoder, ranks, steps)
    rollout = make_engine(config, str(model_dir), rank=0, world_size=1, local_rank=0)
    replay = ReplayBuffer(config.replay, config.seed)
    Q = config.train.episode_queries
    with AnswerChecker(config.reward) as checker:
        while _told_to_step(pipe):
            times: dict[str, float] = {}
            start = time.perf_counter()
            with phase("rollout", times):
                asked = queries[policy.steps * Q : (policy.steps + 1) * Q]
                groups = roll_out(asked, policy.steps, policy.version, rollout, encoder, config, ranks)
            with phase("reward", times):
                judge(groups, checker)
            assign_advantages(groups, config.algorithm.advantage_scale)
            batch = select_batch(groups, name=config.algorithm.name, pairs=config.train.batch_pairs, replay=replay)
            with phase("train", times):
                policy.train_step(batch.samples)
            with phase("sync", times):
                policy.version += 1
                rollout.sync(policy.weights, policy.version)
            total = time.perf_counter() - start
            pairs = [(group, i) for group in groups for i in range(len(group.completions))]
            prompt_tokens = sum(group.prompt_tokens for group, _ in pairs)
            response_tokens = sum(len(group.completions[i].token_ids) for group, i in pairs)
            rewards = [group.rewards[i] for group, i in pairs]
            pipe.send(_step(times, total, prompt_tokens, response_tokens, rewards))
    rollout.close()
    distributed.stop()


def trl_side(pipe: Connection, config: Config, model_dir: Path, steps: int, micro_batch: int) -> None:
    """TRL's GRPOTrainer on the same questions in the same order, with the same objective and reward."""
    from rethinker.runtime.torchvision_cpu import make_importable

    make_importable()
    import torch
    from transformers import PrinterCallback, Qwen2_5_VLForConditionalGeneration, TrainerCallback
    from transformers.utils.logging import disable_progress_bar
    from trl import GRPOConfig, GRPOTrainer

    from rethinker.policy.model import load_processor
    from rethinker.tasks.prompts import PromptEncoder
    from rethinker.tasks.reward import AnswerChecker

    disable_progress_bar()
    processor = load_processor(model_dir)
    queries = first_queries(config, PromptEncoder(processor, config.data), steps)
    processor.tokenizer.padding_side = "left"
    times: dict[str, float] = {}
    seen: dict[str, Any] = {}

    class TimedTrainer(GRPOTrainer):
        """Notes how long generation and rewards took, and how many tokens there were."""

        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            batch = super()._generate_and_score_completions(inputs)
            times["time_rollout_s"] = time.perf_counter() - start - times["time_reward_s"]
            seen.update(
                prompt_tokens=int(batch["prompt_mask"].sum()), response_tokens=int(batch["completion_mask"].sum())
            )
            return batch

        def _calculate_rewards(self, *arguments):
            start = time.perf_counter()
            rewards = super()._calculate_rewards(*arguments)
            times["time_reward_s"] = time.perf_counter() - start
            seen["rewards"] = rewards.flatten().tolist()
            return rewards

    class TakeTurns(TrainerCallback):
        """Reports each optimizer step, then waits to be told to take the next."""

        def on_train_begin(self, args, state, control, **_):
            self._wait(control)

        def on_step_end(self, args, state, control, **_):
            total = time.perf_counter() - self.start
            times["time_train_s"] = total - times["time_rollout_s"] - times["time_reward_s"]
            pipe.send(_step(times, total, **seen))
            self._wait(control)

        def _wait(self, control):
            control.should_training_stop = not _told_to_step(pipe)
            self.start = time.perf_counter()

    with tempfile.TemporaryDirectory() as scratch, AnswerChecker(config.reward) as checker:

        def reward(completions: list[Any], row: list[int], **_: Any) -> list[float]:
            texts = [completion[0]["content"] for completion in completions]
            scores = checker.score(
                [(str(i), text, queries[r]) for i, (text, r) in enumerate(zip(texts, row, strict=True))]
            )
            return [scores[str(i)] for i in range(len(texts))]

        trainer = TimedTrainer(
            model=Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32),
            reward_funcs=reward,
            args=GRPOConfig(output_dir=scratch, **trl_settings(config, steps, micro_batch)),
            train_dataset=_trl_dataset(queries, config),
            processing_class=processor,
            callbacks=[TakeTurns()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def trl_settings(config: Config, steps: int, micro_batch: int) -> dict[str, Any]:
    """GRPOConfig's arguments for the same step as `config`'s, chosen for speed."""
    train, algorithm = config.train, config.algorithm
    return {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": train.batch_pairs // micro_batch,
        "num_generations": config.rollout.group_size,
        "max_completion_length": config.rollout.max_new_tokens,
        "temperature": config.rollout.temperature,
        "max_steps": steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": train.betas[0],
        "adam_beta2": train.betas[1],
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "epsilon": algorithm.clip_low,
        "epsilon_high": algorithm.clip_high,
        "loss_type": "dapo",  # mean over all tokens of the step, as algorithm.aggregation=token
        "beta": 0.0,
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": config.seed,
    }


def first_queries(config: Config, encoder: Any, steps: int) -> list[Query]:
    """The questions of the first `steps` steps, in the order in which a run asks them."""
    from rethinker.tasks.datasets import QueryStream, load_queries

    stream = QueryStream(
        load_queries(config.data, "train"), seed=config.seed, category_weights=config.data.category_weights
    )
    return [encoder.fitting(stream) for _ in range(steps * config.train.episode_queries)]


def _trl_dataset(queries: list[Query], config: Config) -> Any:
    """TRL's form: messages, whose first one gets the row's image put before its text, and the row's number."""
    from datasets import Dataset, Image

    system = [{"role": "system", "content": config.data.system}] if config.data.system else []
    texts = [config.data.prompt.replace("{question}", query.question) for query in queries]
    return Dataset.from_dict(
        {
            "prompt": [[*system, {"role": "user", "content": text}] for text in texts],
            "image": [query.images[0] for query in queries],
            "row": list(range(len(queries))),
        }
    ).cast_column("image", Image())


def _told_to_step(pipe: Connection) -> bool:
    """Wait for the next turn; False when there is none."""
    try:
        return pipe.recv() == "step"
    except EOFError:
        return False


def _step(
    times: dict[str, float], total: float, prompt_tokens: int, response_tokens: int, rewards: list[float]
) -> Step:
    from rethinker.policy.throughput import peak_memory_gb

    seconds = {f"{name}_s": times.get(f"time_{name}_s", 0.0) for name in _PHASES[:-1]}
    return Step(
        **seconds,
        total_s=total,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        reward_mean=statistics.fmean(rewards),
        peak_memory_gb=peak_memory_gb(),
    )


def prepare_model(config: Config) -> Path:
    """The tiny model after its supervised warm-up, where a run of the recipe starts."""
    from rethinker.policy.warmup import warmed_up_tiny

    return warmed_up_tiny(config.policy.warmup, config.data)


def measure(config: Config, model_dir: Path, steps: int, trl_micro_batch: int) -> dict[str, list[Step]]:
    """Both sides' counted steps, taken in turns after one step each that is not counted."""
    taken: dict[str, list[Step]] = {"rethinker": [], "trl": []}
    sides: list[Side] = []
    try:
        sides.append(Side("rethinker", rethinker_side, config, model_dir, steps + 1))
        sides[0].step()
        sides.append(Side("trl", trl_side, config, model_dir, steps + 1, trl_micro_batch))
        sides[1].step()
        for number in range(steps):
            for side in sides if number % 2 == 0 else reversed(sides):
                taken[side.name].append(side.step())
            print(f"step {number + 1}/{steps}: " + "  ".join(f"{n} {s[-1].total_s:.2f} s" for n, s in taken.items()))
    finally:
        for side in sides:
            side.close()
    return taken


def summarize(taken: dict[str, list[Step]]) -> dict[str, Any]:
    """Medians and spreads.

    Returns:
        For each side `<phase>_s` as {median, min, max}, `tokens_per_s` (sampled tokens over the step's seconds),
        `response_tokens`, `prompt_tokens`, `peak_memory_gb`; and `ratio` of TRL's step time to ours as
        {median (of the medians), min, max (of the turns)}.
    """
    summary: dict[str, Any] = {}
    for name, steps in taken.items():
        seconds = {f"{phase}_s": [getattr(step, f"{phase}_s") for step in steps] for phase in _PHASES}
        summary[name] = {key: _spread(values) for key, values in seconds.items()}
        summary[name] |= {
            "tokens_per_s": _spread([step.response_tokens / step.total_s for step in steps]),
            "prompt_tokens": statistics.fmean(step.prompt_tokens for step in steps),
            "response_tokens": statistics.fmean(step.response_tokens for step in steps),
            "peak_memory_gb": max(step.peak_memory_gb for step in steps),
        }
    turns = [trl.total_s / ours.total_s for trl, ours in zip(taken["trl"], taken["rethinker"], strict=True)]
    medians = [summary[name]["total_s"]["median"] for name in ("trl", "rethinker")]
    summary["ratio"] = _spread(turns) | {"median": medians[0] / medians[1]}
    return summary


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(summary: dict[str, Any]) -> str:
    """The summary as a person reads it: seconds of the median step, and the ratio."""
    head = (
        f"{'':<10}"
        + "".join(f"{phase + ' s':>11}" for phase in _PHASES)
        + f"{'(range)':>16}{'tokens/s':>10}{'memory GiB':>12}"
    )
    lines = [head]
    for name in ("rethinker", "trl"):
        side = summary[name]
        total = side["total_s"]
        lines.append(
            f"{name:<10}"
            + "".join(f"{side[f'{phase}_s']['median']:>11.2f}" for phase in _PHASES)
            + f"{total['min']:>9.2f}-{total['max']:<6.2f}{side['tokens_per_s']['median']:>10,.0f}{side['peak_memory_gb']:>12.2f}"
        )
    ratio = summary["ratio"]
    lines.append(
        f"TRL's step takes {ratio['median']:.2f} times as long ({ratio['min']:.2f}-{ratio['max']:.2f} by turn)"
    )
    return "\n".join(lines)


def benchmark_config(queries: int, group_size: int, scratch: str) -> Config:
    """The default recipe with one optimizer step per rollout on every pair, as TRL trains."""
    overrides = {
        "algorithm.name": "grpo",
        "rollout.group_size": group_size,
        "train.episode_queries": queries,
        "train.batch_pairs": queries * group_size,
        "train.max_steps": 1,
        "run.dir": scratch,
    }
    return load_config("easy_vqa_cpu", overrides)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each side")
    parser.add_argument("--queries", type=int, default=64, help="queries per step")
    parser.add_argument("--group-size", type=int, default=8, help="responses per query")
    parser.add_argument("--threads", type=int, default=cores(), help="threads of each side")
    parser.add_argument("--trl-micro-batch", type=int, default=128, help="pairs per forward pass of TRL")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args(arguments)
    os.environ.update(
        OMP_NUM_THREADS=str(options.threads),
        DS_ACCELERATOR="cpu",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        VLLM_LOGGING_LEVEL="ERROR",
        PYTHONWARNINGS="ignore",
    )
    with tempfile.TemporaryDirectory() as scratch:
        config = benchmark_config(options.queries, options.group_size, scratch)
        # In a process of its own, so that this one stays small: a child's peak memory starts at its parent's.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as aside:
            model_dir = aside.submit(prepare_model, config).result()
        taken = measure(config, model_dir, options.steps, options.trl_micro_batch)
    summary = summarize(taken)
    print(table(summary))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        settings["trl"] = trl_settings(config, options.steps + 1, options.trl_micro_batch)
        steps = {name: [asdict(step) for step in steps] for name, steps in taken.items()}
        result = {"machine": describe(), "settings": settings, "summary": summary, "steps": steps}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
