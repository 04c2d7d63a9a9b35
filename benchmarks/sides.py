"""The sides of the end-to-end benchmark, each as a function that runs in processes of its own: two trainers, and
transformers' generate alone.

All answer the same questions in the same order and report a `Step` whenever they are told to take one. The ranks of a
side share its questions, and each reports a `Step` of its own.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rethinker.config import Config
from rethinker.samples import Query, Sample

PHASES = ("rollout", "reward", "train", "sync")


@dataclass(frozen=True)
class Step:
    """One step of one side: seconds by phase, and the tokens of its queries x group-size pairs."""

    rollout_s: float
    reward_s: float
    train_s: float
    sync_s: float
    total_s: float
    cpu_s: float  # of all threads: what a busy machine does not stretch
    prompt_tokens: int
    response_tokens: int
    reward_mean: float | None  # of a side that judges
    peak_memory_gb: float  # resident memory so far, GiB
    idle_tokens: int = 0  # of both kinds, of pairs without a gradient, which a side's training leaves out


def of_all_ranks(steps: Sequence[Step]) -> Step:
    """What the ranks took together: the phases of the one that sampled longest, the longest total, and all of their
    tokens, CPU time and memory (peaks at any time, with the libraries that they share)."""
    rewards = [step.reward_mean for step in steps if step.reward_mean is not None]
    summed = ("cpu_s", "prompt_tokens", "response_tokens", "idle_tokens", "peak_memory_gb")
    return replace(
        max(steps, key=lambda step: step.rollout_s),
        total_s=max(step.total_s for step in steps),
        reward_mean=statistics.fmean(rewards) if rewards else None,
        **{name: sum(getattr(step, name) for step in steps) for name in summed},
    )


def rethinker_side(pipe: Connection, config: Config, model_dir: Path, steps: int) -> None:
    """This trainer: the loop of rethinker/train.py with one optimizer step per episode and nothing but the step."""
    from rethinker.algorithm.advantages import assign_advantages
    from rethinker.algorithm.objective import has_gradient
    from rethinker.algorithm.replay import ReplayBuffer
    from rethinker.algorithm.selection import select_batch
    from rethinker.data.prompts import PromptEncoder
    from rethinker.episode import judge, roll_out
    from rethinker.policy.engine import PolicyEngine
    from rethinker.policy.loading import load_processor
    from rethinker.rewards.checker import AnswerChecker
    from rethinker.rollout.engine import make_engine
    from rethinker.rollout.sampling import seed_everything
    from rethinker.runtime import distributed
    from rethinker.runtime.garbage import no_full_collections
    from rethinker.runtime.ownership import share
    from rethinker.runtime.profiling import phase

    ranks = distributed.start(config.rollout.timeout_s)
    seed_everything(config.seed)
    encoder = PromptEncoder(load_processor(model_dir), config.data)
    queries = first_queries(config, encoder, steps)
    policy = PolicyEngine(config, model_dir, encoder, ranks, steps)
    rollout = make_engine(config, str(model_dir), **vars(ranks))
    replay = ReplayBuffer(config.replay, config.seed)
    Q = config.train.episode_queries
    with AnswerChecker(config.reward) as checker, no_full_collections():
        checker.start()
        while _told_to_step(pipe):
            times: dict[str, float] = {}
            start, cpu_start = time.perf_counter(), time.process_time()
            with phase("rollout", times):
                asked = queries[policy.steps * Q : (policy.steps + 1) * Q]
                mine = asked[ranks.rank :: ranks.world_size]
                prompts = [encoder.encode(query) for query in mine]
                groups = roll_out(mine, prompts, policy.version, rollout, config, seed=policy.steps)
            with phase("reward", times):  # and waiting for the slowest rank
                judge(groups, checker, config)
                groups = share(groups, asked, policy.steps * Q, ranks)
            assign_advantages(groups, config.algorithm, {})
            batch = select_batch(groups, replay, config)
            with phase("train", times):
                policy.train_step(batch.samples)
            with phase("sync", times):
                policy.version += 1
                rollout.sync(policy.weights, policy.version)
            total, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            pairs = [sample for group in groups if group.owner == ranks.rank for sample in group.samples()]
            prompt_tokens, response_tokens = _tokens(pairs)
            idle = [pair for pair in pairs if not has_gradient(pair, config.algorithm)]
            rewards = [pair.reward for pair in pairs]
            pipe.send(_step(times, total, cpu, prompt_tokens, response_tokens, rewards, sum(_tokens(idle))))
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

    from rethinker.data.prompts import PromptEncoder
    from rethinker.policy.loading import load_processor
    from rethinker.rewards.checker import AnswerChecker

    disable_progress_bar()
    _, ranks = _place()
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
            total, cpu = time.perf_counter() - self.start, time.process_time() - self.cpu_start
            times["time_train_s"] = total - times["time_rollout_s"] - times["time_reward_s"]
            pipe.send(_step(times, total, cpu, **seen))
            self._wait(control)

        def _wait(self, control):
            control.should_training_stop = not _told_to_step(pipe)
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

    with tempfile.TemporaryDirectory() as scratch, AnswerChecker(config.reward) as checker:
        checker.start()

        def reward(completions: list[Any], row: list[int], **_: Any) -> list[float]:
            texts = [completion[0]["content"] for completion in completions]
            scores = checker.score(
                [(str(i), text, queries[r]) for i, (text, r) in enumerate(zip(texts, row, strict=True))]
            )
            return [scores[str(i)] for i in range(len(texts))]

        trainer = TimedTrainer(
            # fp32 masters; on a GPU it computes in bfloat16 by autocast
            model=Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=torch.float32),
            reward_funcs=reward,
            args=GRPOConfig(output_dir=scratch, **trl_settings(config, steps, micro_batch, ranks)),
            train_dataset=_trl_dataset(queries, config),
            processing_class=processor,
            callbacks=[TakeTurns()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def generate_side(pipe: Connection, config: Config, model_dir: Path, steps: int, batch: int) -> None:
    """Transformers' generate with the weights that training starts from: the same questions, no log-probs, no training.

    Args:
        pipe, config, model_dir, steps: as of the other sides.
        batch: responses that one call samples, `rollout.group_size` to each of its questions.
    """
    from rethinker.runtime.torchvision_cpu import make_importable

    make_importable()
    import torch
    from transformers import GenerationConfig, Qwen2_5_VLForConditionalGeneration

    from rethinker.data.images import open_image
    from rethinker.data.prompts import PromptEncoder
    from rethinker.policy.loading import load_processor
    from rethinker.rollout.sampling import seed_everything, stop_token_ids

    seed_everything(config.seed)
    processor = load_processor(model_dir)
    queries = first_queries(config, PromptEncoder(processor, config.data), steps)
    rank, ranks = _place()
    tokenizer, Q, G = processor.tokenizer, config.train.episode_queries, config.rollout.group_size
    at_once = max(1, batch // G)
    tokenizer.padding_side = "left"
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    dtype = getattr(torch, config.policy.dtype)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(model_dir, dtype=dtype).to(device).eval()
    stop_ids = stop_token_ids(tokenizer, model.config, model.generation_config)
    stops = torch.tensor(stop_ids, device=device)
    model.generation_config = GenerationConfig(  # whatever is not set here would come from the model's own
        do_sample=True,
        temperature=config.rollout.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=config.rollout.max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        num_return_sequences=G,
    )
    while _told_to_step(pipe):
        start, cpu_start = time.perf_counter(), time.process_time()
        prompt_tokens = response_tokens = 0
        asked, queries = queries[:Q][rank::ranks], queries[Q:]
        for part in (asked[i : i + at_once] for i in range(0, len(asked), at_once)):
            texts = processor.apply_chat_template(
                [_messages(query, config, with_image=True) for query in part],
                tokenize=False,
                add_generation_prompt=True,
            )
            images = [open_image(query.images[0], query.id) for query in part]
            inputs = processor(text=texts, images=images, padding=True, return_tensors="pt").to(device)
            with torch.inference_mode():
                sampled = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]  # [B, L]
            tokenizer.batch_decode(sampled, skip_special_tokens=True)
            stopped = torch.isin(sampled, stops)
            # A response ends with its first stop token: that one counts, what follows does not.
            response_tokens += int((stopped.cumsum(1) - stopped.int() == 0).sum())
            prompt_tokens += G * int(inputs["attention_mask"].sum())
        total, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        pipe.send(_step({"time_rollout_s": total}, total, cpu, prompt_tokens, response_tokens))


def trl_settings(config: Config, steps: int, micro_batch: int, ranks: int) -> dict[str, Any]:
    """GRPOConfig's arguments for the same step as `config`'s, chosen for speed; micro_batch: pairs on each rank."""
    import torch

    train, algorithm = config.train, config.algorithm
    with_vllm = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": config.rollout.gpu_memory_utilization,
    }
    return (with_vllm if torch.cuda.is_available() and config.rollout.backend == "vllm" else {}) | {
        "use_cpu": not torch.cuda.is_available(),
        "bf16": config.policy.dtype == "bfloat16",
        "gradient_checkpointing": config.policy.gradient_checkpointing,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": train.batch_pairs // (micro_batch * ranks),
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
        "ddp_find_unused_parameters": False,
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
    from rethinker.data.datasets import load_queries
    from rethinker.data.query_stream import QueryStream
    from rethinker.embedded.files import as_files

    queries = load_queries(as_files(config.data, "train"), "train")
    stream = QueryStream(queries, seed=config.seed, category_weights=config.data.category_weights)
    return [encoder.fitting(stream) for _ in range(steps * config.train.episode_queries)]


def _trl_dataset(queries: list[Query], config: Config) -> Any:
    """TRL's form: messages, whose first one gets the row's image put before its text, and the row's number."""
    from datasets import Dataset, Image

    return Dataset.from_dict(
        {
            "prompt": [_messages(query, config) for query in queries],
            "image": [query.images[0] for query in queries],
            "row": list(range(len(queries))),
        }
    ).cast_column("image", Image())


