"""Carries what a machine without a network lacks: gathers wheels for it, and cuts what is too large for one transfer.

    python -m benchmarks.air_gapped gather FOLDER [--have FILE] [--want NAME ...]     # with a network
    python -m benchmarks.air_gapped cut WHEEL FOLDER [--without PATTERN ...] [--limit 60]
    python -m benchmarks.air_gapped join FOLDER TARGET                                           # without one

docs/air_gapped.md walks through it.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import lzma
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

PEERS = ("trl==1.16.*", "cut-cross-entropy")
"""What benchmarks compare with, besides what the extra `gpu` brings."""

TESTS = ("pytest", "pytest-timeout", "hypothesis")

NOT_CARRIED = ("vllm",)
"""Of the extra `gpu`: larger than a transfer; `cut` takes it across."""

BUILT_HERE = ("deepspeed",)
"""Published as source only; without its compiled operators a wheel of it runs anywhere."""

HAVE = """
torch==2.11.0 triton==3.6.0 transformers==5.17.0 torchvision==0.26.0 accelerate==1.15.0 peft==0.21.2 numpy==2.5.2
safetensors==0.8.0 tokenizers==0.23.2 huggingface-hub==1.33.0 pandas==3.1.1 pyarrow==26.0.1 pillow==13.0.0 scipy==1.18.1
scikit-learn==1.9.1 matplotlib==3.11.2 tensorboard jinja2 psutil ninja pyyaml rich tqdm requests filelock packaging
fsspec==2026.9.0 regex sympy networkx mpmath markupsafe typing-extensions httpx einops msgpack pytest pytest-timeout
hypothesis setuptools aiohttp certifi urllib3 idna charset-normalizer click protobuf
"""
"""A machine with an image of PyTorch 2.11 and transformers on it, where nothing better is known."""

_MANYLINUX = ("manylinux_2_34", "manylinux_2_31", "manylinux_2_28", "manylinux_2_24", "manylinux_2_17", "manylinux2014")


# Gathering


def wanted() -> list[str]:
    """Requirements of training and of the benchmarks on a GPU, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    own = [*project["dependencies"], *project["optional-dependencies"]["gpu"]]
    return [r for r in own if _name(r) not in NOT_CARRIED] + [*PEERS, *TESTS]


def _name(requirement: str) -> str:
    """A requirement's package, in the spelling that compares."""
    name = re.match(r"[\w.-]+", requirement.strip())
    if not name:
        sys.exit(f"--want {requirement!r}: begins with no package's name")
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def installed(text: str) -> dict[str, str | None]:
    """Version by package, None where it is not told, from `pip list`, `pip freeze` or plain names."""
    found: dict[str, str | None] = {}
    for line in text.replace(",", "\n").splitlines():
        match = re.match(r"\s*([A-Za-z][\w.-]*)(?:\s*==\s*|\s+)?(\d[\w.!]*)?", line)
        if match and match[1] != "Package":
            found[_name(match[1])] = match[2]
    return found


def stand_in(folder: Path, name: str, version: str) -> str:
    """Write a wheel that stands for a package which is there already: no content and no dependencies. Its local
    version label marks it, and keeps an index's package of the same version apart. Returns the pinned version."""
    version = f"{version}+there"
    stem = f"{name.replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        info = f"{stem}.dist-info"
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return version


def _pip(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    done = subprocess.run(command, text=True, capture_output=True, **options)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("WARNING")]
        sys.exit(f"pip {arguments[0]} failed:\n" + "\n".join(said)[-3000:])
    return done


def for_machine(python: str) -> list[str]:
    """pip's options for wheels of an x86-64 Linux machine with this Python."""
    platforms = [option for name in _MANYLINUX for option in ("--platform", f"{name}_x86_64")]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]


