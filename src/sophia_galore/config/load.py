"""Load a `RunConfig` from a YAML file and overrides.

parse -> merge (aliases, unknown keys, contradicting lines) -> validate (types and limits) -> check (contradicting
options). Problems are collected, and one error names them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from sophia_galore.config.aliases import ALIASES, Denied, translate
from sophia_galore.config.check import contradictions
from sophia_galore.config.keys import Key, children, keys, sections
from sophia_galore.config.parse import read_file, read_overrides
from sophia_galore.config.paths import PATH_KEYS, expand_all
from sophia_galore.config.problems import Given, Problem, nearest, raise_problems, show
from sophia_galore.config.schema import RunConfig
from sophia_galore.config.schema_data import PROBLEM
from sophia_galore.config.size import Size, SizeOrZero, parse_size
from sophia_galore.errors import ArgumentError

_NUMBER = re.compile(r"[-+]?[0-9.,_]+([eE][-+]?[0-9]+)?")
"""Text that was meant as a number."""

SHORTHANDS = {
    "lr": "training.learning_rate",
    "bs": "training.batch_size",
    "wd": "training.weight_decay",
    "steps": "training.max_steps",
    "dataset": "data.train",
    "optimizer": "optimizer.type",
}
"""Common names of other tools; only for suggestions."""

EXACT_FLOATS = 2**53
"""Floats up to here represent every whole number, so `1e3` is exact."""


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the configuration of a run.

    Args:
        path: YAML file; None: the defaults.
        overrides: Words `key.path=value`, applied in order over the file; the last one wins.

    Returns:
        A complete, frozen configuration without contradictions.

    Raises:
        ConfigError: Naming the file and line, or the override, of everything that is wrong.
    """
    file = read_file(Path(path)) if path is not None else []
    given, problems = _merge(file, read_overrides(overrides))
    try:
        # Strict: otherwise true passes as 1, "3" as 3 and 1 as true.
        config = RunConfig.model_validate(_nested(given, problems), strict=True)
    except ValidationError as error:
        problems += _wrong_values(error, given)
    raise_problems(problems)
    raise_problems(contradictions(config, {key: entry.where for key, entry in given.items()}))
    return config


def _merge(
    file: Iterable[Given | Problem], overrides: Iterable[Given | Problem]
) -> tuple[dict[str, Given], list[Problem]]:
    """Merge the values of the file and of the overrides.

    A file may not contradict itself. Overrides replace its values, and the last override wins.

    Args:
        file: The file's values, in order.
        overrides: The overrides, in order.

    Returns:
        The value of each given key, and the problems.
    """
    problems: list[Problem] = []
    chosen: dict[str, Given] = {}
    denied: list[Given] = []
    for given in _translated(file, problems):
        first = chosen.get(given.key)
        if isinstance(given.value, Denied):
            denied.append(given)
        elif first is None:
            chosen[given.key] = given
        elif not _same(first.value, given.value):
            problems.append(_contradiction(first, given))
    later = list(_translated(overrides, problems))
    named_later = {given.key for given in later}
    denied = [given for given in denied if given.key not in named_later]
    denied += [given for given in later if isinstance(given.value, Denied)]
    chosen |= {given.key: given for given in later if not isinstance(given.value, Denied)}
    for given in denied:
        asked = chosen.get(given.key)
        if asked is not None and Denied(asked.value) == given.value:
            cause = f"{given.written} is false, but {asked.name()} is {show(asked.value)} ({asked.where})"
            problems.append(Problem(given.where, cause, f"Remove {given.written}, or change {given.key}."))
    return chosen, problems


def _translated(entries: Iterable[Given | Problem], problems: list[Problem]) -> Iterable[Given]:
    """Yield the entries with known keys; add everything else to `problems`."""
    for entry in entries:
        result = entry if isinstance(entry, Problem) else translate(entry)
        if result is None:
            continue
        if isinstance(result, Problem):
            problems.append(result)
        elif result.key in keys():
            yield result
        else:
            problems.append(_unknown(result))


def _unknown(given: Given) -> Problem:
    suggestion = _nearest_key(given.key)
    section = next((name for name in reversed(sections()) if given.key.startswith(f"{name}.")), "")
    known = f"Known {f'under {section}' if section else 'sections'}: {', '.join(children(section))}."
    return Problem(given.where, f"unknown key '{given.key}'", f"Did you mean {suggestion}?" if suggestion else known)


