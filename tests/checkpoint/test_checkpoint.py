"""Checkpoints on the disk: whole or not there, found again, damaged ones named, old ones gone."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rethinker.checkpoint import checkpoint
from rethinker.checkpoint.checkpoint import Checkpoints
from rethinker.config import CheckpointConfig, ConfigError
from rethinker.runtime.distributed import ALONE, Ranks


def checkpoints(folder: Path, **settings) -> Checkpoints:
    return Checkpoints(folder, ALONE, CheckpointConfig(**settings))


def model(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")


def state(folder: Path) -> None:
    (folder / "run.json").write_text("{}")
    (folder / "rank_00000.json").write_text("{}")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_found_again(tmp_path):
    """Model beside trainer/, every file with its size and checksum in COMPLETE; last points to the newest."""
    written = checkpoints(tmp_path)
    written.save(20, model, state)
    written.save(40, model, state)
    written.wait()
    assert names(tmp_path) == ["last", "step_000020", "step_000040"]
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == b"weights"
    files = json.loads((tmp_path / "step_000040" / "COMPLETE").read_text())["files"]
    assert set(files) == {"config.json", "model.safetensors", "trainer/run.json", "trainer/rank_00000.json"}
    assert checkpoints(tmp_path).find("auto") == tmp_path / "step_000040"
    assert checkpoints(tmp_path / "..").find("auto") is None


def test_training_does_not_wait_for_the_disk(tmp_path):
    """save returns while the files are still being written; the next save, and wait, do wait."""
    may_write, order = threading.Event(), []

    def slow(folder: Path) -> None:
        assert may_write.wait(20)
        order.append("first")

    written = checkpoints(tmp_path)
    written.save(1, slow, state)
    assert names(tmp_path) in ([], [".step_000001.partial"])
    may_write.set()
    written.save(2, lambda folder: order.append("second"), state)
    written.wait()
    assert order == ["first", "second"] and names(tmp_path) == ["last", "step_000001", "step_000002"]


@pytest.mark.parametrize("stage", ["the model", "the state", "the rename", "the marker"])
def test_killed_while_writing(tmp_path, stage, monkeypatch):
    """Whatever was being written when the process died, the one before is found, and leftovers go."""
    written = checkpoints(tmp_path)
    written.save(1, model, state)
    written.wait()

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    if stage == "the rename":
        monkeypatch.setattr(checkpoint, "_replace", die)
    if stage == "the marker":
        real = checkpoint._write_json
        monkeypatch.setattr(
            checkpoint, "_write_json", lambda path, c: die() if path.name == "COMPLETE" else real(path, c)
        )
    written.save(2, die if stage == "the model" else model, die if stage == "the state" else state)
    written._thread.join()
    monkeypatch.undo()
    assert ".step_000002.partial" in names(tmp_path) or stage == "the marker"
    again = checkpoints(tmp_path)
    assert again.find("auto") == tmp_path / "step_000001"
    assert ".step_000002.partial" not in names(tmp_path)
    again.save(2, model, state)  # and its name is free
    again.wait()
    assert checkpoints(tmp_path).find("auto") == tmp_path / "step_000002"


@pytest.mark.parametrize("damage", ["missing", "short", "changed", "marker"])
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path, damage, caplog):
    """auto names what is wrong and takes the one before; asked for by name it is refused; alone it is an error."""
    written = checkpoints(tmp_path)
    for step in (1, 2):
        written.save(step, model, state)
    written.wait()
    victim = tmp_path / "step_000002" / ("COMPLETE" if damage == "marker" else "model.safetensors")
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes({"short": b"weigh", "changed": b"Weights", "marker": b"{"}[damage])
    assert checkpoints(tmp_path).find("auto") == tmp_path / "step_000001"
    assert "step_000002 is skipped" in caplog.text
    unlike = "model.safetensors is not as it was written"
    words = {
        "missing": "No such file .*model.safetensors",
        "short": unlike,
        "changed": unlike,
        "marker": "JSONDecodeError",
    }
    assert re.search(words[damage], caplog.text)
    with pytest.raises(ConfigError, match=f"resume=step_000002: .*{words[damage]}"):
        checkpoints(tmp_path).find("step_000002")
    (tmp_path / "step_000001" / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"resume=auto: none of the checkpoints .* is whole"):
        checkpoints(tmp_path).find("auto")


def test_going_back_to_a_named_one_keeps_the_later_ones_aside(tmp_path):
    """resume=step_000001 makes it the newest; what came later is renamed, never deleted, and auto does not see it."""
    written = checkpoints(tmp_path)
    for step in (1, 2):
        written.save(step, model, state)
    written.wait()
    assert checkpoints(tmp_path).find("step_000001") == tmp_path / "step_000001"
    assert names(tmp_path) == ["abandoned_step_000002", "last", "step_000001"]
    assert (tmp_path / "last").resolve().name == "step_000001"
    assert checkpoints(tmp_path).find("auto") == tmp_path / "step_000001"
    with pytest.raises(ConfigError, match="resume=step_000007: .*it has step_000001"):
        checkpoints(tmp_path).find("step_000007")


def test_which_ones_are_kept(tmp_path):
    """The newest `keep`, every multiple of `keep_every`, and the best model, which replaces the one before."""
    written = checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 8):
        written.save(step, model, state)
        if step in (2, 5):
            written.save_best(step, model)
    written.wait()
    assert names(tmp_path) == ["best", "best_000005", "last", "step_000004", "step_000006", "step_000007"]
    assert (tmp_path / "best" / "config.json").is_file() and not (tmp_path / "best" / "trainer").exists()


def test_without_a_better_model_the_last_is_the_best(tmp_path):
    """A later stage may name `best` whether or not one validated better; a better one then takes its place."""
    written = checkpoints(tmp_path)
    for step in (1, 2):
        written.save(step, model, state)
    written.wait()
    written.settle_best(improved=False)
    assert (tmp_path / "best").resolve().name == "step_000002"
    written.save(3, model, state)  # of a run that was resumed
    written.wait()
    assert (tmp_path / "best").resolve().name == "step_000003"
    written.save_best(4, model)
    written.save(5, model, state)
    written.wait()
    written.settle_best(improved=True)
    assert (tmp_path / "best").resolve().name == "best_000004"
    written.settle_best(improved=False)  # that model was of steps that a resumed run went back behind
    assert (tmp_path / "best").resolve().name == "step_000005"


def test_a_full_disk_is_counted_and_the_run_goes_on(tmp_path, caplog):
    """What cannot be written (here /dev/full: no space left) leaves nothing behind and is told; wait raises it."""

    def full(folder: Path) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"weights")

    written = checkpoints(tmp_path)
    written.save(1, model, state)
    written.save(2, full, state)
    written.save(3, model, state)
    written.wait()  # the last one is there
    assert written.failed == 1 and "step_000002 could not be written" in caplog.text
    assert "No space left on device" in caplog.text
    assert names(tmp_path) == ["last", "step_000001", "step_000003"]
    written.save(4, model, full)
    with pytest.raises(ConfigError, match="step_000004 could not be written.*No space left"):
        written.wait()


def test_a_rehearsal_leaves_nothing(tmp_path):
    """What stands beside the weights and the run's state are written where checkpoints are, and gone again."""
    written, seen = checkpoints(tmp_path), []
    written.rehearse(lambda folder: (model(folder), seen.append(folder)), state, size=1)
    assert seen[0].parent == tmp_path and names(tmp_path) == []
    written.save(1, model, state)
    written.wait()


