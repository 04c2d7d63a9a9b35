"""A wheel built from the repository works where the source tree is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built from a copy so that the tree stays clean."""
    source = tmp_path_factory.mktemp("source")
    for name in ("rethinker", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(source / "dist")]
    subprocess.run(command, cwd=source, check=True, capture_output=True, timeout=120)
    (built,) = (source / "dist").glob("rethinker-*.whl")
    return built


class Environment:
    """A fresh virtual environment with the wheel in it, and other packages taken from a folder."""

    def __init__(self, folder: Path, wheel: Path, packages: str) -> None:
        self.folder, self.elsewhere = folder, folder / "elsewhere"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=120)
        self.python = folder / "venv" / "bin" / "python"
        (self.site,) = (folder / "venv" / "lib").glob("python*/site-packages")
        install = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-deps", "--no-index"]
        # Without the tests' PYTHONPATH: pip would take an editable install's egg-info there for an installed project.
        subprocess.run([*install, "-q", str(wheel)], check=True, timeout=120, env=self._environment())
        (self.site / "others.pth").write_text(packages)
        self.elsewhere.mkdir()

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a command of this environment in an empty folder, with nothing of ours on the path."""
        program = self.python.parent / command[0]
        options = {"cwd": self.elsewhere, "env": self._environment() | environment}
        options |= {"capture_output": True, "text": True, "timeout": 120}
        return subprocess.run([str(program), *command[1:]], **options)

    @staticmethod
    def _environment() -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


@pytest.fixture(scope="module")
def full(wheel, tmp_path_factory):
    """The wheel beside everything that is installed here."""
    return Environment(
        tmp_path_factory.mktemp("full"), wheel, packages=str(metadata.distribution("torch").locate_file(""))
    )


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory):
    """The wheel beside its base dependencies and nothing else, as `pip install rethinker` leaves it."""
    folder = tmp_path_factory.mktemp("base")
    packages = folder / "packages"
    packages.mkdir()
    wanted = [str(r) for r in map(Requirement, metadata.requires("rethinker")) if not r.marker]
    for name in _closure(wanted):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(distribution.locate_file(top))
    return Environment(folder, wheel, packages=str(packages))


def _closure(requirements: list[str]) -> set[str]:
    """Distributions that pip would install for these requirements."""
    names: set[str] = set()
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        names.add(requirement.name)
        for inner in metadata.requires(requirement.name) or []:
            todo += [
                (needed, wanted)
                for wanted in {"", *requirement.extras}
                if (needed := Requirement(inner)).name not in names
            ]
    return names


def test_packages_come_from_the_wheel(full):
    """Both packages, the recipes and the child processes' sitecustomize are in the wheel, and nothing else is."""
    code = "from importlib.util import find_spec as f; print(f('rethinker').origin, f('rethinker_kernels').origin)"
    origins = full.run("python", "-c", code).stdout.split()
    assert len(origins) == 2 and all(Path(origin).is_relative_to(full.site) for origin in origins)
    assert (full.site / "rethinker" / "recipes" / "easy_vqa_cpu.yaml").is_file()
    assert (full.site / "rethinker" / "runtime" / "site" / "sitecustomize.py").is_file()
    record = next(full.site.glob("rethinker-*.dist-info/RECORD")).read_text()
    tops = {line.split("/")[0] for line in record.splitlines()} - {".."}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"rethinker", "rethinker_kernels"}


def test_shipped_recipes_work_outside_the_source_tree(full):
    """`rethinker train easy_vqa_cpu` finds its recipe and documents its settings in any folder."""
    result = full.run("rethinker", "train", "easy_vqa_cpu", "--print_config", "--train.max_steps", "20")
    assert result.returncode == 0, result.stderr
    assert "max_steps: 20" in result.stdout and "# Stop after this many" in result.stdout
    assert "rethinker 0." in full.run("rethinker", "--version").stdout


def test_doctor_outside_the_source_tree(full):
    """Beside the installed parts doctor finds them all and ends with 0."""
    result = full.run("rethinker", "doctor")
    assert result.returncode == 0, result.stdout + result.stderr
    assert str(full.site / "rethinker") in result.stdout


def test_a_base_installation_says_what_is_missing(base):
    """With the base dependencies alone doctor runs, ends with 1 and prints the extra to install; train says it too."""
    result = base.run("rethinker", "doctor")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "pip install 'rethinker[" in result.stdout
    for part in ("transformers", "deepspeed", "vllm"):
        assert part in result.stdout.split("To train here:")[1]
    trained = base.run("rethinker", "train", "easy_vqa_cpu")
    assert trained.returncode == 2 and trained.stderr.count("\n") == 1
    assert "needs the package" in trained.stderr and "rethinker[" in trained.stderr
    assert list(base.elsewhere.iterdir()) == []


def test_the_sum_tree_compiles_from_the_wheel(base, tmp_path):
    """The C++ sources are in the wheel; a tree is compiled from them, or says that there is no compiler. The ops need
    the base dependencies only and do not import the trainer."""
    if not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("needs a C++ compiler")
    code = (
        "import sys, torch; from rethinker_kernels import SumTree; tree = SumTree(50);"
        "assert not any(module.split('.')[0] == 'rethinker' for module in sys.modules);"
        "tree.update(torch.arange(50), torch.ones(50)); print(len(tree.sample(20, generator=None)))"
    )
    compiled, without = (
        base.run("python", "-c", code, XDG_CACHE_HOME=str(tmp_path), **case) for case in ({}, {"CXX": "/nowhere/c++"})
    )
    assert compiled.stdout == "20\n" and "compiling the cpu sum tree" in compiled.stderr, compiled.stderr
    assert without.returncode == 1 and "no C++ compiler" in without.stderr.splitlines()[-1]
    assert {path.suffix for path in (base.site / "rethinker_kernels" / "csrc").iterdir()} == {".h", ".cpp", ".cu"}
