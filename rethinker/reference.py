"""The settings reference, docs/settings.md, from config.py: `python -m rethinker.reference > docs/settings.md`."""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys

from rethinker.config import Config
from rethinker.settings import Setting, settings


def settings_reference() -> str:
    """Every setting with its type, range, default and meaning, section by section, as Markdown."""
    lines = [
        "# Settings",
        "",
        "A recipe is a YAML file with these sections; `--section.name value` replaces one of them on the command line. "
        "What a recipe leaves out has the default given here; `rethinker train RECIPE --print_config` prints all.",
    ]
    section = None
    for setting in settings():
        parent, _, _ = setting.key.rpartition(".")
        if parent != section:
            section = parent
            about = inspect.getdoc(functools.reduce(getattr, parent.split("."), Config())) if parent else ""
            lines += ["", f"## {parent or 'The run as a whole'}", "", *([" ".join(about.split()), ""] if about else [])]
            lines += ["| setting | type | default | |", "|---|---|---|---|"]
        default = f"`{json.dumps(setting.default, ensure_ascii=False)}`"
        cells = (f"`{setting.key}`", _type(setting), default, setting.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _type(setting: Setting) -> str:
    """`int | None, at least 1`: the type as config.py has it, and its bounds."""
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    schema = setting.schema.get("anyOf", [setting.schema])[0]
    bounds = [f"{word} {schema[name]}" for name, word in words.items() if name in schema]
    name = re.sub(r"Optional.(.*).$", r"\1 | None", inspect.formatannotation(setting.type).replace("typing.", ""))
    return ", ".join([f"`{name}`", *bounds])


if __name__ == "__main__":
    sys.stdout.write(settings_reference())
