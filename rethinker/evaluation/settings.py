"""The settings of an evaluation: those that shape answers, and those that come with a checkpoint from its run.

torch is not imported here: mistakes are reported before anything slow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rethinker.config import Config, ConfigError
from rethinker.doctor import check_packages
from rethinker.environments import load as load_environment
from rethinker.settings import flat, read_yaml_file, resolve_config

Mode = Literal["normal", "forced", "oracle"]
"""Plain greedy answers; a second pass after every first answer; only after wrong ones (an upper bound)."""

# Questions of one rank per call of the engine: bounds memory, has one deadline, is lost with a killed one.
CHUNK = 256

# How a model is asked.
ASKED = ("data.prompt", "data.system", "data.chat_template_kwargs", "data.min_pixels", "data.max_pixels")
ASKED += ("policy.dtype", "rollout.backend", "rollout.max_new_tokens")
# How its answers are judged.
JUDGED = ("reward.rounding", "reward.percent", "reward.degrees")
# What answers it within a response: recorded where environment.use names something.
ANSWERED = ("use", "max_turns", "max_calls", "max_images", "max_text_tokens", "boxes", "describe", "timeout_s")
ANSWERED = (*(f"environment.{name}" for name in ANSWERED), "environment.memory_gb")
# What a checkpoint inherits from the run's config.yaml, and what a result records, since its answers depend on it.
INHERITED = (*ASKED, *ANSWERED, *JUDGED, "rollout.kv_cache_gb", "environment.workers")
RECORDED = (*ASKED, *ANSWERED, *JUDGED, "data.max_images", "reward.function")


def eval_config(checkpoint: str, overrides: Sequence[str]) -> Config:
    """The settings of an evaluation: settings.yaml beside this file, the run's own, the command line.

    Raises:
        ConfigError: a setting that is unknown or wrong; a package that is missing; a run's environment of the user's,
            which the command line must name again.
    """
    settings = run_settings(checkpoint)
    use = settings.get("environment.use") or []
    named = any(override.partition("=")[0] == "--environment.use" for override in overrides)
    if any(":" in entry for entry in use) and not named:  # as with a reward: whose folder this is, is not known
        raise ConfigError(
            f"checkpoint {checkpoint}: its run has environment.use=[{', '.join(use)}], and code that a run's folder "
            f"names is run only if you say so; give --environment.use '[{', '.join(use)}]', or '[]' to ask without it"
        )
    inherited = [f"--{key}={_spelled(key, value)}" for key, value in settings.items()]
    config = resolve_config(Path(__file__).with_suffix(".yaml"), [*inherited, *overrides])
    config.policy.model = checkpoint
    check_engine(config, "rethinker eval")
    return config


def _spelled(key: str, value: Any) -> str:
    """A setting's value as an argument; an entry of a mapping that is a text needs its quotes, as `" Wait,"` does."""
    return value if isinstance(value, str) and key in INHERITED else json.dumps(value, ensure_ascii=False)


def check_mode(mode: Mode, config: Config) -> None:
    """Report a second pass over responses that an environment answers.

    Raises:
        ConfigError: naming what to change.
    """
    if mode != "normal" and config.environment.use:
        raise ConfigError(
            f"--mode {mode} goes on behind a response's end, and environment.use={config.environment.use} makes "
            "responses of several turns; use --mode normal, or --environment.use '[]'"
        )


def check_engine(config: Config, command: str) -> None:
    """Report what keeps a command from asking a model anything: an engine without new answers, or missing packages.

    Raises:
        ConfigError: naming the setting or the package, and the fix.
    """
    if config.rollout.backend == "recorded":
        raise ConfigError("rollout.backend=recorded has no new answers; use vllm, server or hf")
    load_environment(config.environment)
    check_packages(command, "transformers", "pyarrow", "PIL", "pandas", "scipy")
    if config.rollout.backend == "vllm":
        check_packages("rollout.backend=vllm, other than hf,", "vllm")


def run_settings(checkpoint: str) -> dict[str, Any]:
    """How a run asked its model, from the config.yaml above the run's checkpoint; {} for any other model."""
    folder = Path(checkpoint).absolute().parent
    given = read_settings(folder.parent) if folder.name == "checkpoints" else {}
    names = (*INHERITED, *_verified(given.get("environment.use")))
    entries = tuple(f"{key}." for key in names)
    inherited = {key: value for key, value in given.items() if key in names or key.startswith(entries)}
    return {key: value for key, value in inherited.items() if value not in (None, "recorded", "server", {})}


def _verified(use: Sequence[str] | None) -> tuple[str, ...]:
    """What the environment `verify` says."""
    return ("rethink.triggers",) if "verify" in (use or ()) else ()


def read_settings(run: Path) -> dict[str, Any]:
    """A run's config.yaml with dotted keys, whatever version wrote it; {} where there is none."""
    path = run / "config.yaml"
    content = read_yaml_file(path, str(path)) if path.is_file() else {}
    return flat_settings(content) if isinstance(content, dict) else {}


def flat_settings(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; a setting that is itself a mapping keeps its entries, also dotted."""
    flat: dict[str, Any] = {}
    for key, value in node.items():
        nested = isinstance(value, dict) and value
        flat |= flat_settings(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def recorded(config: Config, *further: str) -> dict[str, Any]:
    """The values of RECORDED, and of further settings; of reward.functions the first, which judges."""
    several = {"reward.functions": config.reward.functions[:1]} if config.reward.functions else {}
    names = {*RECORDED, *further, *_verified(config.environment.use)}
    names -= set() if config.environment.use else {*ANSWERED}
    return {key: value for key, value in flat(config).items() if key in names} | several
