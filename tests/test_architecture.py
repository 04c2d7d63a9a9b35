"""docs/architecture.md lists the rooms from low to high, and every import obeys the list."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORT = "import_module"  # called with a name: an import, too


def listed_rooms(page: str) -> list[str]:
    """The first word of each line in the page's first fenced block, from low to high; a folder without its last /."""
    block = re.search(r"^```\w*\n(.*?)^```", page, flags=re.M | re.S)[1]
    return [line.split()[0].rstrip("/") for line in block.splitlines() if line.strip()]


def imports(root: Path) -> dict[str, set[str]]:
    """Of every module the dotted names that it imports: lazily, too, and for types alone."""
    found = {}
    for folder in (root / "rethinker", root / "kernels" / "rethinker_kernels"):
        for path in sorted(folder.rglob("*.py")):
            module = ".".join((folder.name, *path.relative_to(folder).with_suffix("").parts))
            found[module] = set()
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found[module] |= {alias.name for alias in node.names}
                elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == IMPORT:
                    found[module] |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
                elif isinstance(node, ast.ImportFrom):
                    package = module.split(".")[: -node.level] if node.level else []
                    base = ".".join([*package, *([node.module] if node.module else [])])
                    found[module] |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def arrows(root: Path) -> dict[str, set[str]]:
    """Of every file of ours the files of ours that it imports, each as `policy/model`, `policy/__init__`, or
    `rethinker_kernels/linear`."""
    names = imports(root)

    def file_of(name: str) -> str | None:
        """The file of a dotted name: the module itself, or the one that an imported object comes from."""
        candidates = (name, f"{name}.__init__", name.rpartition(".")[0], f"{name.rpartition('.')[0]}.__init__")
        return next((candidate for candidate in candidates if candidate in names), None)

    def short(module: str) -> str:
        return module.removeprefix("rethinker.").replace(".", "/")

    return {short(module): {short(file) for file in map(file_of, found) if file} for module, found in names.items()}


OURS = {"rethinker": ROOT, "rethinker_kernels": ROOT / "kernels", "tests": ROOT, "benchmarks": ROOT}


@cache
def source_of(module: str) -> Path | None:
    """The file or folder of one of our modules."""
    place = OURS[module.split(".")[0]].joinpath(*module.split("."))
    files = (place.with_suffix(".py"), place / "__init__.py", place)
    return next((file for file in files if file.exists()), None)


@cache
def defined(file: Path) -> set[str]:
    """What can be imported from a file: the names bound anywhere in it, nested ones too."""
    if file.is_dir():
        return set()
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def faults(root: Path) -> list[str]:
    """What is wrong with the imports below a root: unnamed rooms, names without a room, arrows up, a circle."""
    rooms = listed_rooms((root / "docs" / "architecture.md").read_text())
    found = arrows(root)

    def below(file: str) -> set[str]:
        """The files that a file imports, and those that these import, and so on."""
        seen: set[str] = set()
        todo = [*found[file]]
        while todo:
            if (target := todo.pop()) not in seen:
                seen.add(target)
                todo += found[target]
        return seen

    def room_of(file: str) -> str | None:
        """The room that a file is in: the longest name on the list that is the file or a folder around it."""
        return max((room for room in rooms if f"{file}/".startswith(f"{room}/")), key=len, default=None)

    wrong = [f"{file} is in no room of the list" for file in found if room_of(file) is None]
    wrong += [f"{room} is on the list, and no file is in it" for room in rooms if room not in map(room_of, found)]
    for file, targets in found.items():
        own = room_of(file)
        wrong += [
            f"{file} imports {target}: up, from {own} to {room}"
            for target in sorted(targets)
            if own and (room := room_of(target)) and rooms.index(room) > rooms.index(own)
        ]
    reached = {file: below(file) for file in found}
    circles = {tuple(sorted(other for other in reached[file] if file in reached[other])) for file in found}
    return wrong + [f"these import each other in a circle: {', '.join(circle)}" for circle in sorted(circles) if circle]


def test_no_arrow_up_no_circle_no_room_without_a_name():
    """Every import of rethinker/ and kernels/ stays in its room or goes down; no two files import each other."""
    assert faults(ROOT) == []


def test_tests_and_benchmarks_import_what_there_is():
    """Every name that they import from us, lazily too, exists: a move breaks them here, and not on a GPU only."""
    for path in sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OURS:
                file, names = source_of(node.module), {alias.name for alias in node.names}
                assert file, f"{path}: there is no {node.module}"
                missing = {name for name in names - defined(file) if not source_of(f"{node.module}.{name}")}
                assert not missing, f"{path}: {node.module} has no {', '.join(missing)}"


def test_the_kernels_stand_alone():
    """rethinker_kernels imports torch and triton, and nothing else that would have to be installed."""
    names = {name.split(".")[0] for module, found in imports(ROOT).items() if "_kernels" in module for name in found}
    assert names - set(sys.stdlib_module_names) == {"torch", "triton", "rethinker_kernels"}


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        (None, "", None),
        ("low.py", "def f():\n    from rethinker.high import work", "low imports high/__init__: up, from low to high"),
        (
            "low.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rethinker.high.deep.work",
            "low imports high/deep/work: up, from low to high/deep",
        ),
        (
            "low.py",
            "import importlib\nimportlib.import_module('rethinker.high.a')",
            "low imports high/a: up, from low to high",
        ),
        ("high/a.py", "from .b import y", "these import each other in a circle: high/a, high/b"),
        ("high/b.py", "import rethinker.high.deep.work", "high/b imports high/deep/work: up, from high to high/deep"),
        ("attic/old.py", "", "attic/old is in no room of the list"),
        ("low.py", None, "low is on the list, and no file is in it"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, file, text, fault):
    """In a small house without a fault: none; then with an arrow up (lazy, for types, into a room of a room), a circle,
    a room that the list does not name, and a name without a room."""
    house = {
        "docs/architecture.md": "# Rooms\n\n```text\nlow    what all need\nhigh/  the work\nhigh/deep/  more\n```\n",
        "rethinker/low.py": "import json",
        "rethinker/high/__init__.py": "",
        "rethinker/high/a.py": "from rethinker.low import x",
        "rethinker/high/b.py": "import rethinker.high.a\nfrom rethinker import low",
        "rethinker/high/deep/work.py": "from .. import a\nfrom rethinker.high import b",
    }
    if file:
        house[f"rethinker/{file}"] = text
    for name, content in house.items():
        if content is not None:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
    if text is None:  # who imported the file that is gone
        (tmp_path / "rethinker/high/a.py").write_text("")
    found = faults(tmp_path)
    assert fault in found if fault else not found
