"""How much may be wrong with a data set before a run stops: a share of its rows, `data.max_bad_rows`."""

from __future__ import annotations

from collections import Counter

from rethinker.config import ConfigError


class Faults:
    """Counts a data set's unusable rows by reason, and stops at one too many.

    A share, since what is an accident in 100,000 rows is a wrong column in 100. It is rounded down: a data set of fewer
    than 1 / share rows may have none, and one that is wrong altogether stops after that share of its rows.

    Args:
        share: `data.max_bad_rows`.
        rows: of the data set, as far as known.
    """

    def __init__(self, share: float, rows: int) -> None:
        self.share = share
        self.rows(rows)
        self.reasons: Counter[str] = Counter()
        self.first: ConfigError | None = None

    def add(self, reason: str, error: ConfigError) -> None:
        """Count a row.

        Raises:
            ConfigError: there are more than the limit: the first row's error, with the number of rows and the setting.
        """
        self.first = self.first or error
        self.reasons[reason] += 1
        self.check()

    def rows(self, rows: int) -> None:
        """Set the number of rows, where it is not known from the beginning."""
        self.limit = int(self.share * rows)

    def check(self) -> None:
        """Raise ConfigError, as `add` does, if there are more than the limit."""
        if self.reasons.total() <= self.limit:
            return
        if not self.limit:
            raise self.first
        raise type(self.first)(
            f"{self.first} (the first of {self.reasons.total()} unusable rows; data.max_bad_rows={self.share:g} allows "
            f"{self.limit})"
        )

    def __str__(self) -> str:
        counts = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
        return f"left out {self.reasons.total()} unusable rows ({counts}); the first: {self.first}"
