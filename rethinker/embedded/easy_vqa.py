"""easy-VQA as queries: 48,248 questions about 5,000 images of one coloured shape each (PyPI package easy-vqa, MIT)."""

from __future__ import annotations

import random
import re
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from rethinker.samples import Query

if TYPE_CHECKING:
    import torch

SHAPES = ("circle", "rectangle", "triangle")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")

# How often the warm-up overlooks the "not" of a negated question: clearly more than half, so that the greedy answer is
# wrong whatever the seed and the machine, and clearly less than always, so that samples are sometimes right.
NOT_OVERLOOKED = 0.65


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
    from rethinker.data.images import image_key  # imports Pillow

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


class EasyVqaTeacher:
    """What the warm-up teaches about easy-VQA: to name colour and shape, and answers that look before they answer.

    `a teal circle. \\boxed{teal}`, on the images whose questions tell what they show. In negated questions ("is there
    not a red shape?") the teacher overlooks the "not" two times in three: that mistake is left to reinforcement
    learning. (A model that never saw such questions never samples their answers, so no reward could teach it; one that
    saw them answered right leaves nothing to learn.) Of other data it knows the answers alone, `\\boxed{7}`.
    """

    classes = len(COLORS) + len(SHAPES) + 1  # and a weight of the token
    environment, hears = None, ()

    def __init__(self, queries: Iterable[Query]) -> None:
        self._shown = describe_images(queries)

    def description(self, query: Query) -> tuple[str, str] | None:
        """Colour and shape of the query's image, where they are known."""
        from rethinker.data.images import image_key

        return self._shown.get(image_key(query.images[0])) if len(query.images) == 1 else None

    def sees(self, query: Query) -> bool:
        """Whether it is known what the query's image shows."""
        return self.description(query) is not None

    def view(self, query: Query, rng: random.Random) -> Query:
        """The query as looking is practised on it: as it is."""
        return query

    def look_loss(
        self, scores: torch.Tensor, owner: torch.Tensor, queries: Sequence[Query]
    ) -> tuple[torch.Tensor, int]:
        """Cross-entropy of colour and shape, and of how many images, from scores [tokens, classes] pooled by a learned
        weight of each token; `owner` [tokens] counts the images."""
        import torch
        from torch.nn import functional as F

        weight = scores[:, -1:].clamp(-20, 20).exp()
        total = torch.zeros(len(queries), 1).index_add(0, owner, weight)
        pooled = torch.zeros(len(queries), scores.shape[1]).index_add(0, owner, weight * scores) / total
        colors, shapes = zip(*map(self.description, queries), strict=True)
        color_loss = F.cross_entropy(pooled[:, : len(COLORS)], torch.tensor([COLORS.index(c) for c in colors]))
        shape_loss = F.cross_entropy(pooled[:, len(COLORS) : -1], torch.tensor([SHAPES.index(s) for s in shapes]))
        return color_loss + shape_loss, len(queries)

    def responses(self, query: Query, rng: random.Random) -> list[list[tuple[str, bool]]]:
        """One response, in one piece that is taught: a look at the image, and the answer."""
        answer = query.answer
        if answer in ("yes", "no") and is_negated(query.question) and rng.random() < NOT_OVERLOOKED:
            answer = "no" if answer == "yes" else "yes"
        description = self.description(query)
        look = "a {} {}. ".format(*description) if description else ""
        return [[(f"{look}\\boxed{{{answer}}}", True)]]
