"""Write files without overwriting those of the user. A link stays a link."""

from __future__ import annotations

import os
from pathlib import Path

from sophia_galore import __version__
from sophia_galore.config import RunConfig, dump_config
from sophia_galore.errors import EnvironmentProblem, UserError
from sophia_galore.records.schema import find_json, write_text
from sophia_galore.train.folder import nearest_folder

_MADE_BY = "# Made by `sophia-galore plan --fit`"
_PNG = b"\x89PNG\r\n\x1a\n"


def write_config(config: RunConfig, path: Path) -> Path:
    """Write a configuration as YAML.

    Args:
        config: The configuration.
        path: The file; an older one that this function wrote is replaced.

    Returns:
        `path`.

    Raises:
        UserError: Something else is there.
        EnvironmentProblem: It can't be written.
    """
    try:
        if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(_MADE_BY):
            raise UserError(
                f"{path} exists, and was not made by this command, so it is not replaced.",
                "Give another name with --output.",
            )
        write_text(path.resolve(), f"{_MADE_BY}, version {__version__}.\n{dump_config(config)}")
    except OSError as error:
        raise EnvironmentProblem(f"{path} can't be written: {error}.", "Give another place with --output.") from error
    return path


def text_between_marks(path: Path, name: str) -> str:
    """Return the text between the two marks of a name in a text file.

    Args:
        path: The file.
        name: The name in the marks `<!-- NAME -->` and `<!-- /NAME -->`, each on a separate line.

    Raises:
        UserError: The file has no such marks.
    """
    return _parts(path, name)[1].strip("\n")


def replace_between_marks(path: Path, name: str, text: str) -> None:
    """Replace the text between the two marks of a name in a text file.

    Args:
        path: The file.
        name: As for `text_between_marks`.
        text: The new text.

    Raises:
        UserError: The file has no such marks.
    """
    before, _, after = _parts(path, name)
    try:
        write_text(path.resolve(), f"{before}\n{text}\n{after}")
    except OSError as error:
        raise EnvironmentProblem(f"{path} can't be written: {error}.", "It is as it was.") from error


def _parts(path: Path, name: str) -> tuple[str, str, str]:
    """Return what is before, between and after two marks; the marks belong to what is around."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} can't be read: {error}.", "Name a text file that has the marks.") from error
    before, found, rest = content.partition(begin)
    between, closed, after = rest.partition(end)
    if not found or not closed:
        raise UserError(f"{path} has no lines {begin} and {end}.", "Put them where the table is to stand.")
    return before + begin, between, end + after


def write_new(path: Path, text: str) -> None:
    """Write a text file and make its folder.

    Args:
        path: The file; it is replaced.
        text: The content.

    Raises:
        EnvironmentProblem: It can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path.resolve(), text)
    except OSError as error:
        raise EnvironmentProblem(f"{path} can't be written: {error}.", "Give another place with --output.") from error


def refuse_other_than_png(path: Path) -> None:
    """Refuse to draw over a file that is no picture.

    Args:
        path: The path of the new picture.

    Raises:
        UserError: Something else is there.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_PNG)) != _PNG:
                raise UserError(f"{path} exists and is no PNG picture, so it is not replaced.", "Give another name.")


def refuse_other_than_json(path: Path) -> None:
    """Refuse to write over a file that is no JSON, before anything that takes time.

    Args:
        path: The path of the new file.

    Raises:
        UserError: Something else is there.
        EnvironmentProblem: There is no way to write it.
    """
    if path.is_dir() or (path.is_file() and not isinstance(find_json(path), dict)):
        raise UserError(f"{path} exists and is no JSON document, so it is not replaced.", "Give another name.")
    parent = nearest_folder(path.absolute().parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise EnvironmentProblem(f"{path} can't be written: {parent} is no folder for it.", "Give another place.")
