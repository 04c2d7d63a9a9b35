"""Runs many drawn inputs through one entrance of the program and keeps what a summary needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import SearchStrategy

from rethinker.config import ConfigError

# One input takes milliseconds; this is a hang.
HANG_S = 10.0


@dataclass
class Campaign:
    """What became of the inputs of one kind."""

    kind: str
    inputs: int = 0
    refused: int = 0
    slowest_s: float = 0.0
    slowest: str = ""
    messages: set[str] = field(default_factory=set)

    def run(
        self,
        examples: int,
        strategy: SearchStrategy[Any],
        use: Callable[[Any], None],
        folder: Path | None = None,
        phases: tuple[Phase, ...] = (Phase.generate,),
    ) -> Campaign:
        """Give `use` that many inputs.

        Each is taken or refused by a ConfigError in one printable line, before HANG_S, and one that is refused leaves
        nothing new in `folder`; anything else is an AssertionError or the program's own traceback.
        """

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy)
        def attempt(drawn: Any) -> None:
            before = listing(folder)
            start = time.perf_counter()
            try:
                use(drawn)
            except ConfigError as error:
                self.refused += 1
                message = str(error)
                assert message.strip() and len(message) < 2100, f"{len(message)} characters"
                assert listing(folder) == before, f"a refused input left {listing(folder) - before}"
                self.messages.add(message[:40])
            took = time.perf_counter() - start
            self.inputs += 1
            if took > self.slowest_s:
                self.slowest_s, self.slowest = took, repr(drawn)[:120]
            assert took < HANG_S, f"{took:.1f} s"

        attempt()
        return self

    def __str__(self) -> str:
        return (
            f"{self.kind:<10} {self.inputs:>6} inputs, {self.refused:>6} refused in one line, slowest "
            f"{self.slowest_s * 1e3:8.1f} ms: {self.slowest}"
        )


def listing(folder: Path | None) -> set[str]:
    """Everything below a folder."""
    return set() if folder is None else {str(path.relative_to(folder)) for path in folder.rglob("*")}
