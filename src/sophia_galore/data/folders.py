"""A folder of data: which of its files are trained on, which are measured on, and which are left alone."""

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
"""What a file or a subfolder is called, and which part of the data it is."""

_WORDS = "|".join(sorted(SPLITS, key=len, reverse=True))
_SHARD = re.compile(r"(?:[-_.]?\d+(?:[-_]of[-_]\d+)?)+(?:-[0-9a-f]{16})?$")
_BEGINS, _ENDS = re.compile(rf"({_WORDS})(?![a-z0-9])"), re.compile(rf"(?<![a-z0-9])({_WORDS})$")
_ABOUT = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that describe data and hold none."""


@dataclass(frozen=True)
class FolderFiles:
    """The files of a folder by their use.

    Attributes:
        train: Files to train on, in the order of their names.
        validation: Files to measure on while training.
        test: Files for a last measurement, which training leaves alone.
        others: Files that belong to no part of a folder that has parts.
    """

    train: tuple[Path, ...]
    validation: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()

    @property
    def has_parts(self) -> bool:
        """Whether the folder says which of its files are for what."""
        return bool(self.validation or self.test)


def look_into(folder: Path, endings: Iterable[str]) -> FolderFiles:
    """Finds the data files of a folder and what each is for.

    Args:
        folder: The folder: of data files, whose names or subfolders may say ``train``, ``validation`` or ``test``; of a
            dataset that `datasets` saved; or of a hub dataset, whose files lie in ``data``.
        endings: The endings of files that can be read.

    Returns:
        The files. Hidden ones, and those that only describe data, are not among them.

    Raises:
        DataError: There is no data file, or it is not clear which ones are meant.
        EnvironmentProblem: The folder may not be read.
    """
    known = set(endings)
    try:
        return _look(folder, known)
    except PermissionError as error:
        raise EnvironmentProblem(f"The folder {folder} can't be read: permission denied.") from error


def split_of(name: str) -> Split | None:
    """The part of the data that a name says, if it is one: ``test-00000-of-00002`` is test, ``latest`` is none.

    Args:
        name: A file's name without its endings, or a folder's.
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
    parts: dict[Split | None, list[Path]] = {"train": [], "validation": [], "test": [], None: []}
    for inner, found in named.items():
        parts[SPLITS[inner.name.lower()]] += found
    # A word somewhere in a name is a sign only where another file is named as the training part.
    guesses = {path: split_of(_stem(path)) for path in files}
    if not parts["train"] and "train" not in guesses.values():
        guesses = {path: SPLITS.get(_SHARD.sub("", _stem(path).lower())) for path in files}
    for path, guess in guesses.items():
        parts[guess].append(path)
    has_parts = bool(parts["validation"] or parts["test"])
    if not has_parts or not parts["train"]:
        parts["train"], parts[None] = sorted([*parts["train"], *parts[None]]), []
    return FolderFiles(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]), tuple(parts[None]))


def _deeper(folder: Path, inside: list[Path], endings: set[str]) -> FolderFiles:
    """A folder without data files of its own: the one subfolder that has some, which is ``data`` in hub datasets."""
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
        f"Put files with one of the endings {', '.join(sorted(endings))} into it.",
    )


def _data_files(folder: Path, endings: set[str]) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name not in _ABOUT and ending(path) in endings and path.is_file()
    )


def _all_files(folder: Path, endings: set[str]) -> list[Path]:
    """The data files of a subfolder, or of one below it; those of a saved dataset in their own order."""
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
    """The parts of a `DatasetDict` that was saved to disk."""
    parts: dict[Split, list[Path]] = {"train": [], "validation": [], "test": []}
    others: list[Path] = []
    for name in _list(_json(folder / "dataset_dict.json").get("splits")):
        files = _saved(folder / str(name)) or ()
        split = split_of(str(name))
        (parts[split] if split else others).extend(files)
    if not parts["train"]:
        parts["train"], others = others, []
    return FolderFiles(tuple(parts["train"]), tuple(parts["validation"]), tuple(parts["test"]), tuple(others))


def _saved(folder: Path) -> tuple[Path, ...] | None:
    """The Arrow files of a dataset that was saved to disk, in their order; None if the folder is none."""
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
