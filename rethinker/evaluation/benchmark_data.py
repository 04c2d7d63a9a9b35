"""Where a benchmark's files lie: the folder the user names, `$RETHINKER_DATA`, the Hugging Face cache, or the hub."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from rethinker.config import ConfigError
from rethinker.data.sources import hub_answers


def data_files(
    name: str, folder: str, source: str, patterns: tuple[str, ...], data: str | None
) -> tuple[Path, list[Path]]:
    """The folder of a benchmark's data and its files in it, in order.

    Args:
        name: of the benchmark.
        folder: of its data in `$RETHINKER_DATA`.
        source: the Hugging Face data set it is published as.
        patterns: globs of its files.
        data: a folder laid out as the published data set, or one .parquet or .jsonl file; None looks in
            `$RETHINKER_DATA/<folder>`, then in the Hugging Face cache, then on the hub.

    Raises:
        ConfigError: they are nowhere; the message says what to fetch and where to put it.
    """
    home = os.environ.get("RETHINKER_DATA")
    kept = Path(home).expanduser() / folder if home else None
    if data is not None:
        path = Path(data).expanduser()
        if path.is_file():
            return path.parent, [path]
        if not path.is_dir():
            raise ConfigError(f"--data {data}: there is no such folder or file; {_fetch(source, patterns, data)}")
        return path, _found(path, patterns, f"--data {data}", name)
    if kept is not None and kept.is_dir():
        return kept, _found(kept, patterns, f"RETHINKER_DATA={home}: {kept}", name)
    return _from_hub(name, folder, source, patterns, kept)


def _found(folder: Path, patterns: tuple[str, ...], what: str, name: str) -> list[Path]:
    files = [file for pattern in patterns for file in sorted(folder.glob(pattern))]
    if not files:
        raise ConfigError(f"{what} holds no {', '.join(patterns)}, which benchmark {name} reads")
    return files


def _from_hub(
    name: str, folder: str, source: str, patterns: tuple[str, ...], kept: Path | None
) -> tuple[Path, list[Path]]:
    reason = "the hub does not answer"
    try:
        from huggingface_hub import snapshot_download

        online = hub_answers(source)
        snapshot = Path(
            snapshot_download(source, repo_type="dataset", allow_patterns=list(patterns), local_files_only=not online)
        )
        return snapshot, _found(snapshot, patterns, f"the Hugging Face cache of {source}", name)
    except ImportError:
        reason = "the package huggingface_hub is missing"
    except ConfigError:
        pass  # an older download of other files
    except Exception as error:  # its client raises anything from ValueError to OSError
        if "HfHubHTTP" in " ".join(kind.__name__ for kind in type(error).__mro__):
            reason = f"the hub refuses it ({' '.join(str(error).split())[:120]})"
    place = f"{kept}" if kept else f"$RETHINKER_DATA/{folder} (RETHINKER_DATA is not set)"
    raise ConfigError(
        f"benchmark {name}: its data is neither in {place} nor in the Hugging Face cache, and {reason}; "
        + _fetch(source, patterns, str(kept or folder))
    )


def _fetch(source: str, patterns: tuple[str, ...], folder: str) -> str:
    include = " ".join(f"--include {shlex.quote(pattern)}" for pattern in patterns)
    where = shlex.quote(folder)
    return (
        f"where there is a network run `hf download {source} --repo-type dataset {include} --local-dir {where}`, "
        f"then give --data {where} or set RETHINKER_DATA to the folder that holds it"
    )
