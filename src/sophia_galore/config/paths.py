"""Paths with `~` and variables, and the placeholders of `training.output_dir`.

`~` and `$VAR` mean what they mean in a shell, for every key and argument alike. `$$` stands for one `$`, and `./~x` for
a file called `~x`. On Windows `%VAR%` is understood as well.

`{optimizer}`, `{model}` and `{date}` are filled in for `training.output_dir`; `{{` is one brace. The date is the moment
at which a run begins. It is filled in once; a run that is resumed looks for the folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sophia_galore.errors import ArgumentError

PLACEHOLDERS = ("optimizer", "model", "date")
"""The known placeholders."""

PATH_KEYS = (
    "model.name",
    "model.fallback",
    "model.cache_dir",
    "model.chat_template",
    "data.train",
    "data.eval",
    "training.output_dir",
)
"""The keys that take paths; some take hub ids or short names too."""

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<braced>[^{}]*)\}|(?P<plain>[A-Za-z_][A-Za-z0-9_]*))")
_WINDOWS = re.compile(r"%(?P<plain>[A-Za-z_][A-Za-z0-9_()]*)%")
_IN_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")
_DATE = "%Y-%m-%d_%H-%M-%S"
_DATE_PATTERN = r"\d{4}-\d{2}-\d{2}_\d{2}-\d{2}-\d{2}"
# Not allowed in file names on Windows, and awkward elsewhere.
_AWKWARD = re.compile(r'[<>:"/\\|?*\x00-\x1f]+')
_WEIGHTS = ".gguf"


def expand(text: str) -> str:
    """Expand `~` and variables in a path.

    Args:
        text: As written.

    Raises:
        ArgumentError: A variable or a user is not known.
    """

    def value(found: re.Match[str]) -> str:
        words = found.groupdict()
        if words.get("dollar"):
            return "$"
        name = words.get("braced") if words.get("braced") is not None else words["plain"]
        known = os.environ.get(name or "")
        if not known:
            state = "is empty" if known == "" else "is not set"
            literal = " For the sign itself write $$." if text[found.start()] == "$" else ""
            raise ArgumentError(f"the environment variable {name!r} in {text!r} {state}", f"Set it.{literal}")
        return known

    expanded = _VARIABLE.sub(value, text)
    if os.name == "nt":
        expanded = _WINDOWS.sub(value, expanded)
    if not expanded.startswith("~"):
        return expanded
    whole = os.path.expanduser(expanded)
    if whole.startswith("~"):
        name = re.split(r"[/\\]", expanded)[0]
        raise ArgumentError(f"{name} in {text!r} is no user of this machine", f"For a file of that name write ./{text}")
    return whole


def escape_path(path: str) -> str:
    """Return the text that `expand` turns into this path."""
    path = path.replace("$", "$$")
    return f"./{path}" if path.startswith("~") else path


def expand_all(value: Any, change: Any = expand) -> Any:
    """Change every path in a key's value: a text, a list of texts, or a list of sections with a `path`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: expand_all(inner, change) if key == "path" else inner for key, inner in value.items()}
    if isinstance(value, Sequence):
        return type(value)(expand_all(item, change) for item in value)  # type: ignore[call-arg]
    return value


def named_paths(value: Any) -> list[Path]:
    """Return the paths in a key's value, as in `expand_all`; sections may be objects."""
    if isinstance(value, str):
        return [Path(value)]
    if isinstance(value, Sequence):
        return [path for item in value for path in named_paths(item)]
    inner = value.get("path") if isinstance(value, Mapping) else getattr(value, "path", None)
    return named_paths(inner) if inner is not None else []


def unknown_placeholders(template: str) -> list[str]:
    """Return the unknown placeholders of a template."""
    return [word for word in _words(template) if word not in PLACEHOLDERS]


def has_date(template: str) -> bool:
    """Return whether a template contains {date}."""
    return "date" in _words(template)


def fill_placeholders(template: str, *, optimizer: str, model: str) -> str:
    """Fill in all placeholders but {date}.

    Args:
        template: `training.output_dir`.
        optimizer: `optimizer.type`.
        model: `model.name`.
    """
    values = {"optimizer": optimizer, "model": _short_name(model)}
    return _replaced(template, lambda word: values.get(word, "{" + word + "}"))


def dated(template: str, when: datetime) -> str:
    """Fill in {date} and nothing else."""
    text = when.strftime(_DATE)
    return re.sub(r"\{\{|\}\}|\{date\}", lambda found: text if found[0] == "{date}" else found[0], template)


def dates_of(template: str, *, optimizer: str, model: str) -> dict[Path, datetime]:
    """Return the existing folders that fit a template, with their dates.

    Args:
        template: `training.output_dir` with a date in it.
        optimizer: `optimizer.type`.
        model: `model.name`.
    """
    values = {"optimizer": optimizer, "model": _short_name(model)}
    found: dict[Path, datetime] = {}
    # Part by part: a part without a date is appended; for one with a date the folders that fit are listed.
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
    """Return the last part of a hub id or a path as a valid folder name."""
    name = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    name = name[: -len(_WEIGHTS)] if name.lower().endswith(_WEIGHTS) else name
    return _AWKWARD.sub("-", name).strip(". ") or "model"