@pytest.mark.parametrize("part", ["the files", "the state", "the disk", "another rank"])
def test_a_rehearsal_tells_every_rank(tmp_path, part, monkeypatch):
    """Whichever rank cannot write, or has no room for a checkpoint, all ranks end with that in one line."""

    def fails(folder: Path) -> None:
        raise OSError(28, "No space left on device", str(folder))

    size = 2**60 if part == "the disk" else 1
    faults = [None, "OSError: full"] if part == "another rank" else None
    monkeypatch.setattr(Ranks, "gather", lambda self, value: faults if faults and value is None else [value])
    written = Checkpoints(tmp_path, ALONE, CheckpointConfig()) if not faults else checkpoints_of_two(tmp_path)
    words = {
        "the files": r"rank 0: OSError: .*No space left",
        "the state": r"rank 0: OSError: .*No space left",
        "the disk": r"rank 0: a checkpoint takes 1073741824\.00 GB and .* GB of the disk are free",
        "another rank": "rank 1: OSError: full",
    }
    with pytest.raises(ConfigError, match=rf"^run\.dir: no checkpoint can be written in .*{words[part]}") as error:
        written.rehearse(fails if part == "the files" else model, fails if part == "the state" else state, size)
    assert "\n" not in str(error.value) and names(tmp_path) == []


