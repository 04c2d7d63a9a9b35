"""One GRPO step, end to end: this trainer beside TRL's GRPOTrainer, and its rollout beside transformers' generate, on
the same model, questions and machine.

    python -m benchmarks.end_to_end [--steps 5] [--queries 64] [--group-size 8] [--ranks 2] [--recipe sums_cpu]
                                    [--model CHECKPOINT] [--json FILE]
    python -m benchmarks.end_to_end --size 3B --queries 16 --trl-micro-batch 8 --json FILE     # on a GPU

A step is rollout, reward, advantages, one optimizer step on all queries x group-size pairs and, here, the weight sync.
Pairs without an advantage, whose gradient is 0, count in the loss's mean on both sides; TRL computes them, too.
All weights are trained, the vision tower's too. The learning rate is next to nothing, so that all sides go on sampling
what the first weights sample: a side that learnt to write more would have more to do. Each side runs in processes of
its own, all with as many ranks and threads, and does nothing while the other one works; they take turns, after one step
each that is not counted. On a GPU, whose memory may not hold both, one ends before the other begins.

Where this side samples with vLLM, a third one does nothing but transformers' generate: the weights that training starts
from, the same questions, stop tokens and longest response, all responses to a question in one batch. It needs no
log-probs, which this trainer's rollout has. What is compared is sampled tokens a second, of this trainer's whole
rollout, from questions to texts.

With --size the model is Qwen2.5-VL of that size with random weights: bfloat16 with fp32 masters and gradient
checkpointing on both sides (on a GPU), every image of --image-tokens tokens, every response of --max-new-tokens. Both
sides generate with transformers then, unless --vllm gives both vLLM in the trainer's process. MFU is that of training:
6 FLOP per language model parameter and token of the pairs that a side computes, every response with its own prompt,
whether that is computed once or each time.

On the tiny model TRL generates with transformers: on CPU its vLLM integration stops at the first weight sync, as it
loads weights into layers that vLLM's CPU kernels have packed. Otherwise TRL gets what makes it fastest: one generation
per optimizer step, so that it needs no old log-probs; no gradient checkpointing; no reference model, evaluation,
logging or saving. Which --trl-micro-batch and --generate-batch are fastest depends on the machine: try some.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from benchmarks.command_line import positive
from benchmarks.machine import cores, describe
from benchmarks.random_model import write_model
from benchmarks.sides import PHASES, Step, generate_side, of_all_ranks, rethinker_side, trl_settings, trl_side
from rethinker.config import Config, ConfigError
from rethinker.model_folder import check_model_folder
from rethinker.policy.throughput import PEAK_FLOPS
from rethinker.settings import load_config

_COLUMNS = (*PHASES, "total", "cpu")
_DEADLINE_S = 1800  # of one step or of a side's start


class Side:
    """A trainer in processes of its own, one for every rank, that takes one step when told to."""

    def __init__(self, name: str, ranks: int, run: Callable[..., None], *arguments: Any) -> None:
        """
        Args:
            name: for messages.
            ranks: processes, which find their places in the variables that torchrun sets; a single one finds none, so
                that nothing wraps its model for several.
            run: called as run(pipe, *arguments) in each of them; for each "step" it receives it answers a `Step`.
        """
        self.name = name
        spawn = multiprocessing.get_context("spawn")
        meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
        self._pipes, self._processes = [], []
        for rank in range(ranks):
            pipe, other = spawn.Pipe()
            place = meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            self._processes.append(spawn.Process(target=_as_rank, args=(place, run, other, *arguments)))
            self._processes[-1].start()
            self._pipes.append(pipe)
            other.close()

    def step(self) -> Step:
        """Take one step while everything else waits.

        Raises:
            RuntimeError: a process ended; its own error stands on stderr.
            TimeoutError: no answer after half an hour.
        """
        for pipe in self._pipes:
            pipe.send("step")
        steps = []
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            try:
                if not pipe.poll(_DEADLINE_S):
                    raise TimeoutError(f"{self.name} took no step in {_DEADLINE_S} s")
                steps.append(pipe.recv())
            except EOFError:
                process.join()
                raise RuntimeError(f"{self.name} ended with exit code {process.exitcode}") from None
        return of_all_ranks(steps)

    def close(self) -> None:
        """End the processes: their pipes close, or they are killed."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()