def _contradiction(first: Given, second: Given) -> Problem:
    cause = (
        f"{second.name()} is {show(second.value)}, but {first.name()} is {show(first.value)} at {first.where}; "
        "both mean the same key"
    )
    return Problem(second.where, cause, f"Keep one of them, best {first.key}.")


def _same(one: object, other: object) -> bool:
    """Equality in which `true` is not 1."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _nearest_key(name: str) -> str | None:
    """Return the known key or section most similar to `name`, or None.

    Args:
        name: Dotted, as the user wrote it.
    """
    last = name.rsplit(".", 1)[-1]
    if last in SHORTHANDS:
        return SHORTHANDS[last]
    # Real keys come first: `nearest` keeps the first of equals, and an alias often shares the last word.
    found = nearest(name, [*keys(), *sections(), *ALIASES])
    return ALIASES[found].target if found in ALIASES else found


def _nested(given: dict[str, Given], problems: list[Problem]) -> dict[str, Any]:
    """Nest the values into sections and expand paths; add errors to `problems`."""
    nested: dict[str, Any] = {}
    for name, entry in given.items():
        value = _to_python(keys()[name], entry.value)
        if name in PATH_KEYS:
            try:
                value = expand_all(value)
            except ArgumentError as error:
                problems.append(Problem(entry.where, f"{entry.name()}: {error.cause}", error.remedy))
        *path, last = name.split(".")
        section = nested
        for word in path:
            section = section.setdefault(word, {})
        section[last] = value
    return nested


def _wrong_values(error: ValidationError, given: dict[str, Given]) -> list[Problem]:
    """Return a problem for each key whose value has the wrong type or is out of range."""
    problems: dict[str, Problem] = {}
    for detail in error.errors(include_url=False):
        name = _key_at(detail["loc"])
        problems.setdefault(name, _wrong_value(keys()[name], given[name], detail))
    return list(problems.values())


def _to_python(key: Key, value: object) -> object:
    """Convert a YAML value: a list becomes a tuple, and `1e3` an int if the key takes one."""
    if isinstance(value, list):
        return tuple(value)
    whole = key.takes(int) or _takes_size(key)
    if isinstance(value, float) and whole and value.is_integer() and abs(value) <= EXACT_FLOATS:
        return int(value)
    return value


def _key_at(location: tuple[int | str, ...]) -> str:
    """Return the key at or above a location in the nested values, such as ("optimizer", "betas", 0)."""
    names = (".".join(map(str, location[:depth])) for depth in range(len(location), 0, -1))
    return next(name for name in names if name in keys())


def _takes_size(key: Key) -> bool:
    return key.takes(Size) or key.takes(SizeOrZero)


def _wrong_value(key: Key, given: Given, detail: ErrorDetails) -> Problem:
    if detail["type"] == PROBLEM:
        return Problem(given.where, f"{given.name()}: {detail['msg']}", f"It takes {key.accepts}.")
    if _takes_size(key):
        try:
            parse_size(given.value, name=given.name(), zero=key.takes(SizeOrZero))  # type: ignore[arg-type]
        except ArgumentError as error:
            return Problem(given.where, error.cause, f"{error.remedy} Left out, it is {show(key.default)}.")
    cause = f"{given.name()} takes {key.accepts}; got {show(given.value)}"
    return Problem(given.where, cause, f"{_hint(key, given.value)}Left out, it is {show(key.default)}.")


def _hint(key: Key, value: object) -> str:
    """Return a hint on what was probably meant, or ""."""
    if isinstance(value, dict) and key.name in PATH_KEYS:
        return "Text that begins with { needs quotes. "
    if value is None and key.name in PATH_KEYS:
        return "A ~ alone is YAML's null; your home folder is ~/. "
    if isinstance(value, str):
        if key.takes(bool) and value.lower() in ("yes", "no", "on", "off"):
            return "Write true or false. "
        if (key.takes(int) or key.takes(float)) and _NUMBER.fullmatch(value):
            return "Write the number without quotes, commas or underscores. "
        near = nearest(value, key.accepts.rpartition("one of ")[2].split(", ") if "one of " in key.accepts else [])
        return f"Did you mean {near}? " if near else ""
    if key.takes(str) and isinstance(value, bool | int | float):
        return f'If text is meant, write "{show(value)}" in quotes. '
    return ""
