"""The settings reference, docs/settings.md, from config.py: `python -m rethinker.reference > docs/settings.md`."""

from __future__ import annotations

import functools
import inspect
import json
import sys

from rethinker.config import Config
from rethinker.ranges import in_words
from rethinker.settings import settings


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
        kind = in_words(setting.type) + (f"; {setting.range.words}" if setting.range else "")
        default = f"`{json.dumps(setting.default, ensure_ascii=False)}`"
        cells = (f"`{setting.key}`", kind, default, setting.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(settings_reference())
