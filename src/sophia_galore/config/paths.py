"""Paths as people write them: `~` and `$VAR` mean what they mean in a shell, for every key and argument alike.

`$$` stands for one `$`, and `./~x` for a file called `~x`. On Windows `%VAR%` is understood as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sophia_galore.errors import ArgumentError

PATH_KEYS = (
    "model.name",
    "model.fallback",
    "model.cache_dir",
    "model.chat_template",
    "data.train",
    "data.eval",
    "training.output_dir",
)
"""The keys that take paths, some of them other things as well: hub ids, short names."""

_VARIABLE = re.compile(r"\$(?:(?P<dollar>\$)|\{(?P<braced>[^{}]*)\}|(?P<plain>[A-Za-z_][A-Za-z0-9_]*))")
_WINDOWS = re.compile(r"%(?P<plain>[A-Za-z_][A-Za-z0-9_()]*)%")


def expand(text: str) -> str:
    """A path with `~` and variables filled in.

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


def written(path: str) -> str:
    """The text that `expand` reads as this very path."""
    path = path.replace("$", "$$")
    return f"./{path}" if path.startswith("~") else path


def expand_all(value: Any, change: Any = expand) -> Any:
    """Every path in the value of a key: one text, a list of texts, or of sections that have a `path`."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: expand_all(inner, change) if key == "path" else inner for key, inner in value.items()}
    if isinstance(value, Sequence):
        return type(value)(expand_all(item, change) for item in value)  # type: ignore[call-arg]
    return value


def named_paths(value: Any) -> list[Path]:
    """The paths in the value of a key, as in `expand_all`; sections may be objects."""
    if isinstance(value, str):
        return [Path(value)]
    if isinstance(value, Sequence):
        return [path for item in value for path in named_paths(item)]
    inner = value.get("path") if isinstance(value, Mapping) else getattr(value, "path", None)
    return named_paths(inner) if inner is not None else []
