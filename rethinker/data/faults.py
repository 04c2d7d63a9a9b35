"""How much may be wrong with a data set before a run stops: a share of its rows, `data.max_bad_rows`."""

from __future__ import annotations

from collections import Counter

from rethinker.config import ConfigError


def check_bad_rows(error: ConfigError, bad: int, rows: int, share: float) -> None:
    """Raise the error of one of the bad rows if there are more than the limit.

    The limit is a share, since what is an accident in 100,000 rows is a wrong column in 100. It is rounded down: a data
    set of fewer than 1 / share rows may have none, and one that is wrong altogether stops after that share of its rows.

    Args:
        error: what is wrong with the row to name.
        bad: rows that cannot be used.
        rows: of the data set, as far as known.
        share: `data.max_bad_rows`.
    """
    limit = int(share * rows)
    if bad > limit:
        more = f" (one of {bad} unusable rows of {rows}; data.max_bad_rows={share:g} allows {limit})" if limit else ""
        raise type(error)(f"{error}{more}") from error


def counts(reasons: Counter[str]) -> str:
    """`no answer 2, no question 1`."""
    return ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
