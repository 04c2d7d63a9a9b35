"""What must hold before anything is loaded or written: the geometry of a step, and what the run needs of the machine.

Every check raises ConfigError with the setting's dotted name, its value, and what would work. torch is imported only
for policy.fused_layers, which needs a GPU.
"""

from __future__ import annotations

import difflib
import functools
import math
import os
import shutil
import unicodedata
from collections.abc import Callable, Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rethinker.config import Config, ConfigError
from rethinker.doctor import cpp_compiler, how_to_install
from rethinker.families.model_folder import check_model_folder, decoder_matrices
from rethinker.runtime.profiling import parse_steps
from rethinker.runtime.user_code import user_file

MOST_IMAGE_PIXELS = 178_956_970  # above twice its own threshold Pillow opens no image
MIN_FREE_BYTES = 200 * 2**20  # the tiny model, its checkpoints, completions and logs

_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {  # NaN fails every comparison, so it is refused too
    f"from 1 to {MOST_IMAGE_PIXELS}, the most that Pillow opens": (
        lambda value: 1 <= value <= MOST_IMAGE_PIXELS,
        "data.max_image_pixels",
    ),
    "at least 1": (
        lambda value: value >= 1,
        "data.max_prompt_tokens data.min_pixels policy.warmup.batch_size rollout.group_size rollout.max_new_tokens "
        "rethink.max_kept train.max_generated_tokens rollout.tensor_parallel_size replay.capacity "
        "data.shuffle_buffer train.max_steps train.episode_queries "
        "train.batch_pairs train.micro_batch_tokens validation.every validation.size checkpoint.every checkpoint.keep "
        "checkpoint.keep_every",
    ),
    "from 1 to 1024": (lambda value: 1 <= value <= 1024, "reward.workers"),
    "from 0 to 4294967295": (lambda value: 0 <= value < 2**32, "seed policy.warmup.seed"),  # NumPy's seeds
    "at least 0": (
        lambda value: value >= 0,
        "data.max_images policy.lora.rank policy.warmup.look_steps policy.warmup.steps algorithm.kl_coef "
        "replay.alpha replay.max_age replay.importance_exponent rethink.supervised_weight train.weight_decay",
    ),
    "positive": (
        lambda value: 0 < value < math.inf,
        "policy.lora.alpha policy.warmup.learning_rate rollout.temperature rollout.kv_cache_gb rollout.timeout_s "
        "reward.timeout_s "
        "reward.memory_gb algorithm.clip_high algorithm.rollout_correction rethink.temperature train.epochs "
        "train.learning_rate train.max_grad_norm run.stall_s rollout.max_mismatch_kl",
    ),
    "above 0 and below 1": (
        lambda value: 0 < value < 1,
        "rollout.gpu_memory_utilization algorithm.clip_low data.validation_share",
    ),
    "above 0 and at most 1": (lambda value: 0 < value <= 1, "policy.warmup.data_fraction"),
    "from 0 to 1": (
        lambda value: 0 <= value <= 1,
        "data.max_bad_rows rollout.max_staleness train.warmup_ratio train.min_lr_ratio rethink.fraction",
    ),
    "above 1": (lambda value: value > 1, "algorithm.dual_clip"),
    "two numbers of at least 0 and below 1": (lambda betas: all(0 <= beta < 1 for beta in betas), "train.betas"),
    "weights of at least 0, one of them positive": (
        lambda weights: not weights or (all(w >= 0 for w in weights.values()) and sum(weights.values()) > 0),
        "data.category_weights",
    ),
    "a plain folder name of at most 200 bytes, without / and not starting with a dot": (
        lambda name: is_plain_name(name),
        "run.name",
    ),
    "the name of a folder": (lambda name: bool(name) and _is_path(name), "run.dir"),
    "a path or name that can exist: printable, no part longer than 255 bytes": (
        lambda name: _is_path(name),
        "data.train data.validation data.image_root policy.model rollout.recording rollout.weight_folder "
        "reward.function",
    ),
}


def is_plain_name(name: str) -> bool:
    """Whether a folder of this name stays where it is made, on every file system and in every terminal."""
    return (
        bool(name)
        and _is_text(name)
        and len(name.encode()) <= 200
        and name == Path(name).name
        and name[0] != "."
        and "\\" not in name
    )


def _is_text(text: str) -> bool:
    """Whether a text can be shown and written: no line breaks, no escape sequences, no half characters."""
    return not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text)


def _is_path(name: str) -> bool:
    if not _is_text(name) or len(name.encode()) > 4000 or any(len(p.encode()) > 255 for p in name.split("/")):
        return False
    return not name.startswith("~") or os.path.expanduser(name) != name  # ~nobody is no folder


