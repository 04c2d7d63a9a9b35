"""What must hold before anything is loaded or written: the geometry of a step, and what the run needs of the machine.

Every check raises ConfigError with the setting's dotted name, its value, and what would work.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from rethinker.config import Config, ConfigError
from rethinker.doctor import check_packages, cpp_compiler
from rethinker.model_folder import check_model_folder, decoder_matrices
from rethinker.rewards.entries import NEEDS, reward_entries
from rethinker.runtime.user_code import user_file

MIN_FREE_BYTES = 200 * 2**20  # the tiny model, its checkpoints, completions and logs


def check_geometry(config: Config) -> None:
    """Settings fit each other, and groups and episodes fill batches exactly."""
    data, policy, rollout, rethink = config.data, config.policy, config.rollout, config.rethink
    group, batch, episode = rollout.group_size, config.train.batch_pairs, config.train.episode_queries
    if batch % group:
        raise ConfigError(
            f"rollout.group_size={group} needs train.batch_pairs ({batch}) divisible by {group}; "
            f"nearest: {_multiples(batch, group)}"
        )
    if episode * group % batch:
        raise ConfigError(
            f"train.batch_pairs={batch} needs train.episode_queries x rollout.group_size "
            f"({episode} x {group} = {episode * group}) divisible by {batch}; "
            f"nearest train.episode_queries: {_multiples(episode, batch // group)}"
        )
    baseline, own_loss = config.algorithm.advantage_baseline, ":" in config.algorithm.loss
    if group == 1 and baseline != "batch" and not own_loss and not rethink.fraction:
        raise ConfigError(
            f"rollout.group_size=1 with algorithm.advantage_baseline={baseline} compares a response with itself, so "
            "that no advantage differs from 0; set the one to 2 or more, as 8, or the other to batch"
        )
    if data.min_pixels > data.max_pixels:
        raise ConfigError(f"data.min_pixels={data.min_pixels} must not exceed data.max_pixels ({data.max_pixels})")
    if data.prompt.count("{question}") != 1:
        raise ConfigError(f"data.prompt={data.prompt!r} must hold {{question}} exactly once")
    if data.streaming and config.train.max_steps is None:
        raise ConfigError(
            "data.streaming=true does not know how many questions train.epochs is about; set train.max_steps"
        )
    if data.streaming and data.draw != "uniform":
        raise ConfigError(
            f"data.draw={data.draw} weighs all questions, which data.streaming=true does not hold; set "
            "data.draw=uniform, or data.streaming=false"
        )
    if data.streaming and policy.model == "tiny":
        raise ConfigError(
            "policy.model=tiny is warmed up on all questions, which data.streaming=true does not hold; give a model "
            "folder, or set data.streaming=false"
        )
    if policy.lora.target_modules and not policy.lora.rank:
        raise ConfigError(f"policy.lora.target_modules={policy.lora.target_modules} needs policy.lora.rank, as 16")
    if not rethink.triggers or not all(rethink.triggers.values()):
        raise ConfigError(f"rethink.triggers={rethink.triggers} needs at least one name with a text that is not empty")
    if rethink.fraction > 0 and rollout.backend == "recorded":
        raise ConfigError(
            f"rethink.fraction={rethink.fraction} needs an engine that can go on from a text; with "
            "rollout.backend=recorded set it to 0 (recorded responses keep what rethinking made of them)"
        )
    reward_entries(config.reward)
    _check_environment(config)
    _check_algorithm(config)
    _check_reference(config)
    _check_backend(config)


def _check_environment(config: Config) -> None:
    """What answers the policy goes with the other settings."""
    environment, fraction = config.environment, config.rethink.fraction
    if environment.use and fraction:
        raise ConfigError(
            f"rethink.fraction={fraction} forces second answers after a response's end, and environment.use="
            f"{environment.use} makes responses of several turns; set rethink.fraction to 0 (environment.use=[verify] "
            "forces every response to go on)"
        )
    if environment.reward_weight and not environment.use:
        raise ConfigError(
            f"environment.reward_weight={environment.reward_weight} weighs what an environment gives; name one in "
            "environment.use, or set it to 0"
        )
    if environment.reward_weight and config.algorithm.advantages_per_reward:
        raise ConfigError(
            "algorithm.advantages_per_reward=true takes an advantage of each reward function, and "
            f"environment.reward_weight={environment.reward_weight} is of none; set it to 0, or the other to false"
        )


def _check_algorithm(config: Config) -> None:
    """Rules that exclude each other are not given together."""
    algorithm = config.algorithm
    if algorithm.max_advantage is not None and algorithm.name == "grpo":
        raise ConfigError(
            f"algorithm.max_advantage={algorithm.max_advantage} drops samples, and algorithm.name=grpo keeps "
            "all; set algorithm.name to filter or ssr"
        )
    if algorithm.advantages_per_reward and len(config.reward.functions or ()) < 2:
        raise ConfigError(
            "algorithm.advantages_per_reward=true tells several reward functions apart; list them in reward.functions, "
            "or set it to false"
        )
    refill = f"algorithm.refill_rounds={algorithm.refill_rounds} drops queries whose rewards are equal, and"
    if algorithm.refill_rounds and algorithm.advantage_baseline == "batch":
        raise ConfigError(
            f"{refill} algorithm.advantage_baseline=batch gives them advantages; set one to 0, or the other to group"
        )
    if algorithm.refill_rounds and algorithm.advantages_per_reward:
        raise ConfigError(
            f"{refill} algorithm.advantages_per_reward=true tells apart what their sums do not; set one to 0, or the "
            "other to false"
        )
    if config.replay.priority == "correctness" and config.replay.alpha != 1:
        raise ConfigError(
            f"replay.alpha={config.replay.alpha} is for advantages, and replay.priority=correctness does not draw by "
            "them; leave it at 1.0"
        )
    for name in ("correction_low", "correction_high"):
        if algorithm.rollout_correction is None and (bound := getattr(algorithm, name)) is not None:
            raise ConfigError(
                f"algorithm.{name}={bound} needs algorithm.rollout_correction, as token_truncate, or must be null"
            )


def _check_reference(config: Config) -> None:
    """A reference policy that moves is there, and in memory."""
    every = config.algorithm.reference_every
    if every is None:
        return
    if config.algorithm.kl_coef == 0:
        raise ConfigError(
            f"algorithm.reference_every={every} moves the reference policy of the KL, which algorithm.kl_coef=0 does "
            "without; set algorithm.kl_coef, as 0.001, or algorithm.reference_every=null"
        )
    # A mapping of the user's own: anything may be in it, and DeepSpeed says what it does not take.
    zero = config.train.deepspeed.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    if config.policy.lora.rank and zero.get("zero_hpz_partition_size", 1) != 1:
        raise ConfigError(
            f"algorithm.reference_every={every} with policy.lora changes weights of which train.deepspeed."
            f"zero_optimization.zero_hpz_partition_size={zero['zero_hpz_partition_size']} keeps a second copy; set it "
            "to 1 (leave the preset zeropp out), or algorithm.reference_every=null"
        )
    offload = zero.get("offload_param")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        raise ConfigError(
            f"algorithm.reference_every={every} copies weights in memory, and train.deepspeed.zero_optimization."
            "offload_param.device=nvme holds them elsewhere; set it to cpu or none, or algorithm.reference_every=null"
        )


def schedule_length(config: Config, queries: int | None) -> int:
    """Optimizer steps of the run: train.max_steps, or what train.epochs over so many queries amounts to."""
    group, batch = config.rollout.group_size, config.train.batch_pairs
    steps = config.train.max_steps or int(config.train.epochs * queries) * group // batch
    if steps < 1:
        raise ConfigError(
            f"train.epochs={config.train.epochs} over {queries} queries is less than one step of "
            f"train.batch_pairs={batch}; set train.max_steps, or train.batch_pairs to at most {queries * group}"
        )
    return steps


def _multiples(value: int, of: int) -> str:
    below = value - value % of
    return f"{below} or {below + of}" if below else str(of)


def _check_backend(config: Config) -> None:
    """Each backend has the settings that it needs, and no others are given."""
    rollout, rethink = config.rollout, config.rethink
    if rollout.backend == "recorded" and not rollout.recording:
        raise ConfigError(
            "rollout.backend=recorded needs rollout.recording: the folder runs/<name>/completions to read"
        )
    if rollout.backend == "server" and not rollout.servers:
        raise ConfigError(
            "rollout.backend=server needs rollout.servers: the addresses that `rethinker serve` prints, as "
            "[http://127.0.0.1:8100]"
        )
    for name, backend in {"recording": "recorded", "servers": "server", "weight_folder": "server"}.items():
        if (value := getattr(rollout, name)) and rollout.backend != backend:
            raise ConfigError(f"rollout.{name}={value} needs rollout.backend={backend}")
    if len({server.rstrip("/") for server in rollout.servers}) < len(rollout.servers):
        raise ConfigError(f"rollout.servers={rollout.servers} names a server twice")
    if rollout.check_sync and rollout.tensor_parallel_size > 1:
        raise ConfigError(
            "rollout.check_sync=true compares whole tensors and needs rollout.tensor_parallel_size=1, not "
            f"{rollout.tensor_parallel_size}"
        )
    if rollout.router_replay and rollout.backend != "vllm":
        raise ConfigError(
            f"rollout.router_replay=true needs rollout.backend=vllm: {rollout.backend} does not say what it chose"
        )
    if rollout.router_replay and rollout.tensor_parallel_size > 1:
        raise ConfigError(
            "rollout.router_replay=true needs rollout.tensor_parallel_size=1, not "
            f"{rollout.tensor_parallel_size}: vLLM tells one rank of an engine what it chose"
        )
    if not rollout.max_staleness:
        return
    if rollout.backend != "server":
        raise ConfigError(
            f"rollout.max_staleness=1 needs rollout.backend=server, whose rollouts run beside the training; with "
            f"{rollout.backend} set it to 0"
        )
    if config.algorithm.rollout_correction is None:
        raise ConfigError(
            "rollout.max_staleness=1 needs algorithm.rollout_correction, as token_truncate: without it the older "
            "policy's responses would count as the newer one's"
        )
    if config.algorithm.refill_rounds:
        raise ConfigError(
            f"algorithm.refill_rounds={config.algorithm.refill_rounds} needs rollout.max_staleness=0: which queries to "
            "sample again the ranks decide together, and an episode that is sampled ahead leaves them apart"
        )
    second = rethink.second_temperature(rollout.temperature)
    if rethink.fraction and (second != rollout.temperature or not rethink.mask_trigger_tokens):
        raise ConfigError(
            "rollout.max_staleness=1 has no log-probs of the older policy for responses that were rethought at "
            f"another temperature or whose triggers are trained: set rethink.temperature (now {second}) to "
            f"rollout.temperature ({rollout.temperature}) and rethink.mask_trigger_tokens=true, or "
            "rollout.max_staleness=0"
        )


def lora_targets(linears: Collection[str], targets: list[str]) -> list[str]:
    """Of a decoder layer's linear layers, as self_attn.q_proj, those that get adapters, sorted: the ones whose name
    ends in one of `policy.lora.target_modules`, or all where none is given.

    Raises:
        ConfigError: no layer's name ends in a target.
    """
    named = {target: {name for name in linears if f".{name}".endswith(f".{target}")} for target in targets}
    for target, found in named.items():
        if not found:
            raise ConfigError(
                f"policy.lora.target_modules: {target!r} is no linear layer of the model's decoder layers; they have "
                f"{', '.join(sorted(linears))}"
            )
    return sorted(set().union(*named.values()) if targets else linears)


def check_resources(config: Config) -> None:
    """The packages, the model, the reward file, the recording, the run folder and the disk are there."""
    policy, lora = config.policy, config.policy.lora
    if not cpp_compiler():
        raise ConfigError(
            "replay's sum tree is compiled at its first use and needs a C++ compiler: apt-get install g++"
        )
    check_packages("rethinker train", "transformers", "deepspeed", "pyarrow", "pandas", "matplotlib")
    if config.rollout.backend == "vllm":
        check_packages("rollout.backend=vllm", "vllm")
    if lora.rank:
        check_packages(f"policy.lora.rank={lora.rank}", "peft")
    for tracker in config.run.trackers:
        check_packages(f"run.trackers={tracker}", tracker)
    model_bytes = check_model(policy.model)
    if lora.rank and model_bytes:
        lora_targets(decoder_matrices(Path(policy.model).expanduser()), lora.target_modules)
    for entry in reward_entries(config.reward):
        if entry.function not in NEEDS:
            user_file(f"{entry.place}.function", entry.function, NEEDS)
        if package := NEEDS.get(entry.function):
            check_packages(entry.named, package)
    if ":" in config.algorithm.loss:
        user_file("algorithm.loss", config.algorithm.loss, [])
    recording, weight_folder = config.rollout.recording, config.rollout.weight_folder
    if recording and not any(Path(recording).glob("episode_*.parquet")):
        raise ConfigError(
            f"rollout.recording={recording} holds no episode_*.parquet; give a runs/<name>/completions folder"
        )
    if weight_folder and not os.path.isdir(weight_folder):
        raise ConfigError(f"rollout.weight_folder={weight_folder} is not a folder")
    # The kept checkpoints and the one being written: bf16 models with 12 bytes of optimizer per parameter (adapters
    # have a few hundredths of that), a reference policy that moves, and two best models.
    checkpoint_bytes = model_bytes if lora.rank else (8 if config.algorithm.reference_every else 7) * model_bytes
    _check_run_folder(config, max((config.checkpoint.keep + 1) * checkpoint_bytes + 2 * model_bytes, MIN_FREE_BYTES))


def check_model(model: str, setting: str = "policy.model=") -> int:
    """Fail on a folder that cannot be a model. Returns the size of its weights in bytes (0 when not known yet)."""
    folder = Path(os.path.expanduser(model))
    # A name on the model hub is `name` or `owner/name`.
    looks_local = folder.exists() or folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if model == "tiny" or not looks_local:
        return 0
    if not folder.is_dir():
        raise ConfigError(f"{setting}{model} is not a folder; give `tiny`, a model folder, or a Hugging Face name")
    return check_model_folder(folder, f"{setting}{model}")


def _check_run_folder(config: Config, needed: int) -> None:
    """The run's folder can be made, is new, and its disk has room for `needed` bytes."""
    folder = Path(config.run.dir).expanduser() / (config.run.name or "")
    existing = check_folder(folder, f"run.dir={config.run.dir}")
    check_new(config)
    free = shutil.disk_usage(existing).free
    written = sum(path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file())
    if free + written < needed:  # a continued run's checkpoints make room for its next ones
        raise ConfigError(
            f"run.dir={config.run.dir} has {free / 2**30:.2f} GB of disk free and the run needs about "
            f"{needed / 2**30:.2f} GB; free some space, choose a run.dir on a larger disk, or lower checkpoint.keep "
            f"({config.checkpoint.keep})"
        )


def check_folder(folder: Path, setting: str) -> Path:
    """The nearest folder that exists, at or above one that is to be made; ConfigError if it cannot be written to."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        raise ConfigError(f"{setting}: {existing} is no folder that can be written to; choose another")
    return existing


def check_new(config: Config) -> None:
    """A run never writes into another run's folder, unless it continues it, nor through a link to elsewhere."""
    folder = Path(config.run.dir).expanduser() / config.run.name
    if folder.is_symlink():
        raise ConfigError(f"run.name={config.run.name}: {folder} is a link to elsewhere; choose another run.name")
    if config.resume is not None and (folder / "config.yaml").is_file():
        return
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(
            f"run.name={config.run.name}: {folder} already holds a run; choose another run.name, or continue it with "
            "--resume auto"
        )
    if config.resume not in (None, "auto"):
        raise ConfigError(f"resume={config.resume}: there is no run {folder}; set run.dir and run.name to the run's")
