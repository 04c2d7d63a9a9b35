"""All that a run is besides its weights, taken and given back: what `--resume` continues from.

The run's own state (trainer/run.*) is the same on every rank and written by rank 0; each rank adds its responses and
random streams (trainer/rank_*), its part of the optimizer, and of a reference policy that moves.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rethinker.algorithm.corrections import METRICS
from rethinker.checkpoint.held_samples import Responses, held_responses
from rethinker.config import Config, ConfigError
from rethinker.runtime.distributed import Ranks
from rethinker.samples import Accuracy, Completion, Group, Query, RemoteCompletion
from rethinker.settings import flat
from rethinker.version import versions

if TYPE_CHECKING:
    from rethinker.algorithm.replay import ReplayBuffer
    from rethinker.checkpoint.run_directory import RunDirectory
    from rethinker.episode import Episodes
    from rethinker.policy.engine import PolicyEngine

log = logging.getLogger(__name__)

_TENSOR = "__tensor__"  # in JSON: the name of a tensor in the file beside it
# Settings that may change when a run is resumed: they say where, how fast and how long, not what is learned. Where the
# data lies may change, too; its content is compared.
MAY_CHANGE = """
    resume run. checkpoint. profile. data.train data.validation data.image_root policy.attention policy.compile
    policy.gradient_checkpointing rollout.gpu_memory_utilization rollout.kv_cache_gb
    rollout.tensor_parallel_size rollout.sleep rollout.servers rollout.weight_folder rollout.check_sync
    rollout.timeout_s rollout.max_mismatch_kl reward.workers reward.timeout_s reward.memory_gb train.max_steps
    train.epochs data.max_bad_rows train.max_generated_tokens train.micro_batch_tokens train.deepspeed validation.every
""".split()
OF_A_SOURCE_MAY_CHANGE = {"image_root", "max_bad_rows"}  # of each entry of data.sources
OF_A_REWARD_MAY_CHANGE = {"timeout_s", "concurrency", "on_failure"}  # of each entry of reward.functions
OF_A_JUDGE_MAY_CHANGE = OF_A_REWARD_MAY_CHANGE | {"address", "api_key_env", "retries"}


@dataclass
class Progress:
    """Where the loop stands."""

    episode: int = 0
    """The running one, or with no `groups` left the next one, from 0."""
    groups: list[Group] = field(default_factory=list)
    """Of the running episode, rewarded and not trained on yet."""
    generated: int = 0
    """Tokens sampled so far, over all ranks."""
    sampled_queries: int = 0
    """Of the running episode, dropped ones included."""
    sampled_effective: int = 0
    """Those of them whose rewards differ."""
    refill_rounds: int = 0
    """Rounds in which the running episode was filled up."""
    mismatch: float | None = None
    """mismatch_kl of the running episode, once it is known."""
    weighed: dict[str, float | None] = field(default_factory=lambda: dict.fromkeys(METRICS))
    """`corrections.METRICS` of the running episode."""
    failed_checks: int = 0
    """Answer checks that could not be finished, up to this episode."""
    before: Accuracy | None = None
    """On the held-out questions, before the first step."""
    after: Accuracy | None = None
    """The latest one."""
    best: Accuracy | None = None
    """The highest one."""
    unvalidated: bool = False
    """Whether a failed reward function kept the last episode's policy from being validated."""


@dataclass
class RunState:
    """The parts of a run that have a past."""

    config: Config
    ranks: Ranks
    progress: Progress
    policy: PolicyEngine
    episodes: Episodes
    replay: ReplayBuffer
    run: RunDirectory

    def snapshot(self, optimizer: bool = True) -> Callable[[Path], None]:
        """Everything as it is now, with or without the optimizer and a reference that moves; what comes back writes it
        into trainer/, while training goes on."""
        replay, stream = self.replay.state_dict(), self.episodes.stream
        replayed = [sample for _, samples, _ in replay["entries"] for sample in samples]
        responses = held_responses(self.progress.groups, replayed)
        own = {"samples": responses, "random": random_state(), "position": self.episodes.state_dict()}
        write_run = None
        if self.ranks.is_main:
            run = {
                "settings": flat(self.config),
                "versions": versions(),
                "world_size": self.ranks.world_size,
                "data": stream.fingerprint(),
                "queries": stream.keep([held.query for held in (*self.progress.groups, *replayed)]),
                "progress": self.progress,
                "policy": self.policy.state_dict(),
                "replay": replay,
                "log": self.run.state_dict(),
            }
            write_run = frozen(run)
        shards = [self.policy.optimizer_snapshot()] if optimizer else []
        if optimizer and self.policy.moving:
            shards.append(self.policy.moving.snapshot())

        def write(folder: Path) -> None:
            for write_shard in shards:
                write_shard(folder)
            frozen(own)(folder / f"rank_{self.ranks.rank:05d}")
            if write_run:
                write_run(folder / "run")

        return write

    def load(self, checkpoint: Path, state: dict[str, Any]) -> None:
        """Continue from a checkpoint that was found whole, and its `saved_state`; the model and the logs were taken up
        before.

        Raises:
            ConfigError: it belongs to other data or another kind of run.
        """
        if state["data"] != self.episodes.stream.fingerprint():
            raise ConfigError(f"data.train={self.config.data.train}: its questions are not those of {checkpoint}")
        folder, ranks, world_size = checkpoint / "trainer", self.ranks, state["world_size"]
        if self.config.rollout.backend == "recorded" and world_size != ranks.world_size:
            raise ConfigError(f"rollout.backend=recorded: resume on as many ranks as before ({world_size})")
        taken = range(ranks.rank, world_size, ranks.world_size)  # the ranks whose responses fall to this one
        owns = [read_state(folder / f"rank_{rank:05d}") for rank in taken]
        queries = self.episodes.stream.kept(state.get("queries"))
        responses = Responses(queries, [own["samples"] for own in owns], ranks)
        self.policy.load_state_dict(state["policy"])
        self.policy.load_optimizer(folder, state["policy"]["adam_steps"])
        if self.policy.moving:
            self.policy.moving.load(folder)
        progress, replay = state["progress"], state["replay"]
        for name in ("before", "after", "best"):
            progress[name] = progress[name] and Accuracy(**progress[name])
        progress["groups"] = list(map(responses.group, progress["groups"]))
        vars(self.progress).update(progress)
        replay["entries"] = [(slot, list(map(responses.sample, unit)), age) for slot, unit, age in replay["entries"]]
        self.replay.load_state_dict(replay)
        # A rank that the run did not have before goes on from rank 0's place in the data, with streams of its own.
        position = owns[0]["position"] if owns else read_state(folder / "rank_00000")["position"] | {"failures": {}}
        position["failures"] = dict(sum((Counter(own["position"]["failures"]) for own in owns), Counter()))
        self.episodes.load_state_dict(position)
        if owns:
            set_random_state(owns[0]["random"])
        _warn_of_other_versions(state["versions"])


