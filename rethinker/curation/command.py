"""`rethinker curate`: from a recipe to the questions that its model answers sometimes, as a data set of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rethinker.checks import check_model
from rethinker.command_line import Parser
from rethinker.config import ConfigError
from rethinker.curation.subset import choose
from rethinker.evaluation.settings import check_engine
from rethinker.settings import resolve_config

_DESCRIPTION = """Ask the recipe's model every question of its training data several times, and write the questions
that it answers sometimes (0 < pass rate < 1), an equal share of each category: the others teach it nothing. A
measurement that was stopped goes on when the command is given again; with another --size it only chooses again. The
output holds pass_rates.parquet, subset.parquet, provenance.json, and recipe.yaml, which trains on it.
On several GPUs: torchrun --nproc-per-node N -m rethinker curate RECIPE ..."""


def main(arguments: Sequence[str]) -> int:
    """Run the command, on all ranks of torchrun; returns its exit code.

    Raises:
        ConfigError: any mistake in arguments, settings or data; another measurement in the folder; no question that
            qualifies; whatever the engine reports.
    """
    usage = "%(prog)s RECIPE --output FOLDER [options] [--section.name value ...]"
    parser = Parser(prog="rethinker curate", description=_DESCRIPTION, usage=usage)
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a shipped recipe or a .yaml file: model, data, prompt, reward")
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the results go")
    add("--samples", type=int, metavar="G", help="responses per question [rollout.group_size]")
    add("--size", type=int, metavar="N", help="questions to choose, as the paper's 16000 for 7B [all that qualify]")
    add("--limit", type=int, metavar="N", help="ask a random sample of N questions, the same every time")
    options, overrides = parser.parse_recipe(arguments)
    recipe = resolve_config(options.recipe, overrides)
    alone = ("--rollout.sleep=false", "--rollout.gpu_memory_utilization=0.9")  # no training runs beside the engine
    config = resolve_config(options.recipe, [*alone, *overrides])
    check_engine(config, "rethinker curate")
    check_model(config.policy.model)
    samples = config.rollout.group_size if options.samples is None else options.samples
    if samples < 2:
        parser.error(f"--samples {samples} must be at least 2: a single answer is never right sometimes")
    for name in ("size", "limit"):
        if (number := getattr(options, name)) is not None and number < 1:
            parser.error(f"--{name} {number} must be at least 1")

    from rethinker.curation import measure, output
    from rethinker.data.datasets import load_queries
    from rethinker.data.prompts import FIRST, PromptEncoder
    from rethinker.embedded.files import as_files, model_folder
    from rethinker.environments.tools import schemas
    from rethinker.evaluation.answering import fit_model, open_model, ranks_of_torchrun, sample
    from rethinker.policy.loading import load_processor

    # All questions: with data.validation=split the subset is split again, and by hash alike.
    everything = as_files(dataclasses.replace(config.data, validation=None), "train")
    queries = sample(load_queries(everything, "train"), options.limit)
    folder, size = options.output.expanduser(), options.size
    with ExitStack() as stack:
        ranks = stack.enter_context(ranks_of_torchrun(config.rollout.timeout_s))
        name = model_folder(config, ranks)
        fitted = fit_model(config, name)
        measured = ranks.broadcast(measure.identity(config, name, queries, samples) if ranks.is_main else None)
        ranks.broadcast(measure.begin(folder, measured) if ranks.is_main else None)  # no rank looks there before
        if ranks.any(bool(measure.missing_chunks(folder, len(queries)))):
            if ranks.any(not (folder / measure.MANIFEST).is_file()):
                raise ConfigError(f"--output {folder}: a rank does not see it; choose a folder that all ranks share")
            encoder = PromptEncoder(load_processor(name), fitted.data, schemas(fitted.environment))
            encoder.check(queries[:FIRST])
            model = stack.enter_context(open_model(fitted, name, ranks, encoder))
            measure.measure(queries, samples, folder, model, ranks, fitted)
        if not ranks.is_main:
            return 0
        rates = measure.read_rates(folder, queries)
        chosen = choose(rates, size)
        counts = output.count(rates, chosen)
        output.write_rates(folder, rates, chosen)
        print(output.histogram(rates, chosen))
        if not chosen:
            raise ConfigError(
                f"policy.model={config.policy.model} answers no question sometimes, so there is nothing to train on "
                f"(always wrong {counts['always_wrong']}, always right {counts['always_right']}, left out "
                f"{counts['left_out']}); raise --samples, or use other data"
            )
        output.write_subset(folder, [queries[i] for i in chosen], [rates[i] for i in chosen], config)
        output.write_recipe(folder, recipe, name)
        output.write_provenance(folder, {**measured, "size_asked": size, **counts})
        short = f" (only so many of the {size:,d} asked for qualify)" if size and len(chosen) < size else ""
        print(f"{len(chosen):,d} questions{short}: {counts['subset_by_category']}")
        print(f"train on them: rethinker train {folder / output.RECIPE}")
    return 0