def checkpoints_of_two(folder: Path) -> Checkpoints:
    """Rank 0's, whose peers are not asked."""
    made = checkpoints(folder)
    made._ranks = Ranks(0, 2, 0)
    return made


def test_a_failed_save_never_loses_the_weights(tmp_path, caplog):
    """If what resuming needs cannot be written, the model alone stays, named, until a whole checkpoint is there; the
    one before is what a resumed run takes."""

    def full(folder: Path) -> None:
        (folder / "run.json").write_text("{}")
        raise OSError(28, "No space left on device")

    written = checkpoints(tmp_path)
    written.save(1, model, state)
    for step in (2, 3):
        written.save(step, model, full)
    with pytest.raises(ConfigError, match=r"step_000003 could .*No space left.*; its model alone is in model_000003$"):
        written.wait()
    assert names(tmp_path) == ["last", "model_000003", "step_000001"]
    assert names(tmp_path / "model_000003") == ["config.json", "model.safetensors"]
    assert checkpoints(tmp_path).find("auto") == tmp_path / "step_000001"
    written.save(4, full, state)  # not even the model
    with pytest.raises(ConfigError, match=r"step_000004 could .*; nor its model alone: OSError: .*No space left"):
        written.wait()
    assert names(tmp_path) == ["last", "model_000003", "step_000001"]
    written.save(5, model, state)
    written.wait()
    assert names(tmp_path) == ["last", "step_000001", "step_000005"] and written.failed == 3


def test_the_newest_model_takes_the_room_of_an_older_one(tmp_path, monkeypatch):
    """Where the disk is too full for both, the weights of the run's end are those that stay."""

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    def large(folder: Path) -> None:
        if list(tmp_path.glob("model_*")):
            full(folder)
        model(folder)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=3))
    written = checkpoints(tmp_path)
    for step in (1, 2):
        written.save(step, large, full)
    with pytest.raises(ConfigError, match=r"; its model alone is in model_000002$"):
        written.wait()
    assert names(tmp_path) == ["model_000002"]


def test_a_rank_on_a_full_disk_makes_room_for_its_note(tmp_path, monkeypatch):
    """Rank 0 would wait for a note that does not fit on the disk: what a failing rank has written goes first."""
    there, real = [], checkpoint._write_json

    def note(path: Path, content: object) -> None:
        there.append([p.name for p in path.parent.rglob("*") if p.is_file()])
        real(path, content)

    def full(folder: Path) -> None:
        (folder / "optimizer_00000.safetensors").write_bytes(b"as much as fits")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_json", note)
    written = checkpoints(tmp_path)
    written.save(1, model, full)
    written.close()
    assert there[0] == []


def test_a_checkpoint_needs_the_files_of_every_rank(tmp_path, monkeypatch):
    """Rank 0 publishes when all have written; one that fails, or never writes, fails the checkpoint."""
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value] * self.world_size)
    monkeypatch.setattr(checkpoint, "PEERS_S", 0.3)

    def part(rank: int, fails: bool = False):
        def write(folder: Path) -> None:
            if fails:
                raise OSError("no space left on rank 1")
            (folder / f"rank_{rank:05d}.json").write_text(str(rank))

        return write

    main, other = (Checkpoints(tmp_path, Ranks(rank, 2, rank), CheckpointConfig()) for rank in (0, 1))
    other.save(1, model, part(1))
    main.save(1, model, part(0))
    main.wait()
    assert set(json.loads((tmp_path / "step_000001" / "COMPLETE").read_text())["files"]) == {
        "config.json",
        "model.safetensors",
        "trainer/rank_00000.json",
        "trainer/rank_00001.json",
    }
    other.save(2, model, part(1, fails=True))
    main.save(2, model, part(0))
    with pytest.raises(ConfigError, match="rank 1: OSError: no space left on rank 1"):
        main.wait()
    other.close()
    main.save(3, model, part(0))
    with pytest.raises(ConfigError, match="nothing from rank 1"):
        main.wait()
    assert names(tmp_path) == ["last", "model_000003", "step_000001"]


