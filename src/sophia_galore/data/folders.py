"""Find the splits of a data folder: which files are for training, validation and testing."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sophia_galore.data.file_text import ending
from sophia_galore.errors import DataError, EnvironmentProblem

Split = Literal["train", "validation", "test"]

SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
"""Names of files and subfolders, and the split that each means."""

_WORDS = "|".join(sorted(SPLITS, key=len, reverse=True))
_SHARD = re.compile(r"(?:[-_.]?\d+(?:[-_]of[-_]\d+)?)+(?:-[0-9a-f]{16})?$")
_BEGINS, _ENDS = re.compile(rf"({_WORDS})(?![a-z0-9])"), re.compile(rf"(?<![a-z0-9])({_WORDS})$")
_METADATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that describe data and hold none."""


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder by split.

    Attributes:
        train: Training files, sorted by name.
        validation: Files for evaluation during training.
        test: Files for a final evaluation, which training does not read.
        others: Files of no split, in a folder that has splits.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()


def find_splits(folder: Path, endings: Iterable[str]) -> FolderFiles:
    """Find the data files of a folder and the split of each.

    Args:
        folder: A folder of data files, whose names or subfolders may contain ``train``, ``validation`` or ``test``; a
            dataset saved by `datasets`; or a copy of a hub dataset, whose files are in ``data``.
        endings: Extensions of files that can be read.

    Returns:
        The files, without hidden files and metadata.

    Raises:
        DataError: There is no data file, or it is ambiguous which ones are meant.
        EnvironmentProblem: There is no permission to read the folder.
    """
    try:
        return _look(folder, set(endings))
    except PermissionError as error:
        raise EnvironmentProblem(f"The folder {folder} can't be read: permission denied.") from error


def split_of(name: str) -> Split | None:
    """Return the split that a name means, if any: ``test-00000-of-00002`` is test, ``latest`` is none.

    Args:
        name: A file name without extensions, or a folder name.
    """
    stem = _SHARD.sub("", name.lower())
    found = _BEGINS.match(stem) or _ENDS.search(stem)
    return SPLITS[found[1]] if found else None


def _look(folder: Path, endings: set[str]) -> FolderFiles:
    if (folder / "dataset_dict.json").is_file():
        return _saved_splits(folder)
    if (saved := _saved(folder)) is not None:
        return FolderFiles(saved)
    files = _data_files(folder, endings)
    inside = _subfolders(folder)
    named = {inner: found for inner in inside if inner.name.lower() in SPLITS and (found := _all_files(inner, endings))}
    if not files and not named:
        return _deeper(folder, [inner for inner in inside if _all_files(inner, endings)], endings)
    splits: dict[Split | None, list[Path]] = {"train": [], "validation": [], "test": [], None: []}
    for inner, found in named.items():
        splits[SPLITS[inner.name.lower()]] += found
    # A split name inside a longer name counts only if some file is named as the training split.
    guesses = {path: split_of(_stem(path)) for path in files}
    if not splits["train"] and "train" not in guesses.values():
        guesses = {path: SPLITS.get(_SHARD.sub("", _stem(path).lower())) for path in files}
    for path, guess in guesses.items():
        splits[guess].append(path)
    if not splits["train"] or not (splits["validation"] or splits["test"]):
        splits["train"], splits[None] = sorted([*splits["train"], *splits[None]]), []
    return FolderFiles(*map(tuple, splits.values()))


def _deeper(folder: Path, inside: list[Path], endings: set[str]) -> FolderFiles:
    """Look into the only subfolder that has data files; in hub datasets it is called ``data``."""
    if len(inside) == 1:
        return _look(inside[0], endings)
    if inside:
        raise DataError(
            f"The folder {folder} holds no data file.",
            f"Several of its subfolders hold some: {', '.join(sorted(inner.name for inner in inside))}. Name one of "
            "them, or list them: data.train='[A, B]'.",
        )
    raise DataError(
        f"The folder {folder} holds no data file.",
        f"Put files with one of the extensions {', '.join(sorted(endings))} into it.",
    )


def _data_files(folder: Path, endings: set[str]) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name not in _METADATA and ending(path) in endings and path.is_file()
    )


def _all_files(folder: Path, endings: set[str]) -> list[Path]:
    """Return the data files of a subfolder and below; those of a saved dataset in its order."""
    saved = _saved(folder)
    if saved is not None:
        return list(saved)
    return _data_files(folder, endings) or [
        path for inner in _subfolders(folder) for path in _all_files(inner, endings)
    ]


def _subfolders(folder: Path) -> list[Path]:
    hidden = (".", "__")
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(hidden))


def _saved_splits(folder: Path) -> FolderFiles:
    """Return the splits of a `DatasetDict` that was saved to disk."""
    splits: dict[Split | None, list[Path]] = {"train": [], "validation": [], "test": [], None: []}
    for name in _list(_json(folder / "dataset_dict.json").get("splits")):
        splits[split_of(str(name))].extend(_saved(folder / str(name)) or ())
    if not splits["train"]:
        splits["train"], splits[None] = splits[None], []
    return FolderFiles(*map(tuple, splits.values()))


def _saved(folder: Path) -> tuple[Path, ...] | None:
    """Return the Arrow files of a dataset that was saved to disk, in order; None if the folder is not one."""
    state = folder / "state.json"
    if not state.is_file() or not (folder / "dataset_info.json").is_file():
        return None
    said = _json(state)
    if said.get("_indices_files"):
        raise DataError(
            f"{folder} was saved with a selection of its rows, by an old version of the library `datasets`.",
            "Load and save it again: datasets.load_from_disk(...).flatten_indices().save_to_disk(...).",
        )
    return tuple(folder / str(file["filename"]) for file in _list(said.get("_data_files")))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _json(path: Path) -> dict[str, object]:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no readable JSON.", "Save the dataset again.") from error
    return said if isinstance(said, dict) else {}


def _stem(path: Path) -> str:
    return path.name.split(".")[0] if ending(path) != path.suffix.lower() else path.stem