def saved_state(checkpoint: Path | None, config: Config) -> dict[str, Any]:
    """The run's own state in a checkpoint; empty without one.

    Raises:
        ConfigError: under these settings it would not be the same run; every differing one is named, with both values.
    """
    if checkpoint is None:
        return {}
    state, own = read_state(checkpoint / "trainer" / "run"), flat(config)
    saved = state["settings"]
    if isinstance(cap := saved.get("algorithm.rollout_correction"), float):  # of an older release: truncation of tokens
        saved |= {"algorithm.rollout_correction": "token_truncate", "algorithm.correction_high": cap}
    saved = flat(Config()) | saved  # a setting that an older release did not have was off, as it is by default
    differing = [
        f"{key}={own[key]} (was {saved[key]})" for key in own if _compared(key, own[key]) != _compared(key, saved[key])
    ]
    if differing:
        raise ConfigError(
            f"resume: run {config.run.name} cannot go on with {', '.join(differing)}; set them back, or start a new "
            "run with another run.name"
        )
    return state


def _compared(key: str, value: Any) -> Any:
    """What of a setting's value must be the same in a resumed run."""
    if key.startswith(tuple(MAY_CHANGE)):
        return None
    if key == "data.sources":
        return {name: {k: entry[k] for k in entry.keys() - OF_A_SOURCE_MAY_CHANGE} for name, entry in value.items()}
    if key == "reward.functions":
        may_change = {"judge": OF_A_JUDGE_MAY_CHANGE}
        return [{k: e[k] for k in e.keys() - may_change.get(e["function"], OF_A_REWARD_MAY_CHANGE)} for e in value]
    return value


def _warn_of_other_versions(saved: dict[str, str]) -> None:
    own = versions()
    names = sorted(name for name in own.keys() | saved.keys() if own.get(name) != saved.get(name))
    if names:
        changes = ", ".join(f"{name} {own.get(name)} (was {saved.get(name)})" for name in names)
        log.warning("resumed with other versions, so not bit for bit: %s", changes)


def random_state() -> dict[str, Any]:
    """The random generators of this process, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Continue every stream where `random_state` was taken; tuples may have become lists."""
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def frozen(tree: Any) -> Callable[[Path], None]:
    """Copy a tree as it is now; what this returns writes `path`.json and `path`.safetensors, for a path without suffix.

    Args:
        tree: dicts with text keys (but `__tensor__`), lists, tuples (read back as lists), texts, numbers (exact; NaN
            and infinities included), booleans, None, tensors, and dataclasses (read back as dicts). Of a query only
            the id is kept, and of a response its two lengths and whether it is supervised; see held_samples.py.
    """
    tensors: dict[str, torch.Tensor] = {}

    def plain(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = node.detach().to("cpu", copy=True).contiguous()  # safetensors takes no shared memory
            return {_TENSOR: name}
        if isinstance(node, Query):
            return node.id
        if isinstance(node, Completion | RemoteCompletion):
            return [node.tokens, node.trainable_tokens, node.supervised]
        return {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}

    text = json.dumps(tree, default=plain)

    def write(path: Path) -> None:
        path.with_name(f"{path.name}.json").write_text(text, encoding="utf-8")
        save_file(tensors, path.with_name(f"{path.name}.safetensors"))

    return write


def read_state(path: Path) -> Any:
    """What `frozen` wrote; tensors are on the host.

    Raises:
        OSError, ValueError: a file is missing or not one of ours.
    """
    with safe_open(path.with_name(f"{path.name}.safetensors"), framework="pt") as file:
        return json.loads(
            path.with_name(f"{path.name}.json").read_text(encoding="utf-8"),
            object_hook=lambda node: file.get_tensor(node[_TENSOR]) if _TENSOR in node else node,
        )
