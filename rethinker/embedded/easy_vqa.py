"""easy-VQA as queries: 48,248 questions about 5,000 images of one coloured shape each (PyPI package easy-vqa, MIT)."""

from __future__ import annotations

from typing import Literal

from rethinker.samples import Query

SHAPES = ("circle", "rectangle", "triangle")


def easy_vqa(split: Literal["train", "test"]) -> list[Query]:
    """The questions of a split, in the package's order.

    Ids are `easy_vqa/<split>/<index>`; metadata holds `category` ("yes/no", "color" or "shape") and `image_id`.
    """
    import easy_vqa as package

    if split == "train":
        questions, paths = package.get_train_questions(), package.get_train_image_paths()
    else:
        questions, paths = package.get_test_questions(), package.get_test_image_paths()
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
