"""A few rows of every benchmark in its published schema, written as the parquet files of its data set."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

IMAGE = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def png(color: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(buffer, "PNG")
    return buffer.getvalue()


def image(color: str) -> dict[str, Any]:
    """As Hugging Face stores it."""
    return {"bytes": png(color), "path": f"{color}.png"}


def _write(path: Path, rows: list[dict[str, Any]], **types: pa.DataType) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    for name, kind in types.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array([r[name] for r in rows], kind))
    parquet.write_table(table, path)


def mathvista(folder: Path) -> None:
    meta = {"category": "math-targeted-vqa", "context": "bar chart", "grade": "daily life", "img_height": 32}
    meta |= {"img_width": 32, "language": "english", "skills": ["arithmetic reasoning"], "source": "IconQA"}
    rows = [
        {
            **{"pid": "1", "question": "How wide?", "image": "images/1.jpg", "decoded_image": image("red")},
            **{"choices": None, "unit": "cm", "precision": 1.0, "answer": "1.2", "question_type": "free_form"},
            **{"answer_type": "float", "metadata": meta | {"split": "testmini", "task": "math word problem"}},
            "query": "Hint: Please answer the question requiring a floating-point number with one decimal place and "
            "provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\nQuestion: How wide? (Unit: cm)",
        },
        {
            **{"pid": "2", "question": "Angle?", "image": "images/2.jpg", "decoded_image": image("blue")},
            **{"choices": ["135°", "140°", "145°"], "unit": None, "precision": None, "answer": "145°"},
            **{"question_type": "multi_choice", "answer_type": "text"},
            "metadata": meta | {"split": "testmini", "task": "geometry problem solving"},
            "query": "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the "
            "end.\nQuestion: Angle?\nChoices:\n(A) 135°\n(B) 140°\n(C) 145°",
        },
        {
            **{"pid": "3", "question": "How many?", "image": "images/3.jpg", "decoded_image": image("red")},
            **{"choices": None, "unit": None, "precision": None, "answer": "1200", "question_type": "free_form"},
            **{"answer_type": "integer", "metadata": meta | {"split": "testmini", "task": "figure question answering"}},
            "query": "Hint: Please answer the question requiring an integer answer and provide the final value, e.g., "
            "1, 2, 3, at the end.\nQuestion: How many?",
        },
        {
            **{"pid": "4", "question": "Which?", "image": "images/4.jpg", "decoded_image": image("red")},
            **{"choices": None, "unit": None, "precision": None, "answer": "[1, 2]", "question_type": "free_form"},
            **{"answer_type": "list", "metadata": meta | {"split": "testmini", "task": "figure question answering"}},
            "query": "Hint: Please answer the question requiring a Python list as an answer and provide the final "
            "list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.\nQuestion: Which?",
        },
    ]
    _write(folder / "data/testmini-00000-of-00001-725687bf7a18d64b.parquet", rows, decoded_image=IMAGE)
    _write(folder / "data/test-00000-of-00002.parquet", [rows[0] | {"pid": "9", "answer": ""}], decoded_image=IMAGE)


def mathverse(folder: Path) -> None:
    meta = {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"}
    cot = "Please first conduct reasoning, and then answer the question and provide the correct option letter, e.g., "
    rows = [
        {
            **{"sample_index": "1", "problem_index": "1", "problem_version": "Text Dominant"},
            **{"question": "AB is 4. Angle?\nChoices:\nA:60°\nB:50°", "image": image("red"), "answer": "A"},
            **{"question_type": "multi-choice", "metadata": meta, "query_wo": "Please directly answer the question"},
            "query_cot": cot + "A, B, C, D, at the end.\nQuestion: AB is 4. Angle?\nChoices:\nA:60°\nB:50°",
        },
        {
            **{"sample_index": "5", "problem_index": "1", "problem_version": "Vision Only", "question": ""},
            **{"image": image("blue"), "answer": "B", "question_type": "multi-choice", "metadata": meta},
            **{"query_wo": "According to the question shown in the image, please directly answer"},
            "query_cot": "According to the question shown in the image, " + cot + "A, B, C, D, at the end.",
        },
    ]
    _write(folder / "testmini.parquet", rows, image=IMAGE)


def mathvision(folder: Path) -> None:
    common = {"image": "images/4.jpg", "solution": None, "level": 2}
    rows = [
        common
        | {"id": "4", "question": "Which bridge?\n<image1>", "options": ["A", "B", "C", "D", "E"], "answer": "B"}
        | {"decoded_image": image("red"), "subject": "combinatorial geometry"},
        common
        | {"id": "5", "question": "How many? <image1>", "options": [], "answer": "\\frac{1}{2}"}
        | {"decoded_image": image("blue"), "subject": "counting"},
    ]
    _write(folder / "data/test-00000-of-00001-3532b8d3f1b4047a.parquet", rows, decoded_image=IMAGE)


def _numbered(last: int, *images: Any) -> dict[str, Any]:
    return {f"image_{i + 1}": images[i] if i < len(images) else None for i in range(last)}


def mmmu(folder: Path) -> None:
    common = {"explanation": "", "img_type": "['Plots and Charts']", "topic_difficulty": "Easy", "subfield": "Art"}
    rows = [
        {
            **common,
            **{"id": "validation_Art_Theory_1", "question": "Compare <image 2> to <image 1>: what of <image 2>?"},
            **{"options": "['a <image 3>', \"it's b\"]", "answer": "B", "question_type": "multiple-choice"},
            **_numbered(7, image("red"), image("blue"), image("green")),
        },
        {
            **common,
            **{"id": "validation_Art_Theory_2", "question": "How much? <image 1>", "options": "[]"},
            **{"answer": "['24/7', '3.429']", "question_type": "open", **_numbered(7, image("red"))},
        },
    ]
    kinds = {f"image_{i}": IMAGE for i in range(1, 8)}
    _write(folder / "Art_Theory/validation-00000-of-00001.parquet", rows, **kinds)
    text_only = rows[1] | {"id": "validation_Math_7", "question": "1 + 1?", "answer": "2", "image_1": None}
    _write(folder / "Math/validation-00000-of-00001.parquet", [text_only], **kinds)
    _write(folder / "Math/test-00000-of-00001.parquet", [text_only | {"answer": "?"}], **kinds)


def mmmu_pro(folder: Path) -> None:
    options = str([f"option {i}" for i in range(10)])
    standard = {"id": "test_History_1", "question": "Who? <image 1>", "options": options, "explanation": "?"}
    standard |= {"img_type": "['Cartoons']", "answer": "J", "topic_difficulty": "Medium", "subject": "History"}
    kinds = {f"image_{i}": IMAGE for i in range(1, 8)}
    for i, part in enumerate(("standard (10 options)", "standard (4 options)")):
        rows = [standard | {"id": f"test_History_{i + 1}"} | _numbered(7, image("red"))]
        _write(folder / part / "test-00000-of-00001.parquet", rows, **kinds)
    vision = {"id": "test_History_1", "image": image("blue"), "options": options, "answer": "C", "subject": "History"}
    _write(folder / "vision/test-00000-of-00001.parquet", [vision], image=IMAGE)


def emma(folder: Path) -> None:
    kinds = {f"image_{i}": IMAGE for i in range(1, 6)}
    common = {"solution": "", "source": "new", "context": ""}
    rows = [
        {
            **common,
            **{"pid": "math_1", "question": "Which completes <image_1>?", "options": ["<image_2>", "<image_3>"]},
            **{"answer": "B", "subject": "Math", "task": "Pattern", "category": "Pattern", "type": "Multiple Choice"},
            **_numbered(5, image("red"), image("blue"), image("green")),
        }
    ]
    _write(folder / "Math/test-00000-of-00001.parquet", rows, **kinds)
    open_ended = common | {"pid": "code_1", "question": "How many bars? <image_1>", "options": [], "answer": "3"}
    open_ended |= {"subject": "Coding", "task": "Vis", "category": "Vis", "type": "Open-ended", "context": "A chart."}
    kinds["options"] = pa.list_(pa.string())
    _write(folder / "Coding/test-00000-of-00001.parquet", [open_ended | _numbered(5, image("red"))], **kinds)


def megabench(folder: Path) -> None:
    def row(name: str, answer: str, metrics: str, media: str, **more: str) -> dict[str, str]:
        metric_info = f"{{'field_score_function': {metrics}, 'aggregation': {{'function': 'mean'}}}}"
        return {
            **{"id": name, "task_name": "maze", "task_description": "Solve the maze <image>.", "answer": answer},
            **{"global_media": "['./data/maze/rules.png']", "example_text": "Example: <image> Answer: left"},
            **{"example_media": "['./data/maze/example.png']", "query_text": "Which way? <image>"},
            **{"query_media": media, "metric_info": metric_info, "eval_context": "{}"},
            **{"taxonomy_tree_path": "Planning;Puzzles_and_Games"},
        } | more

    media = "['./data/maze/query.png']"
    one = "{'solution': 'exact_str_match_case_insensitive'}"
    rows = [
        row("q1", "{'solution': 'Up'}", one, media),
        row("q2", "{'name': 'x', 'year': '1'}", "{'name': 'exact_str_match', 'year': 'exact_str_match'}", media),
        row("q3", "{'solution': 'Up'}", "{'solution': 'normalized_similarity_damerau_levenshtein'}", media),
        row("q4", "{'solution': 'Up'}", one, "['./data/maze/clip.mp4']"),
        row("q5", "{'solution': 'New York-City.'}", "{'solution': 'simple_str_match'}", media),
        row("q6", "{'length': '\\\\boxed{200}'}", "{'length': 'boxed_single_numerical_match'}", media),
        row("q7", "{'solution': 'Up'}", "{'solution': 'exact_str_match'}", media),
    ]
    _write(folder / "core/test-00000-of-00001.parquet", rows)
    (folder / "data/maze").mkdir(parents=True)
    for name, color in (("rules", "red"), ("example", "blue"), ("query", "green")):
        (folder / f"data/maze/{name}.png").write_bytes(png(color))
