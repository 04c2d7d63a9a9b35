"""What the commands share: a parser whose mistakes are one line, and RECIPE followed by options and settings."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from typing import NoReturn

from rethinker.config import ConfigError
from rethinker.settings import shipped_recipes


class Parser(ArgumentParser):
    """ArgumentParser whose mistakes are ConfigErrors: one line instead of the whole usage."""

    def __init__(self, **arguments: object) -> None:
        super().__init__(allow_abbrev=False, **arguments)  # an abbreviation might be the start of a setting's name

    def error(self, message: str) -> NoReturn:
        """Called by argparse, and by commands for what argparse cannot check."""
        raise ConfigError(message)

    def parse_recipe(self, arguments: Sequence[str]) -> tuple[Namespace, list[str]]:
        """The options, RECIPE among them as `recipe`, and the overrides of settings.

        The recipe comes first: behind settings its place would be a matter of guessing.
        """
        if not {"-h", "--help"}.intersection(arguments) and (not arguments or arguments[0].startswith("-")):
            self.error(f"name a recipe first: {', '.join(shipped_recipes())}, or a .yaml file")
        return self.parse_known_args(list(arguments))