def _messages(query: Query, config: Config, with_image: bool = False) -> list[dict[str, Any]]:
    """The chat that asks a question; `with_image`: as a processor's template reads it, the place of its image first."""
    text = config.data.prompt.replace("{question}", query.question)
    content = [{"type": "image"}, {"type": "text", "text": text}] if with_image else text
    system = [{"role": "system", "content": config.data.system}] if config.data.system is not None else []
    return [*system, {"role": "user", "content": content}]


def _place() -> tuple[int, int]:
    """This process's rank and their number."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _tokens(pairs: list[Sample]) -> tuple[int, int]:
    """The tokens of the pairs' prompts, and of their responses."""
    return sum(pair.prompt_tokens for pair in pairs), sum(pair.completion.tokens for pair in pairs)


def _told_to_step(pipe: Connection) -> bool:
    """Wait for the next turn; False when there is none."""
    try:
        return pipe.recv() == "step"
    except EOFError:
        return False


def _step(
    times: dict[str, float],
    total: float,
    cpu: float,
    prompt_tokens: int,
    response_tokens: int,
    rewards: list[float] | None = None,
    idle_tokens: int = 0,
) -> Step:
    from rethinker.policy.throughput import peak_memory_gb

    seconds = {f"{name}_s": times.get(f"time_{name}_s", 0.0) for name in PHASES}
    return Step(
        **seconds,
        total_s=total,
        cpu_s=cpu,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        reward_mean=statistics.fmean(rewards) if rewards else None,
        peak_memory_gb=peak_memory_gb(),
        idle_tokens=idle_tokens,
    )