def _as_rank(place: dict[str, str], run: Callable[..., None], *arguments: Any) -> None:
    os.environ.update(place)
    run(*arguments)


def prepare_model(config: Config) -> Path:
    """The tiny model after its supervised warm-up, where a run of the recipe starts."""
    from rethinker.embedded.files import model_folder
    from rethinker.runtime.distributed import ALONE

    return Path(model_folder(config, ALONE))


def measure(
    config: Config,
    model_dir: Path,
    steps: int,
    ranks: int,
    trl_micro_batch: int,
    generate_batch: int = 0,
    in_turns: bool = True,
) -> dict[str, list[Step]]:
    """All sides' counted steps after one step each that is not counted; in turns, or one side after the other.

    Args:
        config: the step's settings.
        model_dir: the model that every side starts from.
        steps: counted steps of each side.
        ranks: processes of each side, which share its queries.
        trl_micro_batch: pairs per forward pass of TRL.
        generate_batch: responses per call of transformers' generate; 0: without that side.
        in_turns: whether all sides are in memory at a time.
    """
    starts = {
        "rethinker": lambda: Side("rethinker", ranks, rethinker_side, config, model_dir, steps + 1),
        "trl": lambda: Side("trl", ranks, trl_side, config, model_dir, steps + 1, trl_micro_batch),
    }
    if generate_batch:
        generate = (config, model_dir, steps + 1, generate_batch)
        starts["generate"] = lambda: Side("generate", ranks, generate_side, *generate)
    taken: dict[str, list[Step]] = {name: [] for name in starts}
    for together in (list(starts),) if in_turns else ([name] for name in starts):
        sides: list[Side] = []
        try:
            for name in together:
                sides.append(starts[name]())
                sides[-1].step()
            for number in range(steps):
                for side in sides if number % 2 == 0 else reversed(sides):
                    taken[side.name].append(side.step())
                done = "  ".join(f"{side.name} {taken[side.name][-1].total_s:.2f} s" for side in sides)
                print(f"step {number + 1}/{steps}: {done}")
        finally:
            for side in sides:
                side.close()
    return taken


def summarize(taken: dict[str, list[Step]], flop: float | None = None, peak: float | None = None) -> dict[str, Any]:
    """Medians and spreads.

    Args:
        flop: of training on one token.
        peak: what the GPU could do, FLOP/s.

    Returns:
        For each side `<phase>_s` as {median, min, max}, `tokens_per_s` (sampled tokens over the step's seconds),
        `rollout_tokens_per_s`, `response_tokens`, `prompt_tokens`, `idle_tokens`, `peak_memory_gb`, `mfu` where flop
        and peak are known; `ratio` of TRL's step time to ours as {median (of the medians), min, max (of the turns)};
        in the same form `rollout_ratio`, of our rollout's tokens per second to those of generate, where that was
        measured.
    """
    summary: dict[str, Any] = {}
    for name, steps in taken.items():
        seconds = {f"{phase}_s": [getattr(step, f"{phase}_s") for step in steps] for phase in _COLUMNS}
        summary[name] = {key: _spread(values) for key, values in seconds.items()}
        summary[name] |= {
            "tokens_per_s": _spread([step.response_tokens / step.total_s for step in steps]),
            "rollout_tokens_per_s": _spread(list(map(_rollout_rate, steps))),
            "prompt_tokens": statistics.fmean(step.prompt_tokens for step in steps),
            "response_tokens": statistics.fmean(step.response_tokens for step in steps),
            "idle_tokens": statistics.fmean(step.idle_tokens for step in steps),
            "peak_memory_gb": max(step.peak_memory_gb for step in steps),
        }
        if flop and peak and name != "generate":
            tokens = [step.prompt_tokens + step.response_tokens - step.idle_tokens for step in steps]
            done = [flop * trained / step.train_s for trained, step in zip(tokens, steps, strict=True)]
            summary[name]["mfu"] = _spread([rate / peak for rate in done])
    turns = [trl.total_s / ours.total_s for trl, ours in zip(taken["trl"], taken["rethinker"], strict=True)]
    medians = [summary[name]["total_s"]["median"] for name in ("trl", "rethinker")]
    summary["ratio"] = _spread(turns) | {"median": medians[0] / medians[1]}
    if "generate" in taken:
        pairs = zip(taken["rethinker"], taken["generate"], strict=True)
        turns = [_rollout_rate(ours) / _rollout_rate(theirs) for ours, theirs in pairs]
        medians = [summary[name]["rollout_tokens_per_s"]["median"] for name in ("rethinker", "generate")]
        summary["rollout_ratio"] = _spread(turns) | {"median": medians[0] / medians[1]}
    return summary


