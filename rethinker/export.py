"""`rethinker export`: a run's model as a folder to share, with a model card that says what was trained and how it went.

The folder is what `vllm serve` and transformers load unchanged: weights in safetensors, configuration, processor. It
leaves out what only training needs (the optimizer, replay). Of a LoRA run the weights are merged, and the adapters are
in a folder beside them.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Template

from rethinker.command_line import Parser
from rethinker.config import ConfigError
from rethinker.report.learning import learning_curve
from rethinker.report.runs import RunRecord, read_run
from rethinker.report.summary import categories, changed_settings, markdown, markdown_text, summary


def export(run: str | Path, output: str | Path | None = None, checkpoint: str | None = None) -> Path:
    """Write the model of a run, with its card, to a new folder, by default exports/<run.name>: whole or not at all.

    `checkpoint` is best, last or step_*; by default best, or last where no validation was above the first.

    Raises:
        ConfigError: no such run or checkpoint, or a folder that is there already.
    """
    record = read_run(run)
    source = find_model(record.folder, checkpoint)
    target = Path(output) if output else Path("exports") / record.name
    if target.exists():
        raise ConfigError(f"--output {target} exists; name a new folder")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns("trainer", "COMPLETE", ".*"))
        shutil.copy2(record.folder / "config.yaml", partial / "rethinker.yaml")
        learning_curve([record.folder], partial / "learning.png")
        (partial / "README.md").write_text(model_card(record, source.resolve().name), encoding="utf-8")
        partial.rename(target)
    except OSError as error:
        raise ConfigError(f"--output {target} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def find_model(run: Path, checkpoint: str | None) -> Path:
    """The folder of a run's checkpoint.

    Raises:
        ConfigError: naming those that are there.
    """
    there = {path.parent.name: path.parent for path in sorted((run / "checkpoints").glob("[a-z]*/config.json"))}
    for name in (checkpoint,) if checkpoint else ("best", "last"):
        if name in there:
            return there[name]
    raise ConfigError(
        f"{run} has no checkpoint {checkpoint or 'best or last'}; it has {', '.join(there) or 'none yet'}"
    )


def model_card(run: RunRecord, checkpoint: str) -> str:
    """The card of a checkpoint, in the hub's Markdown, beside learning.png."""
    from huggingface_hub import ModelCardData

    def on_the_hub(setting: str) -> str | None:
        name = str(run.settings.get(setting, ""))
        named = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
        return name if named and not (setting == "data.train" and Path(name).suffix) else None

    header = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["rethinker", "reinforcement-learning", "grpo", "vision-language"],
        base_model=on_the_hub("policy.model"),
        datasets=on_the_hub("data.train"),
    )
    tables = {"Summary": summary([run]), "Held-out accuracy by category": categories([run])}
    tables["Settings that differ from their defaults"] = changed_settings([run])
    shown = [f"## {title}\n\n{markdown(table)}" for title, table in tables.items() if table is not None]
    rank, alpha = (run.settings.get(f"policy.lora.{name}") for name in ("rank", "alpha"))
    template = Template((Path(__file__).parent / "report" / "card.md").read_text("utf-8"), keep_trailing_newline=True)
    facts = {"checkpoint": checkpoint, "rank": rank, "alpha": alpha, "tables": "\n\n".join(shown)}
    return template.render(header=header.to_yaml(), name=markdown_text(run.name), **facts)


def main(arguments: Sequence[str]) -> int:
    """The command: prints the folder."""
    parser = Parser(
        prog="rethinker export",
        description="Write a run's model as a folder that vllm serve and transformers load: safetensors, processor, "
        "and a model card with the run's figures. `hf upload OWNER/NAME FOLDER` puts it on the Hugging Face hub.",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run, runs/<run.name>")
    parser.add_argument("--output", metavar="FOLDER", help="where to [exports/<run.name>]")
    parser.add_argument("--checkpoint", metavar="NAME", help="best, last or step_000040 [best, or else last]")
    print(export(**vars(parser.parse_args(list(arguments)))))
    return 0
