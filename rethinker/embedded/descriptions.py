"""What an easy-VQA image shows, read off its own questions: one shape with one colour.

"what color is the shape?" says the colour. So does "is there a red shape?" when its answer is yes, and "is no red shape
present?" when it is no.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable

from rethinker.data.images import image_key
from rethinker.embedded.easy_vqa import SHAPES
from rethinker.samples import Query

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

_NEGATION = re.compile(r"\b(no|not)\b")
_WORD = re.compile(r"\w+")


def describe_images(queries: Iterable[Query]) -> dict[Hashable, tuple[str, str]]:
    """Colour and shape of every image whose questions tell both, by `image_key`.

    Questions of another kind, or about several images, say nothing.
    """
    seen: dict[Hashable, dict[str, str]] = {}
    for query in queries:
        if len(query.images) != 1:
            continue
        known = seen.setdefault(image_key(query.images[0]), {})
        for word in _true_words(query):
            if word in COLORS:
                known["color"] = word
            elif word in SHAPES:
                known["shape"] = word
    return {key: (known["color"], known["shape"]) for key, known in seen.items() if len(known) == 2}


def is_negated(question: str) -> bool:
    """Whether the question asks for absence: "is no red shape present?"."""
    return _NEGATION.search(question) is not None


def _true_words(query: Query) -> Iterable[str]:
    """Words that hold of the image: those of an open answer, or those of a statement that the answer confirms."""
    if query.answer not in ("yes", "no"):
        return [query.answer]
    if (query.answer == "yes") != is_negated(query.question):
        return _WORD.findall(query.question)
    return []
