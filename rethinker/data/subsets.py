"""Which rows of a data set are trained on: not those held out, and those that the model answers sometimes."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from typing import Any, Literal

from rethinker.data.archives import split_archive
from rethinker.samples import Query

Side = Literal["train", "validation"]


def side_of(query: Query, share: float, root: str | None) -> Side | None:
    """The side of a split that a question falls to by its hash: the same in any order, and when rows are added.

    An image belongs to one side, by the hash of its path below `root` or of its bytes, and so do all questions about
    it; a question with images of both sides is on neither (None). A text-only question goes by its text.

    Args:
        query: the question.
        share: of images, and of text-only questions, that validate.
        root: folder or archive that image paths are named from, so that the data may move.
    """
    keys = {image_name(image, root) for image in query.images} or {f"question {query.question}"}
    sides: set[Side] = {"validation" if hash_fraction(key) < share else "train" for key in keys}
    return sides.pop() if len(sides) == 1 else None


def hash_fraction(key: str) -> float:
    """From 0 to 1, by the hash."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def content_name(content: bytes) -> str:
    """The name of an image by its bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def image_name(reference: Any, root: str | None) -> str:
    """What an image is called wherever the data lies; without a root, by its file and its folder alone."""
    if isinstance(reference, Mapping):
        if reference.get("bytes"):
            return content_name(reference["bytes"])
        reference = reference["path"]
    path = os.path.normpath(os.fspath(reference))
    if archived := split_archive(path):
        return archived[1]
    if root is None:
        return "/".join(path.split("/")[-2:])
    root = os.path.abspath(os.path.expanduser(root))
    path = os.path.abspath(path)
    return os.path.relpath(path, root) if path.startswith(root + os.sep) else path


def why_not(rate: Any) -> str | None:
    """Why a question with this pass rate is left out; None if it is trained on."""
    if not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
        return "not measured"
    return None if 0 < rate < 1 else "always wrong" if rate == 0 else "always right"