def resolve(requirements: list[str], have: dict[str, str | None], python: str, built: Path) -> list[str]:
    """`name==version` of everything that the requirements need and the machine lacks, by pip's own resolver.

    Args:
        have: from `installed`. A package without a version is taken to fit.
        built: folder of wheels to prefer, from `build`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pins = [f"{name}=={stand_in(folder, name, version)}" for name, version in have.items() if version]
        (folder / "pins.txt").write_text("\n".join(pins))
        links = ["--find-links", str(folder), "--find-links", str(built)]
        report = ["--dry-run", "--report", str(folder / "report.json"), "--target", str(folder / "target")]
        _pip("install", *report, *links, "-c", str(folder / "pins.txt"), *for_machine(python), *requirements)
        found = json.loads((folder / "report.json").read_text())["install"]
    chosen = [(item["metadata"]["name"], item["metadata"]["version"]) for item in found]
    return sorted(f"{_name(name)}=={version}" for name, version in chosen if _name(name) not in have)


def build(folder: Path, requirements: list[str]) -> None:
    """Make wheels of those that are BUILT_HERE; needs setuptools and torch beside this program."""
    for requirement in requirements:
        if _name(requirement) in BUILT_HERE:
            options = ["--no-deps", "--no-build-isolation", "--no-binary", _name(requirement), "-w", str(folder)]
            _pip("wheel", *options, requirement, env=os.environ | {"DS_BUILD_OPS": "0"})


def gather(folder: Path, requirements: list[str], have: dict[str, str | None], python: str, limit: float) -> list[Path]:
    """Download what the requirements need and the machine lacks into folder/1, folder/2, ..., of at most `limit` MiB
    each, and return those.

    Raises:
        SystemExit: pip finds no versions that fit what is there, or one wheel is above the limit.
    """
    with tempfile.TemporaryDirectory() as scratch:
        built, wheels = Path(scratch) / "built", Path(scratch) / "wheels"
        built.mkdir()
        build(built, requirements)
        lacking = resolve(requirements, have, python, built)
        if lacking:
            options = ["--no-deps", "--find-links", str(built), "-d", str(wheels)]
            _pip("download", *options, *for_machine(python), *lacking)
        return share_out(list(wheels.glob("*.whl")), folder, limit)


def share_out(wheels: list[Path], folder: Path, limit: float) -> list[Path]:
    """Move wheels into as few numbered folders of at most `limit` MiB as first fit takes, the largest first."""
    loads: list[int] = []
    for wheel in sorted(wheels, key=lambda file: (-file.stat().st_size, file.name)):
        size = wheel.stat().st_size
        if size > limit * MIB:
            sys.exit(f"{wheel.name} has {size / MIB:.0f} MiB, more than --limit {limit:g}: take it across with `cut`")
        place = next((i for i, load in enumerate(loads) if load + size <= limit * MIB), len(loads))
        loads += [0] * (place == len(loads))
        loads[place] += size
        (folder / str(place + 1)).mkdir(parents=True, exist_ok=True)
        shutil.move(wheel, folder / str(place + 1) / wheel.name)
    return [folder / str(number + 1) for number in range(len(loads))]


# Cutting and joining


class Parts:
    """A file to write to that is a row of files of at most `limit` bytes, with a checksum each."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.made: list[dict[str, str | int]] = []
        self._file: BinaryIO | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data)
        while view:
            if self._file is None:
                self._file = (self.folder / f"part{len(self.made) + 1:02}").open("wb")
                self._digest, self._size = hashlib.sha256(), 0
            piece = view[: self.limit - self._size]
            self._file.write(piece)
            self._digest.update(piece)
            self._size += len(piece)
            view = view[len(piece) :]
            if self._size == self.limit:
                self.close()
        return len(data)

    def close(self) -> None:
        """End the part that is being written."""
        if self._file:
            self._file.close()
            name = Path(self._file.name).name
            self.made.append({"file": name, "bytes": self._size, "sha256": self._digest.hexdigest()})
            self._file = None


def cut(wheel: Path, folder: Path, without: list[str], limit: float) -> list[Path]:
    """Pack a wheel's files, less those that match a pattern, as xz and cut them into parts of at most `limit` MiB.

    Returns:
        The parts; beside them lies `parts.json` with their checksums, which `join` reads.
    """
    parts = Parts(folder, int(limit * MIB))
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
    left_out = []
    with zipfile.ZipFile(wheel) as archive:
        if elsewhere := [name for name in archive.namelist() if re.match(r"[^/]+\.data/(purelib|platlib)/", name)]:
            sys.exit(f"{wheel.name}: {elsewhere[0]} belongs elsewhere than it lies, which only pip's installation does")
        folder.mkdir(parents=True, exist_ok=True)
        with lzma.LZMAFile(parts, "w", filters=filters) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
            for member in archive.infolist():
                if any(fnmatch.fnmatch(member.filename, pattern) for pattern in without):
                    left_out.append(member.filename)
                elif not member.is_dir():
                    entry = tarfile.TarInfo(member.filename)
                    entry.size = member.file_size
                    entry.mode = (member.external_attr >> 16) & 0o777 or 0o644
                    with archive.open(member) as content:
                        tar.addfile(entry, content)
        parts.close()
    about = {"wheel": wheel.name, "left_out": left_out, "parts": parts.made}
    (folder / "parts.json").write_text(json.dumps(about, indent=2) + "\n")
    return [folder / str(part["file"]) for part in parts.made]


