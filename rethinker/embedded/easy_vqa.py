"""easy-VQA as queries: 48,248 questions about 5,000 images of one coloured shape each (PyPI package easy-vqa, MIT)."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from typing import Literal

from rethinker.samples import Query

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")


def easy_vqa(split: Literal["train", "test"]) -> list[Query]:
    """The questions of a split, in the package's order.

    Ids are `easy_vqa/<split>/<index>`; metadata holds `category` ("yes/no", "color" or "shape") and `image_id`.
    """
    import easy_vqa as package

    questions, paths = (getattr(package, f"get_{split}_{what}")() for what in ("questions", "image_paths"))
    return [
        Query(
            id=f"easy_vqa/{split}/{i}",
            question=question,
            answer=answer,
            images=(paths[image_id],),
            metadata={"category": _category(answer), "image_id": image_id},
        )
        for i, (question, answer, image_id) in enumerate(zip(*questions, strict=True))
    ]


def _category(answer: str) -> str:
    if answer in ("yes", "no"):
        return "yes/no"
    return "shape" if answer in SHAPES else "color"


def describe_images(queries: Iterable[Query]) -> dict[Hashable, tuple[str, str]]:
    """Colour and shape of every image whose questions tell both, by `image_key`.

    "what color is the shape?" says the colour. So does "is there a red shape?" when its answer is yes, and "is no red
    shape present?" when it is no. Questions of another kind, or about several images, say nothing.
    """
    from rethinker.data.images import image_key

    seen: dict[Hashable, dict[str, str]] = {}
    for query in queries:
        if len(query.images) != 1:
            continue
        known = seen.setdefault(image_key(query.images[0]), {})
        words = [query.answer]
        if query.answer in ("yes", "no"):
            holds = (query.answer == "yes") != is_negated(query.question)
            words = re.findall(r"\w+", query.question) if holds else []
        for word in words:
            if word in COLORS:
                known["color"] = word
            elif word in SHAPES:
                known["shape"] = word
    return {key: (known["color"], known["shape"]) for key, known in seen.items() if len(known) == 2}


def is_negated(question: str) -> bool:
    """Whether the question asks for absence: "is no red shape present?"."""
    return re.search(r"\b(no|not)\b", question) is not None
