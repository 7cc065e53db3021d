"""Where records come from: files, a folder of those, a pattern of names, or a dataset of the hub.

Reading is strict: a damaged line is an error that names file, line and column. Skipping it unasked would train on
other data than the user believes.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sophia_galore.data.bad_records import Report, stop_at_once
from sophia_galore.data.file_text import UNPACKED, ending
from sophia_galore.data.files import read_json, read_jsonl
from sophia_galore.data.folders import look_into
from sophia_galore.data.hub import looks_like_hub_id, read_hub
from sophia_galore.data.record import Content, Record
from sophia_galore.data.tables import read_arrow, read_csv, read_parquet
from sophia_galore.errors import DataError, EnvironmentProblem

__all__ = ["Found", "Record", "find", "is_here", "read_found", "read_records"]

READERS: dict[str, Callable[[Path, Report], Content]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
_BINARY = (".parquet", ".arrow", ".feather")
KNOWN = ", ".join(READERS)


@dataclass(frozen=True)
class Found:
    """What one name stands for.

    Attributes:
        files: What is to be read for the use that was asked for: files, or a hub id as it was written.
        validation: Files of the same folder that are for measuring, if the others are for training.
        left: Files of the same folder that are left alone.
        name: The name as the user wrote it.
    """

    files: tuple[Path | str, ...]
    validation: tuple[Path, ...]
    left: tuple[Path, ...]
    name: str


def find(name: str, use: Literal["train", "eval"]) -> Found:
    """Finds what a name stands for; what exists on disk wins.

    Args:
        name: A file; a folder; a pattern with ``*`` or ``?``; or a hub dataset ``owner/name`` or ``owner/name:split``.
        use: What it is for. Of a folder that has parts, the training part is trained on, and the validation part (the
            test part, if there is no other) is measured on.

    Returns:
        What to read.

    Raises:
        DataError: There is nothing of that name, or nothing for that use.
        EnvironmentProblem: It is there, and may not be read.
    """
    path = Path(name)
    if path.is_dir():
        return _in_folder(path, name, use)
    if path.is_file():
        return Found((path,), (), (), name)
    if any(sign in name for sign in "*?") and not looks_like_hub_id(name):
        return Found(_matching(name), (), (), name)
    if looks_like_hub_id(name):
        return Found((name,), (), (), name)
    several = f" Several files are a list: data.{use}='[A, B]'." if "," in name else ""
    raise DataError(
        f"The data file {name} does not exist.",
        "Check the path (it is relative to the current folder); `data.train` and `data.eval` take a file, a folder "
        f"or a hub dataset `owner/name`.{several}",
    )


def is_here(name: str) -> bool:
    """Whether a name stands for something on this machine, so that reading it asks no network.

    Args:
        name: As `find` takes it.
    """
    return Path(name).exists() or (any(sign in name for sign in "*?") and bool(glob.glob(name, recursive=True)))


def read_found(path_or_id: Path | str, report: Report = stop_at_once) -> Content:
    """Reads every record of one file or hub dataset.

    Args:
        path_or_id: One of `Found.files`.
        report: Takes the records that can't be read; left out, the first of them is raised.

    Returns:
        The records in their order.

    Raises:
        DataError: It is empty, damaged as a whole, or of an unknown kind.
        EnvironmentProblem: It may not be read.
    """
    return Content(read_hub(path_or_id)) if isinstance(path_or_id, str) else _read_file(path_or_id, report)


def read_records(path_or_id: str) -> list[Record]:
    """Reads every record that a name stands for, as training data.

    Args:
        path_or_id: As `find` takes it.

    Returns:
        The records in their order in the files; at least one.

    Raises:
        DataError: Nothing is there, it is empty, damaged, or of an unknown kind.
        EnvironmentProblem: It is there, and may not be read.
    """
    return [record for file in find(path_or_id, "train").files for record in read_found(file).records]


def _in_folder(folder: Path, name: str, use: Literal["train", "eval"]) -> Found:
    parts = look_into(folder, READERS)
    if use == "eval" and parts.has_parts:
        chosen = parts.validation or parts.test
        left = {*parts.train, *parts.validation, *parts.test, *parts.others} - {*chosen}
        return Found(chosen, (), tuple(sorted(left)), name)
    if not parts.train:
        held = [file.name for file in (*parts.validation, *parts.test)]
        raise DataError(
            f"The folder {folder} has no training part, only data to measure on: {', '.join(held[:3])}.",
            "Name the file itself if it is to be trained on.",
        )
    return Found(parts.train, parts.validation, (*parts.test, *parts.others), name)


def _matching(pattern: str) -> tuple[Path, ...]:
    files = tuple(sorted(path for found in glob.glob(pattern, recursive=True) if (path := Path(found)).is_file()))
    if not files:
        raise DataError(f"No file matches {pattern}.", "Check the pattern (it is relative to the current folder).")
    return files


def _read_file(path: Path, report: Report) -> Content:
    kind = ending(path)
    reader = READERS.get(kind)
    if reader is None or (kind in _BINARY and path.suffix.lower() in UNPACKED):
        raise DataError(
            f"{path}: the ending {path.suffix!r} is not one that can be read.",
            f"Convert the file; known endings are {KNOWN}, and all but the last three also with .gz, .bz2 or .xz "
            "behind them.",
        )
    broken = 0

    def noted(where: str, error: DataError) -> None:
        nonlocal broken
        broken += 1
        report(where, error)

    try:
        content = reader(path, noted) if path.stat().st_size else Content([])
    except PermissionError as error:
        raise EnvironmentProblem(
            f"{path} can't be read: permission denied.", "Give the user who runs this the right to read the file."
        ) from error
    if not content.records and not broken:
        raise DataError(f"{path} is empty: there is no record in it.", "Check that the file was written completely.")
    return content
