"""Images inside a .zip or .tar, read where they lie: `images.zip/a/1.png` is the member `a/1.png` of `images.zip`.

A path that leads through an archive is a reference like any other: a text, cheap to pickle and to compare, which every
process opens for itself. Nothing is unpacked, so no member can land anywhere; members whose names point out of the
archive are not listed at all.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import threading
import zipfile
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

_THROUGH = re.compile(r"\.(?:zip|tar)/", re.IGNORECASE)


@dataclass
class _Archive:
    """An open archive: where each member lies."""

    file: zipfile.ZipFile | BinaryIO
    members: dict[str, Any]
    """Name to ZipInfo, or of a .tar to (offset, bytes)."""


_lock = threading.Lock()
# By path, size, time of change, and process: a child process does not share its parent's place in the file.
_opened: dict[tuple[str, int, int, int], _Archive] = {}


def split_archive(path: str) -> tuple[str, str] | None:
    """(archive, member) of a path that leads through an archive; None for any other."""
    for found in _THROUGH.finditer(path):
        if os.path.isfile(path[: found.end() - 1]):
            return path[: found.end() - 1], path[found.end() :]
    return None


def has_member(archive: str, member: str) -> bool:
    """Whether the archive holds this file.

    Raises:
        ValueError: the archive cannot be read.
    """
    return _name(member) in _open(archive).members


def open_member(archive: str, member: str, most_bytes: int) -> BinaryIO:
    """The member's content, whole in memory. Any number of threads and processes may read at once.

    Args:
        archive: path of a .zip or an uncompressed .tar.
        member: its name in there.
        most_bytes: a member that claims more is not read, however little space it takes.

    Raises:
        ValueError: an archive that cannot be read, no such member, or a member that is too long.
    """
    opened = _open(archive)
    place = opened.members.get(_name(member))
    if place is None:
        raise ValueError(f"{archive} has no file {member}")
    size = place.file_size if isinstance(place, zipfile.ZipInfo) else place[1]
    if size > most_bytes:
        raise ValueError(f"{size} bytes are too many")
    if isinstance(place, zipfile.ZipInfo):
        with opened.file.open(place) as file:  # ZipFile locks its seeks and reads; checks the sum of what it gives
            return io.BytesIO(file.read(most_bytes))
    return io.BytesIO(os.pread(opened.file.fileno(), size, place[0]))


def _open(path: str) -> _Archive:
    status = os.stat(path)
    key = (path, status.st_size, status.st_mtime_ns, os.getpid())
    with _lock:
        if key not in _opened:
            _opened[key] = _read_zip(path) if path.lower().endswith(".zip") else _read_tar(path)
        return _opened[key]


def _read_zip(path: str) -> _Archive:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not a readable .zip ({error})") from error
    infos = (info for info in archive.infolist() if not info.is_dir())
    return _Archive(archive, {name: info for info in infos if (name := _name(info.filename))})


def _read_tar(path: str) -> _Archive:
    try:
        with tarfile.open(path, "r:") as archive:
            members = {name: (m.offset_data, m.size) for m in archive if m.isreg() and (name := _name(m.name))}
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} is not a readable uncompressed .tar ({error}); a .zip may be compressed") from error
    return _Archive(open(path, "rb"), members)


def _name(member: str) -> str:
    """`./a//b.png` as `a/b.png`; "" for a name that leads out of the archive."""
    parts = [part for part in PurePosixPath(member.replace("\\", "/")).parts if part != "."]
    return "" if not parts or ".." in parts or parts[0].startswith("/") else "/".join(parts)
