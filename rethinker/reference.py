"""The settings reference, docs/settings.md, from config.py: `python -m rethinker.reference > docs/settings.md`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import typing

from rethinker.config import Config
from rethinker.settings import in_words, settings


def settings_reference() -> str:
    """Every setting with its type, default and meaning, section by section, as Markdown."""
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
            doc = _section_doc(parent)
            lines += ["", f"## {parent or 'The run as a whole'}", "", *([doc, ""] if doc else [])]
            lines += ["| setting | type | default | |", "|---|---|---|---|"]
        cells = (f"`{setting.key}`", in_words(setting.type), _default(setting.default), setting.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _section_doc(section: str) -> str:
    """The first paragraph of a section's docstring."""
    kind: type = Config
    for name in filter(None, section.split(".")):
        kind = typing.get_type_hints(kind)[name]
    assert dataclasses.is_dataclass(kind)
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split()) if section else ""


def _default(value: object) -> str:
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)}`"


if __name__ == "__main__":
    sys.stdout.write(settings_reference())
