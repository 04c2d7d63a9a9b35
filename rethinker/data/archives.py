"""Images inside a .zip or .tar, read where they lie: `images.zip/a/1.png` is the member `a/1.png` of `images.zip`.

A path that leads through an archive is a reference like any other: a text, cheap to pickle and to compare, which every
process opens for itself. Nothing is unpacked, so no member can land anywhere; members whose names point out of the
archive are not listed at all.
"""

from __future__ import annotations

import functools
import io
import os
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from typing import BinaryIO

from rethinker.config import ConfigError

_THROUGH = re.compile(r"\.(?:zip|tar)/", re.IGNORECASE)


def split_archive(path: str) -> tuple[str, str] | None:
    """(archive, member) of a path that leads through an archive; None for any other."""
    for found in _THROUGH.finditer(path):
        if os.path.isfile(path[: found.end() - 1]):
            return path[: found.end() - 1], path[found.end() :]
    return None


def in_archive(path: str) -> bool:
    """Whether a path leads through an archive to a file in it; raises ConfigError if the archive cannot be read."""
    archived = split_archive(path)
    return archived is not None and _name(archived[1]) in _members(archived[0])


def open_member(archive: str, member: str, most_bytes: int) -> BinaryIO:
    """The member's content, whole in memory. Any number of threads and processes may read at once.

    Args:
        archive: path of a .zip or an uncompressed .tar.
        member: its name in there.
        most_bytes: a member that claims more is not read, however little space it takes.

    Raises:
        ConfigError: an archive that cannot be read.
        ValueError: no such member, or a member that is too long.
    """
    size, read = _members(archive).get(_name(member), (0, None))
    if read is None:
        raise ValueError(f"{archive} has no file {member}")
    if size > most_bytes:
        raise ValueError(f"{size} bytes are too many")
    return io.BytesIO(read())


# What an archive holds: of each file its size in bytes, and what reads it.
Members = dict[str, tuple[int, Callable[[], bytes]]]


def _members(path: str) -> Members:
    status = os.stat(path)
    return _listed(path, status.st_size, status.st_mtime_ns, os.getpid())  # no child shares its parent's place in it


@functools.cache
def _listed(path: str, *_version: int) -> Members:
    zipped = path.lower().endswith(".zip")
    try:
        if zipped:
            archive = zipfile.ZipFile(path)  # locks its seeks and reads, and checks the sum of what it gives
            files = {i.filename: (i.file_size, partial(archive.read, i)) for i in archive.infolist() if not i.is_dir()}
        else:
            with tarfile.open(path, "r:") as listed:
                places = [(m.name, m.size, m.offset_data) for m in listed if m.isreg()]
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            files = {name: (size, partial(os.pread, file, size, start)) for name, size, start in places}
    except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
        kind = ".zip" if zipped else "uncompressed .tar"
        raise ConfigError(f"data: {path} is not a readable {kind} ({error}); a .zip may be compressed") from error
    return {name: file for member, file in files.items() if (name := _name(member))}


def _name(member: str) -> str:
    """`./a//b.png` as `a/b.png`; "" for a name that leads out of the archive."""
    name = posixpath.normpath(member.replace("\\", "/"))
    return "" if name.split("/")[0] in ("", ".", "..") else name
