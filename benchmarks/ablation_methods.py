"""What the ablation compares: tasks, methods as settings over their recipes, and the tables that they stand in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rethinker.evaluation.settings import flat_settings
from rethinker.settings import presets, read_yaml_file

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """What is learned: recipes of both stages, and the split that judges."""

    recipes: tuple[str, str]
    test: str
    """data.validation of every run."""
    benchmark: str
    """The same split as `rethinker eval` names it."""
    tokens: int
    """Sampled tokens of a method, both stages together."""
    few: int = 0
    """Above 0: train on the first so many questions of a category for each 1 of its weight in the recipe, as one set.
    The warm-up has seen the others, too."""


TASKS = {
    "sums": Task(("sums_cpu", "sums_cpu_stage2"), "sums:test", "sums", 750_000),
    # Its test questions are the only ones that easy-VQA holds out.
    "easy_vqa": Task(("easy_vqa_cpu", "easy_vqa_cpu_stage2"), "easy_vqa", "easy_vqa", 250_000),
    "few_sums": Task(("sums_cpu", "sums_cpu_stage2"), "sums:test", "sums", 750_000, few=26),
}


@dataclass(frozen=True, eq=False)
class Method:
    """Settings over the recipes: of both stages, and of the second alone."""

    both: Settings
    second: Settings = field(default_factory=lambda: {"rethink.fraction": 0.0})


SSR, GRPO = {"algorithm.name": "ssr"}, {"algorithm.name": "grpo"}
METHODS = {
    "full": Method(SSR, {}),  # the second stage forces as many responses as its recipe says
    "SSR": Method(SSR),
    "filter": Method({"algorithm.name": "filter"}),
    "GRPO": Method(GRPO),
}
"""In the order of the paper's table: SSR with forced rethinking, without it, filter only, plain GRPO."""


def _ssr_and_grpo(changes: Settings) -> dict[str, Method]:
    """What replay does under other settings."""
    return {"SSR": Method(SSR | changes), "GRPO": Method(GRPO | changes)}


def _balanced(changes: Settings) -> dict[str, Method]:
    """Replay that keeps a group's mean advantage, 0. By |A| alone half of the draws are right answers, whether few or
    most are: their mean advantage is above 0 where few are right, and below 0 where most are."""
    return {
        "SSR, importance weights": Method(SSR | {"replay.importance_exponent": 1.0} | changes),
        "SSR, whole groups": Method(SSR | {"replay.unit": "group"} | changes),
    }


def _preset(name: str, *keys: str) -> dict[str, Any]:
    """What a shipped preset sets, or those of its settings alone."""
    found = flat_settings(read_yaml_file(presets()[name], name))
    return {key: found[key] for key in keys or found}


def _losses() -> dict[str, Method]:
    """GRPO's sampling with other losses, advantages and terms."""
    reinforce = _preset("reinforce_pp")
    changes = {
        "clip-higher of DAPO": _preset("dapo", "algorithm.clip_high"),
        **{shown: _preset(name) for name, shown in PRESETS.items()},
        "REINFORCE++": reinforce,
        "REINFORCE++-baseline": reinforce | {"algorithm.advantage_baseline": "group"},
        "entropy bonus 0.001": {"algorithm.entropy_coef": 0.001},
        "top entropy 0.2": {"algorithm.top_entropy": 0.2},
        "KL 0.01, reference moves after 4 episodes": {"algorithm.kl_coef": 0.01, "algorithm.reference_every": 4},
    }
    return {"GRPO": Method(GRPO), **{name: Method(GRPO | change) for name, change in changes.items()}}


def _two_rewards() -> dict[str, Method]:
    """The answer and its form: one advantage by their sum, or by each."""
    both = {"reward.functions": [{"function": "boxed"}, {"function": "format", "weight": 0.2}]}
    return {
        "GRPO": Method(GRPO),
        "GRPO, format reward 0.2": Method(GRPO | both),
        "GDPO, format reward 0.2": Method(GRPO | both | {"algorithm.advantages_per_reward": True}),
    }


