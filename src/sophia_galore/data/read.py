"""Find and read records: files, folders, glob patterns, or datasets of the Hugging Face hub.

Reading is strict: a damaged line is an error that names file, line and column. Skipping it silently would train on
other data than the user expects.
"""

from __future__ import annotations

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sophia_galore.data.bad_records import Report, stop_at_once
from sophia_galore.data.file_text import DECOMPRESS, ending, not_permitted
from sophia_galore.data.files import read_json, read_jsonl
from sophia_galore.data.folders import find_splits
from sophia_galore.data.hub import looks_like_hub_id, read_hub
from sophia_galore.data.record import Content, Record
from sophia_galore.data.tables import read_arrow, read_csv, read_parquet
from sophia_galore.errors import DataError

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
TEXT = ".txt"
"""Extension of plain text, which has no records (`corpus.py`)."""

KNOWN = ", ".join([TEXT, *READERS])


@dataclass(frozen=True)
class Found:
    """The files that one name stands for.

    Attributes:
        files: What to read: files, or a hub id as the user wrote it.
        validation: Validation files of the same folder, if `files` are its training files.
        left: Files of the same folder that are not used.
    """

    files: tuple[Path | str, ...]
    validation: tuple[Path, ...] = ()
    left: tuple[Path, ...] = ()


def find(name: str, use: Literal["train", "eval"]) -> Found:
    """Find the files that a name stands for; existing paths take precedence over hub datasets.

    Args:
        name: A file; a folder; a pattern with ``*`` or ``?``; or a hub dataset ``owner/name`` or ``owner/name:split``.
        use: ``train`` or ``eval``. In a folder with splits, ``train`` takes the training split, and ``eval`` the
            validation split (the test split if there is no other).

    Returns:
        What to read.

    Raises:
        DataError: Nothing has that name, or the folder has no split for that use.
        EnvironmentProblem: There is no permission to read it.
    """
    path = Path(name)
    if path.is_dir():
        return _in_folder(path, use)
    if path.is_file():
        return Found((path,))
    if looks_like_hub_id(name):
        return Found((name,))
    if any(sign in name for sign in "*?"):
        return Found(_matching(name))
    several = f" Several files are a list: data.{use}='[A, B]'." if "," in name else ""
    raise DataError(
        f"The data file {name} does not exist.",
        "Check the path (it is relative to the current folder); `data.train` and `data.eval` take a file, a folder "
        f"or a hub dataset `owner/name`.{several}",
    )


def is_here(name: str) -> bool:
    """Return whether a name stands for files on this machine, so that no network is needed to read it.

    Args:
        name: As `find` takes it.
    """
    return Path(name).exists() or (any(sign in name for sign in "*?") and bool(glob.glob(name, recursive=True)))


def read_found(path_or_id: Path | str, report: Report = stop_at_once) -> Content:
    """Read every record of one file or hub dataset.

    Args:
        path_or_id: One of `Found.files`.
        report: Called for each record that can't be read; by default the first one is raised.

    Returns:
        The records in file order.

    Raises:
        DataError: It is empty, damaged as a whole, or of an unknown type.
        EnvironmentProblem: There is no permission to read it.
    """
    return Content(read_hub(path_or_id)) if isinstance(path_or_id, str) else _read_file(path_or_id, report)


def read_records(path_or_id: str) -> list[Record]:
    """Read every training record that a name stands for.

    Args:
        path_or_id: As `find` takes it.

    Returns:
        The records in file order; at least one.

    Raises:
        DataError: It is missing, empty, damaged, or of an unknown type.
        EnvironmentProblem: There is no permission to read it.
    """
    return [record for file in find(path_or_id, "train").files for record in read_found(file).records]


def _in_folder(folder: Path, use: Literal["train", "eval"]) -> Found:
    splits = find_splits(folder, READERS)
    chosen = splits.validation or splits.test
    if use == "eval" and chosen:
        left = {*splits.train, *splits.validation, *splits.test, *splits.others} - {*chosen}
        return Found(chosen, left=tuple(sorted(left)))
    if not splits.train:
        names = [file.name for file in (*splits.validation, *splits.test)]
        raise DataError(
            f"The folder {folder} has no training split, only evaluation data: {', '.join(names[:3])}.",
            "To train on one of these files, name the file itself.",
        )
    return Found(splits.train, splits.validation, (*splits.test, *splits.others))


def _matching(pattern: str) -> tuple[Path, ...]:
    files = tuple(sorted(path for found in glob.glob(pattern, recursive=True) if (path := Path(found)).is_file()))
    if not files:
        raise DataError(f"No file matches {pattern}.", "Check the pattern (it is relative to the current folder).")
    return files


def _read_file(path: Path, report: Report) -> Content:
    kind = ending(path)
    reader = READERS.get(kind)
    if reader is None or (kind in _BINARY and path.suffix.lower() in DECOMPRESS):
        raise DataError(
            f"{path}: files with the extension {path.suffix!r} can't be read.",
            f"Convert the file; supported extensions are {KNOWN}; all but the last three may also be compressed "
            "(.gz, .bz2 or .xz).",
        )
    broken = 0

    def noted(where: str, error: DataError) -> None:
        nonlocal broken
        broken += 1
        report(where, error)

    try:
        content = reader(path, noted) if path.stat().st_size else Content([])
    except PermissionError as error:
        raise not_permitted(path) from error
    if not content.records and not broken:
        raise DataError(f"{path} is empty: there is no record in it.", "Check that the file was written completely.")
    return content
