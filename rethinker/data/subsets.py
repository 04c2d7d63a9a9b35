"""Which rows of a data set are trained on: not those held out, and those that the model answers sometimes."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

from rethinker.config import ConfigError
from rethinker.data.archives import split_archive
from rethinker.data.image_cache import content_name
from rethinker.samples import Query

log = logging.getLogger(__name__)

Side = Literal["train", "validation"]


def one_side(queries: list[Query], side: Side, share: float, root: str | None, where: str) -> list[Query]:
    """The questions of one side of a split by hash: the same ones in any order of the rows, and when rows are added.

    An image belongs to one side, by the hash of its path below `root` or of its bytes, and so do all questions about
    it; a question with images of both sides is left out. A text-only question goes by its text.

    Args:
        queries: all of them.
        side: which part to return.
        share: of images, and of text-only questions, that validate.
        root: folder or archive that image paths are named from, so that the data may move.
        where: names the data set in messages.

    Raises:
        ConfigError: nothing is left.
    """
    sides = [side_of(query, share, root) for query in queries]
    torn = sides.count(None)
    if torn and side == "train" and os.environ.get("RANK", "0") == "0":
        log.warning("%s: left out %d questions whose images fall on both sides of the split", where, torn)
    chosen = [query for query, own in zip(queries, sides, strict=True) if own == side]
    if not chosen:
        raise ConfigError(
            f"data.validation_share={share:g}: of the {len(queries)} questions of {where} none falls to {side}; "
            f"{'lower' if side == 'train' else 'raise'} it"
        )
    return chosen


def side_of(query: Query, share: float, root: str | None) -> Side | None:
    """The side that a question falls to by its hash; None with images of both."""
    keys = {image_name(image, root) for image in query.images} or {f"question {query.question}"}
    sides: set[Side] = {"validation" if _fraction(key) < share else "train" for key in keys}
    return sides.pop() if len(sides) == 1 else None


def _fraction(key: str) -> float:
    """From 0 to 1, by the hash."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def image_name(reference: Any, root: str | None) -> str:
    """What an image is called wherever the data lies."""
    if isinstance(reference, Mapping):
        if reference.get("bytes"):
            return content_name(reference["bytes"])
        reference = reference["path"]
    if hasattr(reference, "tobytes"):  # a PIL image
        return content_name(reference.tobytes())
    path = os.path.normpath(os.fspath(reference))
    if archived := split_archive(path):
        return archived[1]
    if root is None:
        return "/".join(path.split("/")[-2:])
    root = os.path.abspath(os.path.expanduser(root))
    path = os.path.abspath(path)
    return os.path.relpath(path, root) if path.startswith(root + os.sep) else path


def sometimes_right(queries: list[Query], column: str, where: str) -> list[Query]:
    """The questions whose pass rate lies between 0 and 1; what was not measured (-1, nothing) is left out, too.

    Raises:
        ConfigError: no such column, or none is left.
    """
    check_pass_rates(queries, column, where)
    reasons = [why_not(query.metadata.get(column)) for query in queries]
    chosen = [query for query, reason in zip(queries, reasons, strict=True) if reason is None]
    counts = ", ".join(f"{reason} {n}" for reason, n in Counter(filter(None, reasons)).most_common())
    if not chosen:
        raise ConfigError(f"data.pass_rate={column}: no question of {where} has a pass rate between 0 and 1 ({counts})")
    if counts and os.environ.get("RANK", "0") == "0":
        log.info(
            "%s: data.pass_rate=%s leaves %d of %d questions (%s)", where, column, len(chosen), len(queries), counts
        )
    return chosen


def check_pass_rates(queries: list[Query], column: str, where: str) -> None:
    """Refuse (ConfigError) a column that none of the questions has."""
    if not any(column in query.metadata for query in queries):
        known = ", ".join(sorted({name for query in queries[:100] for name in query.metadata})) or "none besides"
        raise ConfigError(f"data.pass_rate={column}: {where} has no such column, but {known}")


def why_not(rate: Any) -> str | None:
    """Why a question with this pass rate is left out; None if it is trained on."""
    measured = isinstance(rate, (int, float)) and math.isfinite(rate) and rate >= 0
    if not measured:
        return "not measured"
    return None if 0 < rate < 1 else "always wrong" if rate == 0 else "always right"