class Joined:
    """The parts as one file to read from, each checked as it is read."""

    def __init__(self, folder: Path, parts: list[dict]) -> None:
        self._chunks = self._read(folder, parts)
        self._rest = b""

    def _read(self, folder: Path, parts: list[dict]) -> Iterator[bytes]:
        for part in parts:
            with (folder / part["file"]).open("rb") as file:
                while chunk := file.read(MIB):
                    yield chunk

    def read(self, size: int = -1) -> bytes:
        while size < 0 or len(self._rest) < size:
            chunk = next(self._chunks, None)
            if chunk is None:
                break
            self._rest += chunk
        taken, self._rest = (self._rest, b"") if size < 0 else (self._rest[:size], self._rest[size:])
        return taken


def join(folder: Path, target: Path) -> int:
    """Unpack what `cut` made into a folder for PYTHONPATH. Returns the number of files.

    Raises:
        SystemExit: a part is missing or was damaged on the way; nothing has been unpacked then.
    """
    about = json.loads((folder / "parts.json").read_text())
    for part in about["parts"]:
        file = folder / part["file"]
        if not file.exists():
            sys.exit(f"{file.name} of {about['wheel']} is missing; {len(about['parts'])} parts belong together")
        with file.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != part["sha256"]:
            sys.exit(f"{file.name} of {about['wheel']} was damaged on the way: its checksum differs; bring it again")
    count = 0
    with lzma.LZMAFile(Joined(folder, about["parts"])) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
        for entry in tar:
            tar.extract(entry, target, filter="data")
            count += 1
    return count


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.air_gapped",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("gather", help="download what a machine lacks").add_argument
    add("folder", type=Path)
    add("--have", type=Path, help="the machine's `pip list` (default: an image with PyTorch 2.11 and transformers)")
    add("--want", nargs="+", metavar="NAME", help="requirements (default: those of training and of the benchmarks)")
    add("--python", default="3.12", help="the machine's (default: %(default)s)")
    add("--limit", type=mebibytes, default=60, help="MiB of a transfer (default: %(default)s)")
    add = commands.add_parser("cut", help="pack a large wheel and cut it into parts").add_argument
    add("wheel", type=Path)
    add("folder", type=Path)
    add("--without", nargs="+", default=[], metavar="PATTERN", help="files of the wheel to leave out")
    add("--limit", type=mebibytes, default=60, help="MiB of a part (default: %(default)s)")
    add = commands.add_parser("join", help="put the parts together again").add_argument
    add("folder", type=Path)
    add("target", type=Path, help="folder for PYTHONPATH")
    options = parser.parse_args(arguments)
    if options.command != "join" and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"{options.folder} is not empty: what lies there would be carried along; name a new folder")
    try:
        carry(options)
    except (OSError, zipfile.BadZipFile) as error:
        parser.error(str(error))


def mebibytes(text: str) -> float:
    """A limit from the command line: finite, and at least a thousandth of a MiB, or there would be no end of parts."""
    value = float(text)
    if not 0.001 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: must be from 0.001 on")
    return value


def carry(options: argparse.Namespace) -> None:
    """Do what the command line asks for."""
    if options.command == "join":
        print(f"{join(options.folder, options.target):,} files in {options.target}")
        return
    if options.command == "cut":
        made = cut(options.wheel, options.folder, options.without, options.limit)
    else:
        have = installed(options.have.read_text() if options.have else "\n".join(HAVE.split()))
        made = gather(options.folder, options.want or wanted(), have, options.python, options.limit)
        if not made:
            print("nothing is lacking")
    for path in made:
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
        print(f"{path}  {size / MIB:.1f} MiB")


if __name__ == "__main__":
    main()
