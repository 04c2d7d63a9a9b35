"""Images inside a .zip or .tar, read where they lie: `images.zip/a/1.png` is the member `a/1.png` of `images.zip`.

A path that leads through an archive is a reference like any other: a text, cheap to pickle and to compare, which every
process opens for itself. Nothing is unpacked, so no member can land anywhere; members whose names point out of the
archive are not listed at all.
"""

from __future__ import annotations

import functools
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import BinaryIO

_THROUGH = re.compile(r"\.(?:zip|tar)/", re.IGNORECASE)


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
    return _name(member) in _members(archive)


def open_member(archive: str, member: str, most_bytes: int) -> BinaryIO:
    """The member's content, whole in memory. Any number of threads and processes may read at once.

    Args:
        archive: path of a .zip or an uncompressed .tar.
        member: its name in there.
        most_bytes: a member that claims more is not read, however little space it takes.

    Raises:
        ValueError: an archive that cannot be read, no such member, or a member that is too long.
    """
    size, read = _members(archive).get(_name(member), (0, None))
    if read is None:
        raise ValueError(f"{archive} has no file {member}")
    if size > most_bytes:
        raise ValueError(f"{size} bytes are too many")
    return io.BytesIO(read(size))


# What an archive holds: names to sizes in bytes, and what reads so many.
Members = dict[str, tuple[int, Callable[[int], bytes]]]


def _members(path: str) -> Members:
    status = os.stat(path)
    read = _of_zip if path.lower().endswith(".zip") else _of_tar
    return read(path, status.st_size, status.st_mtime_ns, os.getpid())  # no child shares its parent's place in the file


@functools.cache
def _of_zip(path: str, *_version: int) -> Members:
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is not a readable .zip ({error})") from error

    def read(info: zipfile.ZipInfo, size: int) -> bytes:
        with archive.open(info) as file:  # ZipFile locks its seeks and reads; checks the sum of what it gives
            return file.read(size)

    infos = (info for info in archive.infolist() if not info.is_dir())
    return {name: (i.file_size, functools.partial(read, i)) for i in infos if (name := _name(i.filename))}


@functools.cache
def _of_tar(path: str, *_version: int) -> Members:
    try:
        with tarfile.open(path, "r:") as archive:
            places = {name: (m.size, m.offset_data) for m in archive if m.isreg() and (name := _name(m.name))}
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{path} is not a readable uncompressed .tar ({error}); a .zip may be compressed") from error
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return {name: (size, lambda n, start=start: os.pread(file, n, start)) for name, (size, start) in places.items()}


def _name(member: str) -> str:
    """`./a//b.png` as `a/b.png`; "" for a name that leads out of the archive."""
    parts = [part for part in PurePosixPath(member.replace("\\", "/")).parts if part != "."]
    return "" if not parts or ".." in parts or parts[0].startswith("/") else "/".join(parts)