def check_geometry(config: Config) -> None:
    """Numbers in range, and batches that groups and episodes fill exactly."""
    _check_ranges(config)
    group, batch, episode = config.rollout.group_size, config.train.batch_pairs, config.train.episode_queries
    if batch % group:
        raise ConfigError(
            f"rollout.group_size={group} needs train.batch_pairs ({batch}) divisible by {group}; "
            f"nearest: {_nearest(batch, group)}"
        )
    if episode * group % batch:
        raise ConfigError(
            f"train.batch_pairs={batch} needs train.episode_queries x rollout.group_size "
            f"({episode} x {group} = {episode * group}) divisible by {batch}; "
            f"nearest train.episode_queries: {_nearest(episode, batch // group)}"
        )
    if config.data.min_pixels > config.data.max_pixels:
        raise ConfigError(
            f"data.min_pixels={config.data.min_pixels} must not exceed data.max_pixels ({config.data.max_pixels})"
        )
    if "{question}" not in config.data.prompt:
        raise ConfigError(f"data.prompt={config.data.prompt!r} must contain {{question}}")
    if config.rollout.backend == "recorded" and not config.rollout.recording:
        raise ConfigError(
            "rollout.backend=recorded needs rollout.recording: the folder runs/<name>/completions to read"
        )
    if config.rollout.backend != "recorded" and config.rollout.recording:
        raise ConfigError(f"rollout.recording={config.rollout.recording} needs rollout.backend=recorded")
    if config.policy.fused_layers and config.policy.compile:
        raise ConfigError(
            "policy.fused_layers=true and policy.compile=true fuse the same operations; set one of them to false"
        )
    _check_streaming(config)
    _check_servers(config)
    _check_rethinking(config)
    lora = config.policy.lora
    if lora.target_modules and not lora.rank:
        raise ConfigError(f"policy.lora.target_modules={lora.target_modules} needs policy.lora.rank, as 16")
    parse_steps(config.profile.steps)


def _check_streaming(config: Config) -> None:
    if config.data.streaming and config.train.max_steps is None:
        raise ConfigError(
            "data.streaming=true does not know how many questions train.epochs is about; set train.max_steps"
        )
    if config.data.streaming and config.policy.model == "tiny":
        raise ConfigError(
            "policy.model=tiny is warmed up on all questions, which data.streaming=true does not hold; give a model "
            "folder, or set data.streaming=false"
        )


def _check_servers(config: Config) -> None:
    servers, backend = config.rollout.servers, config.rollout.backend
    if backend == "server" and not servers:
        raise ConfigError(
            "rollout.backend=server needs rollout.servers: the addresses that `rethinker serve` prints, as "
            "[http://127.0.0.1:8100]"
        )
    if config.rollout.max_staleness:
        if backend != "server":
            raise ConfigError(
                f"rollout.max_staleness=1 needs rollout.backend=server, whose rollouts run beside the training; with "
                f"{backend} set it to 0"
            )
        if config.algorithm.rollout_correction is None:
            raise ConfigError(
                "rollout.max_staleness=1 needs algorithm.rollout_correction, as 2.0: without it the older policy's "
                "responses would count as the newer one's"
            )
        rethink = config.rethink
        default = 0.9 if rethink.preset == "released_code" else config.rollout.temperature
        second = default if rethink.temperature is None else rethink.temperature
        if rethink.fraction and (second != config.rollout.temperature or not rethink.mask_trigger_tokens):
            raise ConfigError(
                "rollout.max_staleness=1 has no log-probs of the older policy for responses that were rethought at "
                f"another temperature or whose triggers are trained: set rethink.temperature (now {second}) to "
                f"rollout.temperature ({config.rollout.temperature}) and rethink.mask_trigger_tokens=true, or "
                "rollout.max_staleness=0"
            )
    if backend != "server" and servers:
        raise ConfigError(f"rollout.servers={servers} needs rollout.backend=server")
    if backend != "server" and config.rollout.weight_folder:
        raise ConfigError(f"rollout.weight_folder={config.rollout.weight_folder} needs rollout.backend=server")
    for server in servers:
        if not _is_address(server):
            raise ConfigError(f"rollout.servers: {server!r} must be an address as http://127.0.0.1:8100, with no path")
    if len({server.rstrip("/") for server in servers}) < len(servers):
        raise ConfigError(f"rollout.servers={servers} names a server twice")


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
        port = url.port  # refuses what is no number
    except ValueError:
        return False
    plain = url.path in ("", "/") and not (url.query or url.fragment or url.username)
    return _is_text(text) and url.scheme in ("http", "https") and bool(url.hostname) and port != 0 and plain


def _check_rethinking(config: Config) -> None:
    rethink = config.rethink
    if not rethink.triggers or not all(rethink.triggers.values()):
        raise ConfigError(f"rethink.triggers={rethink.triggers} needs at least one name with a text that is not empty")
    if rethink.fraction > 0 and config.rollout.backend == "recorded":
        raise ConfigError(
            f"rethink.fraction={rethink.fraction} needs an engine that can go on from a text; with "
            "rollout.backend=recorded set it to 0 (recorded responses keep what rethinking made of them)"
        )


