"""Images that a data set holds as bytes: the first 64 MiB stay in memory, the others wait in a file for their turn.

All questions are read once and held (39,000 of them take 50 MB), and their images are read when their turn comes. With
`data.streaming` images stay in the rows, and only a window of these is held.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from rethinker.config import ConfigError
from rethinker.runtime.files import whole_file

IN_MEMORY_BYTES = 64 * 2**20

_CACHED = re.compile(r"embedded-[0-9a-f]{16}\.zip")


def cache_folder() -> Path:
    """Where files lie that can be made again: `$RETHINKER_CACHE`, else `~/.cache/rethinker`."""
    return Path(os.environ.get("RETHINKER_CACHE") or Path.home() / ".cache" / "rethinker")


def content_name(content: bytes) -> str:
    """The name of an image by its bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def in_its_row(content: bytes) -> dict[str, Any]:
    """A reference to a stream's image, which goes with its row. It has a name: as keys of a cache, bytes would stay."""
    return {"bytes": content, "name": content_name(content)}


class EmbeddedImages:
    """Takes a data set's embedded images one by one and gives references; equal images have one place.

    What does not stay in memory goes to `embedded-*.zip` (uncompressed, see `archives`) in the `cache_folder`. It is
    written once, by whichever rank comes first, found again by every later run on the same data, and may be deleted
    whenever no run uses it.

    Args:
        identity: names the data set and its version, such as path, size and time of change.
    """

    def __init__(self, identity: str) -> None:
        name = hashlib.sha256(f"{identity} {IN_MEMORY_BYTES}".encode()).hexdigest()[:16]
        self.path = cache_folder() / f"embedded-{name}.zip"
        self._references: dict[str, Any] = {}
        self._held = 0
        self._file: zipfile.ZipFile | None = None
        self._stack: contextlib.ExitStack | None = None

    def keep(self, content: bytes) -> Any:
        """A reference to the image: `{"bytes"}`, or a path into the archive.

        Raises:
            ConfigError: the cache cannot be written.
        """
        name = content_name(content)
        if name not in self._references:
            if self._held + len(content) <= IN_MEMORY_BYTES:
                self._held += len(content)
                self._references[name] = {"bytes": content}
            else:
                self._write(name, content)
                self._references[name] = f"{self.path}/{name}"
        return self._references[name]

    def __enter__(self) -> EmbeddedImages:
        return self

    def __exit__(self, *failed: Any) -> None:
        """Finish the file; one that was not finished is not there."""
        if self._stack is not None:
            self._stack.__exit__(*failed)

    def _write(self, name: str, content: bytes) -> None:
        from filelock import FileLock

        try:
            if self._stack is None:
                self._stack = contextlib.ExitStack()
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._stack.enter_context(FileLock(f"{self.path}.lock"))
                if not self.path.is_file():
                    partial = self._stack.enter_context(whole_file(self.path))
                    self._file = self._stack.enter_context(zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED))
            if self._file is not None:
                self._file.writestr(name, content)
        except OSError as error:
            raise ConfigError(
                f"RETHINKER_CACHE={self.path.parent}: images embedded in the data cannot be kept there ({error}); set "
                "RETHINKER_CACHE to a folder with room for all of them"
            ) from error


def archive_of_embedded(reference: Any) -> tuple[str, str] | None:
    """(archive, member) of an image that a data set holds as bytes and that waits in the cache; None for any other."""
    archive, slash, name = os.fspath(reference).rpartition("/") if isinstance(reference, str) else ("", "", "")
    return (archive, name) if slash and _CACHED.fullmatch(os.path.basename(archive)) else None
