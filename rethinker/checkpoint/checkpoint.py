"""Checkpoints of a run: written beside the training, whole or not there, and the newest whole one found again.

checkpoints/
  step_000040/           a model folder in Hugging Face format, and
    trainer/run.*        the run's state: counters, data order, replay, log position, settings, versions
    trainer/rank_00000.* each rank's: its responses and random streams; optimizer_00000.*: its part of the optimizer,
                         reference_00000.*: of a reference policy that moves
    COMPLETE             written last: size and SHA-256 of every file
  last -> step_000040    the newest one
  best -> best_000024    the model with the best validation accuracy; without one, as last
  model_000060/          the model alone, where a checkpoint could not be written; the next whole one removes it

Every rank writes its own files, so all need to see the same folder. What is being written stands in `.<name>.partial`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rethinker.config import CheckpointConfig, ConfigError, one_line
from rethinker.runtime.distributed import Ranks
from rethinker.runtime.files import whole_file

log = logging.getLogger(__name__)

MARKER = "COMPLETE"
PEERS_S = 1800.0  # how long rank 0 waits for the other ranks' files

Write = Callable[[Path], None]


class Checkpoints:
    """Writes and finds the checkpoints of one run; at most one is being written at a time.

    `failed` counts those that could not be written: the run goes on, and says so.
    """

    def __init__(self, folder: Path, ranks: Ranks, config: CheckpointConfig) -> None:
        """Every rank calls it, with the folder runs/<name>/checkpoints that rank 0 has made.

        Raises:
            ConfigError: some rank does not see the folder.
        """
        ranks.gather(None)  # rank 0 is here: it has made the folder
        blind = [rank for rank, sees in enumerate(ranks.gather(folder.is_dir())) if not sees]
        if blind:
            raise ConfigError(f"run.dir: rank {blind[0]} does not see {folder}; choose a folder that all ranks share")
        self.folder, self.failed = folder, 0
        self._ranks, self._config = ranks, config
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def rehearse(self, write_files: Write, write_state: Write, size: int) -> None:
        """Write what stands beside the weights of a checkpoint and its optimizer, as `save` does, and remove it again.

        Every rank calls it before the first step.

        Args:
            write_files, write_state: as of `save`, without the large parts.
            size: of a whole checkpoint, in bytes.

        Raises:
            ConfigError: on every rank, if one of them cannot write, or the disk has no room for one checkpoint.
        """
        partial = self.folder / ".rehearsal.partial"
        fault = self._write_own(partial, self._parts(write_files, write_state))[1]
        free = shutil.disk_usage(self.folder).free
        if fault is None and free < size:
            fault = f"a checkpoint takes {size / 2**30:.2f} GB and {free / 2**30:.2f} GB of the disk are free"
        faults = self._ranks.gather(fault)
        if self._ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        for rank, fault in enumerate(faults):
            if fault:
                raise ConfigError(
                    f"run.dir: no checkpoint can be written in {self.folder} (rank {rank}: {fault}); free some space, "
                    "or choose another run.dir"
                )

    def save(self, step: int, write_model: Write, write_state: Write) -> None:
        """Start writing step_<step>, when the one before is done. Every rank calls it.

        On rank 0 `write_model` writes the model into a folder, and on each `write_state` the rank's state into its
        trainer/. Both are called in a thread, so they must hold copies of what training changes. If the checkpoint
        cannot be written, `write_model` is called again, to keep the model alone.
        """
        write = self._parts(write_model, write_state)
        self._start(f"step_{step:06d}", "last", write, self._ranks.world_size, write_model)

    def save_best(self, step: int, write_model: Write) -> None:
        """Start writing the model alone, as the best so far. Every rank may call it; rank 0 writes."""
        if self._ranks.is_main:
            self._start(f"best_{step:06d}", "best", write_model, 1, None)

    def settle_best(self, improved: bool) -> None:
        """The last checkpoint is the best, unless a model has `improved` on the first one and is there."""
        if self._ranks.is_main and not (improved and (self.folder / "best").exists()):
            _link(self.folder / "best", os.readlink(self.folder / "last"))

    def wait(self) -> None:
        """Until what is being written is there.

        Raises:
            ConfigError: the last one could not be written.
        """
        self.close()
        if self._error:
            raise ConfigError(self._error)

    def close(self) -> None:
        """Let what is being written come to its end."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def find(self, resume: str) -> Path | None:
        """The checkpoint that `resume` names; for `auto` the newest whole one, or None. Every rank calls it.

        Each rank reads its share of the files to compare their checksums. Leftovers of a killed run are removed, and
        with a named checkpoint later ones are set aside as abandoned_step_*.

        Raises:
            ConfigError: there is no such checkpoint, or it is damaged.
        """
        names = self._ranks.broadcast(self._candidates() if self._ranks.is_main else None)
        if resume == "auto":
            for name in names:
                if not (problem := self._problem(name)):
                    return self.folder / name
                if self._ranks.is_main:
                    log.warning("resume=auto: checkpoint %s is skipped: %s", name, problem)
            if names:
                raise ConfigError(
                    f"resume=auto: none of the checkpoints in {self.folder} is whole ({names[-1]}: {problem}); restore "
                    "one, or start a new run with another run.name"
                )
            return None
        name = Path(resume).name
        if name not in names:
            there = ", ".join(reversed(names)) or "none"
            raise ConfigError(f"resume={resume}: {self.folder} has no such checkpoint; it has {there}; or use auto")
        if problem := self._problem(name):
            raise ConfigError(f"resume={resume}: {problem}; choose another one, or auto")
        if self._ranks.is_main:
            for later in names[: names.index(name)]:
                _replace(self.folder / later, self.folder / f"abandoned_{later}")
            _link(self.folder / "last", name)
        return self.folder / name

    def _candidates(self) -> list[str]:
        """Names of the checkpoints that are marked complete, newest first; what a killed run left half-written goes."""
        for leftover in self.folder.glob(".*.partial"):
            shutil.rmtree(leftover)
        steps = sorted((path for path in self.folder.glob("step_*") if path.name[5:].isdecimal()), reverse=True)
        for unfinished in (path for path in steps if not (path / MARKER).is_file()):
            log.warning("checkpoint %s was never finished; skipped", unfinished.name)
        return [path.name for path in steps if (path / MARKER).is_file()]

    def _problem(self, name: str) -> str | None:
        """What is wrong with a checkpoint's files, the same on every rank; None if they are as they were written."""
        folder = self.folder / name
        try:
            files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
            share = sorted(files)[self._ranks.rank :: self._ranks.world_size]
            wrong = (path for path in share if _secured(folder / path) != files[path])
            mine = next((f"{path} is not as it was written" for path in wrong), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            mine = f"it cannot be read: {one_line(error)}"
        return next(filter(None, self._ranks.gather(mine)), None)

    def _parts(self, write_model: Write, write_state: Write) -> Write:
        """This rank's parts of a checkpoint in one."""

        def write(folder: Path) -> None:
            if self._ranks.is_main:
                write_model(folder)
            (folder / "trainer").mkdir(exist_ok=True)
            write_state(folder / "trainer")

        return write

    def _start(self, name: str, link: str, write: Write, writers: int, model: Write | None) -> None:
        self.close()
        arguments = (name, link, write, writers, model)
        self._thread = threading.Thread(target=self._write, args=arguments, name=f"write {name}")
        self._thread.start()

    def _write(self, name: str, link: str, write: Write, writers: int, model: Write | None) -> None:
        partial, rank = self.folder / f".{name}.partial", self._ranks.rank
        files, error = self._write_own(partial, write)
        try:
            _write_json(partial / f".rank_{rank:05d}", {"files": files, "error": error})
            if self._ranks.is_main:
                self._publish(name, link, partial, writers)
            self._error = None
        except Exception as problem:
            self.failed += 1
            self._error = f"checkpoint {name} could not be written in {self.folder}: {problem}"
            if self._ranks.is_main:
                shutil.rmtree(partial, ignore_errors=True)
                self._error += self._keep_model(name.replace("step", "model"), model) if model else ""
            log.warning("%s; training goes on", self._error)

    def _write_own(self, partial: Path, write: Write) -> tuple[dict[str, list[Any]], str | None]:
        """Write this rank's files: their names, sizes and checksums; or none of them and what is wrong."""

        def own() -> list[Path]:
            return [p for p in partial.rglob("*") if p.is_file() and _writer(p) == self._ranks.rank]

        try:
            partial.mkdir(exist_ok=True)
            write(partial)
            return {str(path.relative_to(partial)): _secured(path) for path in own()}, None
        except Exception as problem:  # a full disk, a lost mount, whatever a library raises
            with suppress(OSError):
                for path in own():  # or a full disk would not even take the note to rank 0
                    path.unlink()
            return {}, one_line(problem)

    def _keep_model(self, name: str, write: Write) -> str:
        """Write the model alone, which takes a fraction of a checkpoint. Returns what to add to the error."""
        partial = self.folder / f".{name}.partial"
        error = self._write_own(partial, write)[1]
        older = sum(path.stat().st_size for path in self.folder.glob("model_*/*"))
        if error and shutil.disk_usage(self.folder).free < older:  # the newest one is to have that one's room
            self._remove_models()
            error = self._write_own(partial, write)[1]
        if error is None:
            with suppress(OSError):
                _replace(partial, self.folder / name)
                _sync_folder(self.folder)
                self._remove_models(but=name)
                return f"; its model alone is in {name}"
        shutil.rmtree(partial, ignore_errors=True)
        return f"; nor its model alone: {error or 'its folder cannot be named'}"

    def _remove_models(self, but: str = "") -> None:
        for path in self.folder.glob("model_*"):
            if path.name != but:
                _remove(path)

    def _publish(self, name: str, link: str, partial: Path, writers: int) -> None:
        """Give the folder its name, once every rank's files are on the disk, then mark it, then drop old ones."""
        files: dict[str, list[Any]] = {}
        errors = []
        end = time.monotonic() + PEERS_S
        for rank in range(writers):
            note = partial / f".rank_{rank:05d}"
            while not note.is_file():
                if time.monotonic() > end:
                    raise TimeoutError(f"nothing from rank {rank} in {PEERS_S:g} s")
                time.sleep(0.02)
            written = json.loads(note.read_text(encoding="utf-8"))
            files |= written["files"]
            errors += [f"rank {rank}: {written['error']}"] * (written["error"] is not None)
            note.unlink()
        if errors:
            raise OSError("; ".join(errors))
        for folder in {partial, *(partial / path for path in files)}:
            _sync_folder(folder if folder.is_dir() else folder.parent)
        _replace(partial, self.folder / name)
        _sync_folder(self.folder)
        _write_json(self.folder / name / MARKER, {"files": files})
        _sync_folder(self.folder / name)
        _link(self.folder / link, name)
        best = self.folder / "best"
        if link == "last" and best.is_symlink() and os.readlink(best).startswith("step_"):
            _link(best, name)  # as `settle_best` left it, of a run that has gone on since
        if link == "last":
            self._remove_models()
        self._prune()

    def _prune(self) -> None:
        """Remove all but the newest `checkpoint.keep` steps, those of `checkpoint.keep_every`, and the best."""
        every, best = self._config.keep_every, self.folder / "best"
        steps = sorted(path for path in self.folder.glob("step_*") if (path / MARKER).is_file())
        for path in steps[: -self._config.keep]:
            if not every or int(path.name.removeprefix("step_")) % every:
                _remove(path)
        for path in self.folder.glob("best_*"):
            if best.exists() and path.name != os.readlink(best):
                _remove(path)


def _writer(path: Path) -> int | None:
    """The rank that writes a file: its own state, rank 0 all others; None for hidden ones: the ranks' notes to rank 0,
    and what safetensors has under way, on whichever rank."""
    if path.name.startswith("."):
        return None
    own = re.search(r"_(\d{5})\.", path.name) if path.parent.name == "trainer" else None
    return int(own[1]) if own else 0


def _secured(path: Path) -> list[Any]:
    """Size and SHA-256 of a file whose content is on the disk now."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _write_json(path: Path, content: Any) -> None:
    """Whole or not at all, and on the disk."""
    with whole_file(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(source: Path, target: Path) -> None:
    """Rename a folder; one that has the name already goes."""
    if target.exists():
        _remove(target)
    source.rename(target)


def _remove(folder: Path) -> None:
    """Delete a checkpoint so that it never looks complete meanwhile."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _link(link: Path, name: str) -> None:
    """Point a link at a checkpoint, at once."""
    new = link.with_name(f".{link.name}.link")
    new.unlink(missing_ok=True)
    new.symlink_to(name)
    new.replace(link)