PRESETS = {"dr_grpo": "Dr. GRPO", "gspo": "GSPO", "cispo": "CISPO", "sapo": "SAPO", "gmpo": "GMPO", "rloo": "RLOO"}
FILTER = {"algorithm.name": "filter"}
KEPT = {"replay.clear_every_episode": False, "replay.max_age": 4}
SAMPLING = {
    "GRPO": GRPO,
    "filter": FILTER,
    "SSR": SSR,
    "filter, 3 rounds of refill": FILTER | {"algorithm.refill_rounds": 3},
    "DAPO: clip-higher, refill, soft overlong punishment": _preset("dapo"),
    # Of 8 responses a single right or wrong one has an advantage of 2.47, one of two 1.62.
    "filter, advantages below 2": FILTER | {"algorithm.max_advantage": 2.0},
    "SSR, kept for 4 episodes": SSR | KEPT,
    "SSR, kept for 4 episodes, decay of 8 steps": SSR | KEPT | {"replay.age_decay": 8.0},
    "SSR, by correctness": SSR | {"replay.priority": "correctness"},
    "SSR, whole groups": SSR | {"replay.unit": "group"},
    "SSR, importance weights from 0.4 to 1": SSR
    | {"replay.importance_exponent": 0.4, "replay.importance_exponent_end": 1.0},
}


GROUPS_OF_2 = {"rollout.group_size": 2, "train.episode_queries": 512, "train.batch_pairs": 64}
PARTS: dict[str, dict[str, Method]] = {
    "methods": METHODS,
    # SSR itself is alpha 1, without weights, and begins every episode with an empty buffer.
    "replay": {
        **{f"SSR, alpha {alpha}": Method(SSR | {"replay.alpha": float(alpha)}) for alpha in (0, 2)},
        **_balanced({}),
        "SSR, kept for another episode": Method(SSR | {"replay.clear_every_episode": False, "replay.max_age": 1}),
        **_ssr_and_grpo({}),
    },
    "forced": {
        **{f"forced {share}": Method(SSR, {"rethink.fraction": share}) for share in (0.0, 0.1, 0.25, 0.5)},
        "forced 0.25, from the start": Method(SSR | {"rethink.fraction": 0.25}, {}),
        "forced 0.5 of the wrong, first answers masked": Method(
            SSR, {"rethink.fraction": 0.5, "rethink.first_answers": "wrong", "rethink.mask_first_answer": True}
        ),
    },
    # Steps of an episode of sums: 4, 16 (as in the paper) and 32, where the recipe has 8; of easy-VQA 1, 4 and 8 for 2.
    "episode_64": _ssr_and_grpo({"train.episode_queries": 64}),
    "episode_256": _ssr_and_grpo({"train.episode_queries": 256}),
    "episode_512": _balanced({"train.episode_queries": 512}) | _ssr_and_grpo({"train.episode_queries": 512}),
    # Few queries carry an advantage, and a batch holds few of them: what replay is for.
    "groups_of_2": _ssr_and_grpo(GROUPS_OF_2),
    "groups_of_2_low_rate": _ssr_and_grpo(GROUPS_OF_2 | {"train.learning_rate": 1e-4}),
    "losses": _losses(),
    "two_rewards": _two_rewards(),
    "sampling": {name: Method(settings) for name, settings in SAMPLING.items()},
    "correctness": {name: Method(SAMPLING[name]) for name in ("GRPO", "SSR", "SSR, by correctness")},
    "draws": {
        "GRPO": Method(GRPO),
        **{f"GRPO, drawn by {what}": Method(GRPO | {"data.draw": what}) for what in ("variance", "difficulty")},
    },
}
"""A table each. Where GRPO is among a table's methods, they are compared with one another, else with METHODS."""

RULES = ("losses", "two_rewards", "sampling", "draws")
"""The parts whose differences to GRPO are drawn, too."""
RETHINKING = {"SSR": ("normal", "forced", "oracle"), "full": ("normal",)}
"""Figure 7: the modes in which `rethinker eval` asks the last checkpoints of these methods."""
