"""The way from a file and some override words to a `RunConfig`.

read -> settle (aliases, unknown keys, contradicting lines) -> build (types and limits)
-> check (contradictions between options). Each stage reports all it finds in one error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sophia_galore.config.check import contradictions
from sophia_galore.config.data_source import PROBLEM
from sophia_galore.config.given import Given
from sophia_galore.config.keys import Key, keys
from sophia_galore.config.nearest import nearest
from sophia_galore.config.overrides import read_overrides
from sophia_galore.config.paths import PATH_KEYS, expand_all
from sophia_galore.config.problems import Problem, raise_problems, show
from sophia_galore.config.read_file import read_file
from sophia_galore.config.schema import RunConfig
from sophia_galore.config.settle import settle
from sophia_galore.config.size import Size, SizeOrZero, parse_size
from sophia_galore.errors import ArgumentError

_NUMBER = re.compile(r"[-+]?[0-9.,_]+([eE][-+]?[0-9]+)?")
"""Text that was surely meant as a number."""

EXACT_FLOATS = 2**53
"""Up to here every whole number is a float, so `1e3` for a whole number is no rounding."""


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads what was asked of a run.

    Args:
        path: YAML file; None: the defaults.
        overrides: Words `key.path=value`, applied in order over the file; the last one wins.

    Returns:
        A complete, frozen configuration without contradictions.

    Raises:
        ConfigError: Naming the file and line, or the override, of everything that is wrong.
    """
    file = read_file(Path(path)) if path is not None else []
    given, problems = settle(file, read_overrides(overrides))
    config, wrong = _build(given)
    problems.extend(wrong)
    raise_problems(problems)
    assert config is not None  # without problems there is a configuration
    raise_problems(contradictions(config, {key: entry.where for key, entry in given.items()}))
    return config


def _build(given: dict[str, Given]) -> tuple[RunConfig | None, list[Problem]]:
    nested: dict[str, Any] = {}
    unknown: list[Problem] = []
    for name, entry in given.items():
        value = _natural(keys()[name], entry.value)
        if name in PATH_KEYS:
            try:
                value = expand_all(value)
            except ArgumentError as error:
                unknown.append(Problem(entry.where, f"{entry.name()}: {error.cause}", error.remedy))
        *path, last = name.split(".")
        section = nested
        for word in path:
            section = section.setdefault(word, {})
        section[last] = value
    try:
        # Strict: otherwise true passes as 1, "3" as 3 and 1 as true.
        return RunConfig.model_validate(nested, strict=True), unknown
    except ValidationError as error:
        problems: dict[str, Problem] = {}
        for detail in error.errors(include_url=False):
            name = _key_at(detail["loc"])
            if name in given and detail["type"] == PROBLEM:
                cause = f"{given[name].name()}: {detail['msg']}"
                problems[name] = Problem(given[name].where, cause, f"It takes {keys()[name].accepts}.")
            elif name in given:
                problems.setdefault(name, _wrong_value(keys()[name], given[name]))
            else:
                text = detail["msg"].removeprefix("Value error, ")
                problems.setdefault(text, Problem("", f"{name}: {text}" if name else text, ""))
        return None, [*unknown, *problems.values()]


def _natural(key: Key, value: object) -> object:
    """YAML's types in Python's: lists are tuples, and `1e3` is a whole number where one is wanted."""
    if isinstance(value, list):
        return tuple(value)
    whole = key.takes(int) or _takes_size(key)
    if isinstance(value, float) and whole and value.is_integer() and abs(value) <= EXACT_FLOATS:
        return int(value)
    return value


def _key_at(location: tuple[int | str, ...]) -> str:
    """The key at or above a place in the nested values, such as ("optimizer", "betas", 0)."""
    words = [str(word) for word in location]
    names = (".".join(words[:depth]) for depth in range(len(words), 0, -1))
    return next((name for name in names if name in keys()), ".".join(words))


def _takes_size(key: Key) -> bool:
    return key.takes(Size) or key.takes(SizeOrZero)


def _wrong_value(key: Key, given: Given) -> Problem:
    if _takes_size(key):
        try:
            parse_size(given.value, name=given.name(), zero=key.takes(SizeOrZero))  # type: ignore[arg-type]
        except ArgumentError as error:
            return Problem(given.where, error.cause, f"{error.remedy} Left out, it is {show(key.default)}.")
    cause = f"{given.name()} takes {key.accepts}; got {show(given.value)}"
    return Problem(given.where, cause, f"{_hint(key, given.value)}Left out, it is {show(key.default)}.")


def _hint(key: Key, value: object) -> str:
    """What was probably meant, if that can be told."""
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