def _rollout_rate(step: Step) -> float:
    return step.response_tokens / step.rollout_s


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(summary: dict[str, Any]) -> str:
    """The summary as a person reads it: the median step's seconds by phase (and of CPU time), and the ratios."""
    titles = [*(f"{phase} s" for phase in _COLUMNS), "range s", "tokens/s", "memory GiB"]
    lines = [" " * 10 + "".join(f"{title:>12}" for title in titles)]
    for name in ("rethinker", "trl", "generate"):
        if (side := summary.get(name)) is None:
            continue
        cells = [f"{side[f'{phase}_s']['median']:.2f}" for phase in _COLUMNS]
        cells.append(f"{side['total_s']['min']:.2f}-{side['total_s']['max']:.2f}")
        cells += [f"{side['tokens_per_s']['median']:,.0f}", f"{side['peak_memory_gb']:.2f}"]
        lines.append(f"{name:<10}" + "".join(f"{cell:>12}" for cell in cells))
        if "mfu" in side:
            lines[-1] += f"   MFU {side['mfu']['median']:.3f}"
    ours, ratio = summary["rethinker"], summary["ratio"]
    idle = ours["idle_tokens"] / (ours["prompt_tokens"] + ours["response_tokens"])
    lines.append(f"{idle:.0%} of the tokens are of pairs without a gradient, which this trainer does not compute.")
    lines.append(
        f"TRL's step takes {ratio['median']:.2f} times as long ({ratio['min']:.2f}-{ratio['max']:.2f} by turn)"
    )
    if "rollout_ratio" in summary:
        ratio = summary["rollout_ratio"]
        ours, theirs = (summary[name]["rollout_tokens_per_s"]["median"] for name in ("rethinker", "generate"))
        lines.append(
            f"The rollout samples {ours:,.0f} tokens/s, transformers' generate {theirs:,.0f}: "
            f"{ratio['median']:.2f} times as many ({ratio['min']:.2f}-{ratio['max']:.2f} by turn)"
        )
    return "\n".join(lines)


def benchmark_config(
    recipe: str, queries: int, group_size: int, scratch: str, changes: dict[str, Any] | None = None
) -> Config:
    """A recipe with one optimizer step per rollout on every pair, as TRL trains."""
    overrides = (changes or {}) | {
        "algorithm.name": "grpo",
        "rollout.group_size": group_size,
        "train.episode_queries": queries,
        "train.batch_pairs": queries * group_size,
        "train.max_steps": 1,
        "train.learning_rate": 1e-9,
        "train.schedule": "constant",
        "policy.freeze_vision": False,
        "run.dir": scratch,
    }
    return load_config(recipe, overrides)


def random_config(options: argparse.Namespace, model_dir: Path, scratch: str) -> Config:
    """The same step on a model of `write_model`, and square images."""
    from benchmarks.train_step_workload import SIZES

    on_gpu = torch.cuda.is_available()
    pixels = options.image_tokens * (2 * SIZES[options.size].patch) ** 2
    overrides = {
        "policy.model": str(model_dir),
        "policy.dtype": "bfloat16" if on_gpu else "float32",
        "policy.gradient_checkpointing": on_gpu,
        "rollout.backend": "vllm" if options.vllm else "hf",
        "rollout.max_new_tokens": options.max_new_tokens,
        "train.micro_batch_tokens": options.micro_batch_tokens,
        "data.min_pixels": pixels,
        "data.max_pixels": pixels,
        "reward.function": f"{Path(__file__).with_name('random_model.py')}:coin",
    }
    return benchmark_config("easy_vqa_cpu", options.queries, options.group_size, scratch, overrides)