def test_a_file_under_way_is_nobodys(tmp_path, monkeypatch):
    """safetensors writes under a hidden name first: rank 0, done before rank 1, does not take rank 1's for its own."""
    under_way, rank_0_is_done, real = threading.Event(), threading.Event(), checkpoint._write_json
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value] * self.world_size)

    def note(path: Path, content: object) -> None:
        real(path, content)
        if path.name == ".rank_00000":
            rank_0_is_done.set()

    def slow(folder: Path) -> None:
        (folder / ".tmpAb3dE6").write_text("1")
        under_way.set()
        assert rank_0_is_done.wait(20)
        (folder / ".tmpAb3dE6").rename(folder / "rank_00001.json")

    def quick(folder: Path) -> None:
        assert under_way.wait(20)
        (folder / "rank_00000.json").write_text("0")

    monkeypatch.setattr(checkpoint, "_write_json", note)
    main, other = (Checkpoints(tmp_path, Ranks(rank, 2, rank), CheckpointConfig()) for rank in (0, 1))
    other.save(1, model, slow)
    main.save(1, model, quick)
    main.wait()
    files = json.loads((tmp_path / "step_000001" / "COMPLETE").read_text())["files"]
    assert set(files) == {"config.json", "model.safetensors", "trainer/rank_00000.json", "trainer/rank_00001.json"}


def test_a_rank_that_sees_another_disk_is_told(tmp_path, monkeypatch):
    """run.dir on a disk that some rank does not share is refused before anything is trained."""
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [True, False])
    with pytest.raises(ConfigError, match=r"run.dir: rank 1 does not see .*all ranks share"):
        Checkpoints(tmp_path, Ranks(0, 2, 0), CheckpointConfig())


def test_the_files_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """Every file and folder is synced before the rename, the folder that holds the name after it, the marker last."""
    events = []
    real_sync, real_replace, real_write = checkpoint.os.fsync, checkpoint._replace, checkpoint._write_json

    def sync(descriptor: int) -> None:
        events.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve().name))
        real_sync(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", sync)
    monkeypatch.setattr(checkpoint, "_replace", lambda a, b: (events.append(("rename", b.name)), real_replace(a, b)))
    monkeypatch.setattr(checkpoint, "_write_json", lambda p, c: (events.append(("json", p.name)), real_write(p, c)))
    written = checkpoints(tmp_path)
    written.save(1, model, state)
    written.wait()
    rename, marker = events.index(("rename", "step_000001")), events.index(("json", "COMPLETE"))
    before = {name for kind, name in events[:rename] if kind == "sync"}
    assert {
        "config.json",
        "model.safetensors",
        "run.json",
        "rank_00000.json",
        ".step_000001.partial",
        "trainer",
    } <= before
    assert ("sync", tmp_path.name) in events[rename:marker] and ("sync", "step_000001") in events[marker:]


def test_repartitioning_gives_every_rank_its_piece():
    """From any number of ranks to any other: the pieces laid end to end are the tensor, the rest is zero padding."""
    from rethinker.policy.optimizer_state import repartitioned

    class Slice:
        def __init__(self, piece: torch.Tensor) -> None:
            self.piece = piece

        def get_shape(self) -> list[int]:
            return list(self.piece.shape)

        def __getitem__(self, index: slice) -> torch.Tensor:
            return self.piece[index]

    for total in (1, 5, 12):
        values = torch.arange(1.0, total + 1)
        for old in (1, 2, 3, 5):
            length = -(-total // old)
            padded = torch.cat([values, torch.full((old * length - total,), torch.nan)])
            parts = [Slice(piece) for piece in padded.split(length)]
            for new in (1, 2, 3, 5, 7):
                share = -(-total // new)
                pieces = [repartitioned(parts, total, share, rank) for rank in range(new)]
                assert torch.equal(torch.cat(pieces), torch.cat([values, torch.zeros(new * share - total)]))
