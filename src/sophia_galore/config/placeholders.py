"""What stands in braces in `training.output_dir`: `{optimizer}`, `{model}` and `{date}`; `{{` is one brace.

The date is that of the moment at which a run is begun. It is put in once; a run that goes on looks for the folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

PLACEHOLDERS = ("optimizer", "model", "date")

_IN_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_DATE = "%Y-%m-%d_%H-%M-%S"
_DATE_PATTERN = r"\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2}"
# In no file's name on Windows, and elsewhere a nuisance.
_AWKWARD = re.compile(r'[<>:"/\\|?*\x00-\x1f]+')
_WEIGHTS = ".gguf"


def unknown_placeholders(template: str) -> list[str]:
    """Those words in braces that stand for nothing."""
    return [word for word in _words(template) if word not in PLACEHOLDERS]


def has_date(template: str) -> bool:
    """Whether a template has the date in it."""
    return "date" in _words(template)


def filled(template: str, *, optimizer: str, model: str) -> str:
    """A template with everything filled in but the date, which stays.

    Args:
        template: `training.output_dir`.
        optimizer: `optimizer.type`.
        model: `model.name`.
    """
    values = {"optimizer": optimizer, "model": _short_name(model)}
    return _replaced(template, lambda word: values.get(word, "{" + word + "}"))


def dated(template: str, when: datetime) -> str:
    """A template in which the date is put in, and everything else stays."""
    text = when.strftime(_DATE)
    return re.sub(r"\{\{|\}\}|\{date\}", lambda found: text if found[0] == "{date}" else found[0], template)


def dates_of(template: str, *, optimizer: str, model: str) -> dict[Path, datetime]:
    """The folders that a template meant at other times, with these times.

    Args:
        template: `training.output_dir` with a date in it.
        optimizer: `optimizer.type`.
        model: `model.name`.
    """
    values = {"optimizer": optimizer, "model": _short_name(model)}
    found: dict[Path, datetime] = {}
    # Part by part: what is above the first date is a place, below it every folder is looked at that fits.
    places: list[tuple[Path, str]] = [(Path(), "")]
    for part in Path(template).parts:
        if not has_date(part):
            name = _replaced(part, lambda word: values.get(word, ""))
            places = [(place / name, date) for place, date in places]
            continue
        marked = _replaced(part, lambda word: "\0" if word == "date" else values.get(word, ""))
        pattern = re.compile(f"({_DATE_PATTERN})".join(re.escape(piece) for piece in marked.split("\0")))
        fitting = []
        for place, date in places:
            for path in sorted(place.iterdir()) if place.is_dir() else ():
                match = pattern.fullmatch(path.name)
                if match and len({*match.groups(), date} - {""}) == 1:
                    fitting.append((path, match[1]))
        places = fitting
    for place, date in places:
        try:
            if place.is_dir():
                found[place] = datetime.strptime(date, _DATE)
        except ValueError:
            continue  # digits that are no date
    return found


def _words(template: str) -> list[str]:
    return [found[1] for found in _IN_BRACES.finditer(template) if found[1] is not None]


def _replaced(template: str, value: Callable[[str], str]) -> str:
    return _IN_BRACES.sub(lambda found: found[0][0] if found[1] is None else value(found[1]), template)


def _short_name(model: str) -> str:
    """The last part of a hub id or a path, as a folder may be called."""
    name = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    name = name[: -len(_WEIGHTS)] if name.lower().endswith(_WEIGHTS) else name
    return _AWKWARD.sub("-", name).strip(". ") or "model"