def training_flop(size: str, layers: int | None) -> float:
    """6 FLOP per parameter of the language model: of one token, forward and backward."""
    from benchmarks.train_step_workload import SIZES, build_model, model_config

    model = build_model(model_config(SIZES[size], layers), "meta", torch.float32)
    return 6.0 * sum(p.numel() for p in model.model.language_model.parameters())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=positive, default=5, help="counted steps of each side")
    parser.add_argument("--queries", type=positive, default=64, help="queries per step")
    parser.add_argument("--group-size", type=positive, default=8, help="responses per query")
    parser.add_argument("--ranks", type=positive, default=1, help="processes of each side, which share its queries")
    parser.add_argument("--threads", type=positive, help="threads of each rank; its share of the cores if left out")
    parser.add_argument("--recipe", default="sums_cpu", help="of the tiny model: sums_cpu or easy_vqa_cpu")
    parser.add_argument("--model", help="a checkpoint of the recipe to sample from, instead of what a run starts from")
    parser.add_argument("--trl-micro-batch", type=positive, default=128, help="pairs per forward pass of a rank of TRL")
    parser.add_argument(
        "--generate-batch", type=positive, default=512, help="most responses per call of a rank of generate"
    )
    parser.add_argument(
        "--size", choices=["3B", "7B", "small", "tiny"], help="random weights, instead of the tiny model"
    )
    parser.add_argument("--layers", type=positive, help="with --size: decoder layers, for a model that would not fit")
    parser.add_argument("--image-tokens", type=positive, default=256, help="with --size: of every image")
    parser.add_argument("--max-new-tokens", type=positive, default=512, help="with --size: of every response")
    parser.add_argument("--micro-batch-tokens", type=positive, default=16384, help="with --size: of this trainer")
    parser.add_argument("--vllm", action="store_true", help="with --size: both sides sample with vLLM")
    parser.add_argument("--json", type=Path, help="also write the result here")
    options = parser.parse_args(arguments)
    options.threads = options.threads or max(1, cores() // options.ranks)
    if options.queries % options.ranks:
        fitting = max(options.ranks, options.queries - options.queries % options.ranks)
        parser.error(
            f"--queries {options.queries} do not divide into --ranks {options.ranks}; set --queries to {fitting}"
        )
    if options.group_size == 1:
        parser.error("--group-size 1: TRL has no advantage for a single response; set --group-size to 2 or more")
    pairs = options.queries // options.ranks * options.group_size
    if pairs % options.trl_micro_batch:
        fitting = max(n for n in range(1, min(pairs, options.trl_micro_batch) + 1) if pairs % n == 0)
        parser.error(
            f"--trl-micro-batch {options.trl_micro_batch} does not divide the {pairs} pairs of a rank (--queries x "
            f"--group-size / --ranks); set --trl-micro-batch to {fitting}"
        )
    if options.size is None and (options.layers or options.vllm):
        parser.error("--layers and --vllm go with --size")
    if options.size and options.model:
        parser.error("--model goes without --size")
    on_gpu = torch.cuda.is_available()
    os.environ.update(
        OMP_NUM_THREADS=str(options.threads),
        **({} if on_gpu else {"DS_ACCELERATOR": "cpu"}),
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        VLLM_LOGGING_LEVEL="ERROR",
        PYTHONWARNINGS="ignore",
    )
    with tempfile.TemporaryDirectory() as scratch:
        if not options.size:
            try:
                if options.model:
                    check_model_folder(Path(options.model), f"--model {options.model}")
                changes = {"policy.model": options.model} if options.model else {}
                config = benchmark_config(options.recipe, options.queries, options.group_size, scratch, changes)
            except ConfigError as error:
                parser.error(str(error))
        # In a process of its own, so that this one stays small: a child's peak memory starts at its parent's.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as aside:
            if options.size:
                model_dir = Path(scratch) / "model"
                aside.submit(write_model, model_dir, options.size, options.layers, options.image_tokens).result()
                config = random_config(options, model_dir, scratch)
            else:
                model_dir = aside.submit(prepare_model, config).result()
        generate_batch = options.generate_batch if config.rollout.backend == "vllm" else 0
        batches = (options.trl_micro_batch, generate_batch)
        taken = measure(config, model_dir, options.steps, options.ranks, *batches, in_turns=not on_gpu)
    flop = training_flop(options.size, options.layers) if options.size else None
    name = torch.cuda.get_device_name() if on_gpu else ""
    summary = summarize(taken, flop, next((peak for part, peak in PEAK_FLOPS.items() if part in name), None))
    print(table(summary))
    if options.json:
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        settings["trl"] = trl_settings(config, options.steps + 1, options.trl_micro_batch, options.ranks)
        steps = {name: [asdict(step) for step in steps] for name, steps in taken.items()}
        result = {"machine": describe(), "settings": settings, "summary": summary, "steps": steps}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
