"""`rethinker curate`: from a recipe to the questions that its model answers sometimes, as a data set of their own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rethinker.command_line import Parser
from rethinker.config import Config, ConfigError
from rethinker.curation.subset import PRESETS, PassRate, choose, parse_size
from rethinker.doctor import how_to_install
from rethinker.samples import Query

_DESCRIPTION = """Ask the recipe's model every question of its training data several times, and write the questions
that it answers sometimes (0 < pass rate < 1), an equal share of each category: the others teach it nothing. A
measurement that was stopped goes on when the command is given again; with another --size it only chooses again. The
output holds pass_rates.parquet, pass_rates.svg, subset.parquet, provenance.json, and recipe.yaml, which trains on it.
On several GPUs: torchrun --nproc-per-node N -m rethinker curate RECIPE ..."""

# What a measurement depends on besides model, data, samples and seed.
_SHAPING = (
    *("data.prompt", "data.system", "data.max_prompt_tokens", "data.min_pixels", "data.max_pixels", "data.max_images"),
    *("policy.dtype", "rollout.backend", "rollout.max_new_tokens", "rollout.temperature", "reward.function"),
)


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code.

    Raises:
        ConfigError: any mistake in arguments, settings or data.
    """
    parser = _parser()
    options, overrides = parser.parse_recipe(arguments)
    size = None if options.size is None else parse_size(options.size)
    for name in ("samples", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} must be at least 1")
    config = _config(options.recipe, overrides)
    samples = options.samples or config.rollout.group_size
    if samples < 2:
        parser.error(f"--samples {samples} must be at least 2: a single answer is never right sometimes")
    folder = Path(options.output).expanduser()
    if folder.exists() and not folder.is_dir():
        parser.error(f"--output {folder} is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MANIFEST).is_file():
        parser.error(f"--output {folder} holds other files; choose another folder")
    from rethinker.data.datasets import load_queries
    from rethinker.embedded.files import as_files

    # All questions: with data.validation=split the subset is split again, and by hash alike.
    everything = dataclasses.replace(config.data, validation=None)
    queries = load_queries(as_files(everything, "train"), "train")
    if options.limit is not None and options.limit < len(queries):
        picked = sorted(random.Random(0).sample(range(len(queries)), options.limit))
        queries = [queries[i] for i in picked]

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is imported: NUMA binding is no news
    curate(config, queries, samples, size, folder)
    return 0


_MANIFEST = "measurement.json"


def _parser() -> Parser:
    parser = Parser(
        prog="rethinker curate",
        description=_DESCRIPTION,
        usage="%(prog)s RECIPE --output FOLDER [options] [--section.name value ...]",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a shipped recipe or a .yaml file: model, data, prompt, reward"
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--samples", type=int, metavar="G", help="responses per question [rollout.group_size]")
    sizes = ", ".join(f"{name} ({number:,d})" for name, number in PRESETS.items())
    parser.add_argument("--size", metavar="N", help=f"questions to choose: a number, {sizes} [all that qualify]")
    parser.add_argument(
        "--limit", type=int, metavar="N", help="ask a random sample of N questions, the same every time"
    )
    return parser


def _config(recipe: str, overrides: Sequence[str]) -> Config:
    """The recipe's settings for an engine that no training runs beside."""
    from rethinker.checks import check_model
    from rethinker.settings import resolve_config

    config = resolve_config(recipe, overrides)
    if config.rollout.backend == "recorded":
        raise ConfigError("rollout.backend=recorded has no new answers; use vllm or hf")
    needs = ["transformers", "pyarrow", "PIL", "matplotlib"] + ["vllm"] * (config.rollout.backend == "vllm")
    for package in needs:
        if find_spec(package) is None:
            raise ConfigError(f"rethinker curate needs the package {package}: {how_to_install(package)}")
    check_model(config.policy.model)
    rollout = dataclasses.replace(config.rollout, sleep=False)
    if not any(option.startswith("--rollout.gpu_memory_utilization") for option in overrides):
        rollout.gpu_memory_utilization = 0.9
    return dataclasses.replace(config, rollout=rollout)


def curate(config: Config, queries: list[Query], samples: int, size: int | None, folder: Path) -> list[PassRate]:
    """Measure what is not measured yet, choose, and write everything; on all ranks of torchrun.

    Args:
        config: the recipe's settings.
        queries: to ask, the same on every rank.
        samples: responses per question.
        size: of the subset; None takes all that qualify.
        folder: the output, which may hold a part of the same measurement.

    Returns:
        The pass rates in the questions' order; [] on ranks other than 0.

    Raises:
        ConfigError: the folder holds another measurement; no question qualifies; whatever the engine refuses.
    """
    from rethinker.curation import measure, output
    from rethinker.embedded.files import model_folder
    from rethinker.runtime import distributed
    from rethinker.runtime.distributed import Ranks
    from rethinker.version import versions

    with ExitStack() as stack:
        ranks = Ranks(0, 1, 0)
        if "RANK" in os.environ:
            ranks = distributed.start(config.rollout.timeout_s)
            stack.callback(distributed.stop)
        model = ranks.broadcast(model_folder(config) if ranks.is_main else None)
        measured = ranks.broadcast(_measured(config, model, queries, samples) if ranks.is_main else None)
        if ranks.is_main:
            _begin(folder, measured)
        if ranks.any(bool(measure.missing_chunks(folder, len(queries)))):
            _ask(config, model, queries, samples, folder, ranks, stack)
        if not ranks.is_main:
            return []
        rates = measure.read_rates(folder, queries)
        chosen = choose(rates, size)
        counts = output.count(rates, chosen)
        print("\n".join(output.histogram(rates, chosen)))
        title = f"{Path(model).name}: {counts['sometimes_right']:,d} of {counts['questions']:,d} sometimes right"
        output.draw_histogram(folder / "pass_rates.svg", rates, chosen, title)
        output.write_rates(folder, rates, chosen)
        if not chosen:
            raise ConfigError(
                f"policy.model={config.policy.model} answers no question sometimes, so there is nothing to train on "
                f"(always wrong {counts['always_wrong']}, always right {counts['always_right']}, left out "
                f"{counts['left_out']}); raise --samples, or use other data"
            )
        output.write_subset(folder, [queries[i] for i in chosen], [rates[i] for i in chosen], config)
        output.write_recipe(folder, config, model)
        output.write_provenance(folder, config, measured, counts, size, versions())
        short = f" (only so many of the {size:,d} asked for qualify)" if size and len(chosen) < size else ""
        print(f"{len(chosen):,d} questions{short}: {counts['subset_by_category']}")
        print(f"train on them: rethinker train {folder / output.RECIPE}")
        return rates


def _ask(
    config: Config, model: str, queries: list[Query], samples: int, folder: Path, ranks: Any, stack: ExitStack
) -> None:
    from rethinker.curation.measure import measure
    from rethinker.data.prompts import PromptEncoder
    from rethinker.evaluation.run import fit_model, positions_of
    from rethinker.policy.model import load_processor
    from rethinker.rewards.checker import AnswerChecker
    from rethinker.rollout.backends import make_engine

    checker = stack.enter_context(AnswerChecker(config.reward))
    config = fit_model(config, positions_of(model), [])
    encoder = PromptEncoder(load_processor(model), config.data)
    rollout = make_engine(config, model, rank=ranks.rank, world_size=ranks.world_size, local_rank=ranks.local_rank)
    stack.callback(rollout.close)
    measure(queries, samples, folder, rollout, encoder, checker, ranks, config)


def _measured(config: Config, model: str, queries: list[Query], samples: int) -> dict[str, Any]:
    """What the pass rates depend on; a measurement goes on only if all of it is the same."""
    from rethinker.data.query_stream import fingerprint
    from rethinker.settings import flat

    return {
        "model": model,
        "model_version": _model_version(model),
        "data": config.data.train,
        "data_sha256": fingerprint(queries),
        "samples": samples,
        "seed": config.seed,
        **{key: value for key, value in flat(config).items() if key in _SHAPING},
    }


def _model_version(model: str) -> str:
    """SHA-256 of a folder's weights and configuration; of a name on the hub, its commit."""
    folder = Path(os.path.expanduser(model))
    if not folder.is_dir():
        from transformers import AutoConfig

        return f"commit {getattr(AutoConfig.from_pretrained(model, trust_remote_code=False), '_commit_hash', None)}"
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json"]):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256 {digest.hexdigest()}"


def _begin(folder: Path, measured: dict[str, Any]) -> None:
    """Note what is measured here, or compare it with what was.

    Raises:
        ConfigError: naming each difference.
    """
    path = folder / _MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            partial = folder / f".{_MANIFEST}.partial"
            partial.write_text(json.dumps(measured, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            os.replace(partial, path)
        before = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--output {folder}: cannot be used ({error}); choose another folder") from error
    # The same content may lie elsewhere now.
    differing = [k for k in measured if before.get(k) != measured[k] and k not in ("model", "data")]
    if differing:
        changes = ", ".join(f"{key}={measured[key]} (was {before.get(key)})" for key in differing)
        raise ConfigError(
            f"--output {folder} holds a measurement with other settings: {changes}; choose another folder"
        )
