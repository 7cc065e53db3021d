"""Records from JSON, JSONL, CSV or Parquet files, a folder of those, or a dataset of the hub.

Reading is strict: a damaged line is an error that names file, line and column. Skipping it
would train on other data than the user believes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sophia_galore.data.files import read_csv, read_json, read_jsonl, read_parquet
from sophia_galore.data.hub import looks_like_hub_id, read_hub
from sophia_galore.data.record import Record
from sophia_galore.errors import DataError, EnvironmentProblem

__all__ = ["Record", "read_records"]

READERS: dict[str, Callable[[Path], list[Record]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".parquet": read_parquet,
}
KNOWN = ", ".join(READERS)


def read_records(path_or_id: str) -> list[Record]:
    """Reads every record of a file, a folder or a hub dataset.

    Args:
        path_or_id: A ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file; a folder, of which
            all such files are read in the order of their names; or a hub dataset
            ``owner/name`` or ``owner/name:split``. What exists on disk wins.

    Returns:
        The records in their order in the file; at least one.

    Raises:
        DataError: Nothing is there, it is empty, damaged, or of an unknown kind.
        EnvironmentProblem: It is there, and may not be read.
    """
    path = Path(path_or_id)
    if path.is_dir():
        return _read_folder(path)
    if path.is_file():
        return _read_file(path)
    if looks_like_hub_id(path_or_id):
        return read_hub(path_or_id)
    raise DataError(
        f"The data file {path_or_id} does not exist.",
        "Check the path (it is relative to the current folder); `data.train` and `data.eval` take a file, a folder "
        "or a hub dataset `owner/name`.",
    )


def _read_folder(folder: Path) -> list[Record]:
    try:
        files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in READERS)
    except PermissionError as error:
        raise EnvironmentProblem(f"The folder {folder} can't be read: permission denied.") from error
    if not files:
        raise DataError(
            f"The folder {folder} holds no data file.",
            f"Put files with one of the endings {KNOWN} directly into it (subfolders are not searched).",
        )
    return [record for file in files for record in _read_file(file)]


def _read_file(path: Path) -> list[Record]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path}: the ending {path.suffix!r} is not one that can be read.",
            f"Convert the file; known endings are {KNOWN}.",
        )
    try:
        records = reader(path) if path.stat().st_size else []
    except PermissionError as error:
        raise EnvironmentProblem(
            f"{path} can't be read: permission denied.", "Give the user who runs this the right to read the file."
        ) from error
    if not records:
        raise DataError(f"{path} is empty: there is no record in it.", "Check that the file was written completely.")
    return records