def lora_targets(linears: Collection[str], targets: list[str]) -> list[str]:
    """The linear layers that get adapters.

    Args:
        linears: names within a decoder layer, as self_attn.q_proj.
        targets: policy.lora.target_modules.

    Returns:
        Those whose name, or the end of it, is among the targets, sorted; without targets all.

    Raises:
        ConfigError: a target is none of them.
    """

    def ends(name: str, target: str) -> bool:
        return f".{name}".endswith(f".{target}")

    for target in targets:
        if not any(ends(name, target) for name in linears):
            short = {name.rpartition(".")[2] for name in linears}
            close = difflib.get_close_matches(target.rpartition(".")[2], short, n=2) or sorted(short)
            raise ConfigError(
                f"policy.lora.target_modules: {target!r} is no linear layer of the model's decoder layers; "
                f"nearest: {', '.join(close)}"
            )
    return sorted(name for name in linears if not targets or any(ends(name, target) for target in targets))


def _check_ranges(config: Config) -> None:
    for needed, (holds, keys) in _RANGES.items():
        for key in keys.split():
            value = functools.reduce(getattr, key.split("."), config)
            if value is not None and not holds(value):
                raise ConfigError(f"{key}={value} must be {needed}")


def _nearest(value: int, multiple: int) -> str:
    below = value - value % multiple
    return f"{below} or {below + multiple}" if below else str(multiple)


def check_resources(config: Config) -> None:
    """The packages, the model, the reward file, the recording, the run folder and the disk are there."""
    _check_packages(config)
    model_bytes = check_model(config.policy.model)
    if config.policy.lora.rank and model_bytes:
        lora_targets(decoder_matrices(Path(config.policy.model).expanduser()), config.policy.lora.target_modules)
    if config.reward.function != "boxed":
        user_file("reward.function", config.reward.function, ["boxed"])
    if ":" in config.algorithm.loss:
        user_file("algorithm.loss", config.algorithm.loss, [])
    recording = config.rollout.recording
    if recording and not any(Path(recording).glob("episode_*.parquet")):
        raise ConfigError(
            f"rollout.recording={recording} holds no episode_*.parquet; give a runs/<name>/completions folder"
        )
    weight_folder = config.rollout.weight_folder
    if weight_folder and not os.path.isdir(weight_folder):
        raise ConfigError(f"rollout.weight_folder={weight_folder} is not a folder")
    _check_run_folder(config, needed=max(_checkpoint_bytes(config, model_bytes), MIN_FREE_BYTES))


def _checkpoint_bytes(config: Config, model_bytes: int) -> float:
    """Disk for the kept checkpoints and the one being written: bf16 models with 12 bytes of optimizer per parameter
    (adapters have a few hundredths of that), and two best models."""
    whole = model_bytes + (0 if config.policy.lora.rank else 12 * model_bytes / 2)
    return (config.checkpoint.keep + 1) * whole + 2 * model_bytes


def _check_packages(config: Config) -> None:
    needs = [("policy.model", config.policy.model, "transformers"), ("policy.model", config.policy.model, "deepspeed")]
    if config.rollout.backend == "vllm":
        needs.append(("rollout.backend", "vllm", "vllm"))
    if config.policy.compile and not cpp_compiler():
        raise ConfigError("policy.compile=true needs a C++ compiler: apt-get install g++, or set it to false")
    if config.policy.lora.rank:
        needs.append(("policy.lora.rank", str(config.policy.lora.rank), "peft"))
    if config.policy.fused_layers:
        needs.append(("policy.fused_layers", "true", "liger_kernel"))
    needs += [("run.trackers", tracker, tracker) for tracker in config.run.trackers]
    if config.run.save_completions:
        needs.append(("run.save_completions", "true", "pyarrow"))
    if "easy_vqa" in (config.data.train, config.data.validation):
        needs.append(("data.train" if config.data.train == "easy_vqa" else "data.validation", "easy_vqa", "easy_vqa"))
    for key, value, package in needs:
        if find_spec(package) is None:
            raise ConfigError(f"{key}={value} needs the package {package}, which is missing: {how_to_install(package)}")
    if config.policy.fused_layers:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                "policy.fused_layers=true needs a CUDA device: Liger's kernels are Triton's; set it to false"
            )


def check_model(model: str) -> int:
    """Refuse a folder that cannot be a model. Returns the size of its weights in bytes (0 when not known yet)."""
    folder = Path(os.path.expanduser(model))
    # A name on the model hub is `name` or `owner/name`.
    looks_local = folder.exists() or folder.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if model == "tiny" or not looks_local:
        return 0
    if not folder.is_dir():
        raise ConfigError(f"policy.model={model} is not a folder; give `tiny`, a model folder, or a Hugging Face name")
    return check_model_folder(folder, f"policy.model={model}")


def _check_run_folder(config: Config, needed: int) -> None:
    """The run's folder can be made, is new, and its disk has room for `needed` bytes."""
    folder = Path(config.run.dir).expanduser() / (config.run.name or "")
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"run.dir={config.run.dir}: {existing} is a file; choose another run.dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"run.dir={config.run.dir}: {existing} cannot be written to; choose another run.dir")
    check_new(config)
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"run.dir={config.run.dir} has {free / 2**30:.2f} GB of disk free and the run needs about "
            f"{needed / 2**30:.2f} GB; free some space, choose a run.dir on a larger disk, or lower checkpoint.keep "
            f"({config.checkpoint.keep})"
        )


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
