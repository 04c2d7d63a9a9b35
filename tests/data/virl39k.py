"""Rows in ViRL39K's schema, made here: eight categories, text-only, two-image and choice rows, images of many sizes."""

from __future__ import annotations

import functools
import io
import random
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image, ImageDraw

CATEGORIES = (
    "(GradeSchool) Geometric",
    "(GradeSchool) Non-Geo Math",
    "(GradeSchool) Science",
    "Spatial Reasoning",
    "Broader STEM Topics",
    "Social Science",
    "Tables/Diagrams/Charts",
    "(K12/Uni) Science",
)
SCHEMA = pa.schema(
    {
        "question": pa.string(),
        "answer": pa.string(),
        "PassRate_32BTrained": pa.float64(),
        "PassRate_7BBase": pa.float64(),
        "category": pa.string(),
        "source": pa.string(),
        "qid": pa.string(),
        "image": pa.list_(pa.string()),
    }
)
COLORS = ("red", "green", "blue", "yellow")


def make_rows(count: int) -> list[dict[str, Any]]:
    """`count` rows; every tenth is text-only, every fifth of the rest has two images, every third is a choice."""
    rng = random.Random(0)
    rows = []
    for n in range(count):
        color, other = rng.sample(COLORS, 2)
        images = [f"images/{n}_{color}.png"]
        if n % 10 == 0:
            a, b = rng.randrange(10), rng.randrange(10)
            question, answer, images = f"What is {a} + {b} (number {n})?", str(a + b), []
        elif n % 5 == 1:
            images.append(f"images/{n}_{other}.jpg")
            question, answer = "<image> <image> What is the colour of the second image?", other
        elif n % 3 == 0:
            options = rng.sample(COLORS, 4)
            listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options, strict=True))
            question, answer = f"<image>Which colour is it?\n{listed}", "ABCD"[options.index(color)]
        else:
            question, answer = "Which colour has the image?", color  # without a mark
        rows.append(
            {
                "question": question,
                "answer": f"\\boxed{{{answer}}}",
                "PassRate_32BTrained": rng.randrange(17) / 16,
                "PassRate_7BBase": rng.choice([-1.0, rng.randrange(17) / 16]),
                "category": CATEGORIES[n % 8],
                "source": rng.choice(["Processed", "MM-Math", "AI2D"]),
                "qid": f"Processed-{n:05d}",
                "image": images,
            }
        )
    return rows


@functools.cache  # most tests write the same ones
def picture(name: str) -> bytes:
    """The image of a name such as `images/7_red.png`: its colour around a black square, its size by its number."""
    number, color = Path(name).stem.split("_")
    image = Image.new("RGB", (24 + 8 * (int(number) % 12), 24 + 8 * (int(number) % 7)), color)
    ImageDraw.Draw(image).rectangle((4, 4, 11, 11), fill="black")
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if name.endswith(".jpg") else "PNG")
    return buffer.getvalue()


def write_fixture(folder: Path, count: int = 200, archive: bool = False) -> Path:
    """39Krelease.parquet, and beside it images/ or images.zip; returns the parquet's path."""
    rows = make_rows(count)
    names = [name for row in rows for name in row["image"]]
    if archive:
        with zipfile.ZipFile(folder / "images.zip", "w") as file:
            for name in names:
                file.writestr(name, picture(name))
    else:
        (folder / "images").mkdir()
        for name in names:
            (folder / name).write_bytes(picture(name))
    path = folder / "39Krelease.parquet"
    parquet.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return path
