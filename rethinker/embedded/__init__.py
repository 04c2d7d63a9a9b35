"""The embedded default: a tiny model, its tokenizer and warm-up, and data sets that come with installed packages."""

from __future__ import annotations

from pathlib import Path


def own_files() -> list[Path]:
    """The code and texts of this folder, of which data sets, tokenizer, model and warm-up are made."""
    kinds = (".py", ".json", ".jinja")
    files = sorted(Path(__file__).parent.iterdir())
    return [file for file in files if file.suffix in kinds and not file.name.startswith(".")]
