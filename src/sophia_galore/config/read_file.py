"""A YAML file, read into values that know their line."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from ruamel.yaml.nodes import MappingNode

from sophia_galore.config.given import Given
from sophia_galore.config.problems import Problem
from sophia_galore.config.yaml_core import YAMLError, compose, entries, plain_words
from sophia_galore.errors import ConfigError


def read_file(path: Path) -> list[Given | Problem]:
    """All values of a configuration file.

    Args:
        path: A YAML file in UTF-8.

    Returns:
        Values and problems in the order of the file.

    Raises:
        ConfigError: If the file as a whole can't be read.
    """
    text = _read_text(path)
    try:
        root = compose(text)
    except (YAMLError, RecursionError) as error:
        cause = f"{path}:{_line_of(error, text)}: this is no valid YAML: {plain_words(error)}"
        raise ConfigError(
            cause, "Correct the line; sections are indented with spaces, values follow `key: `."
        ) from None
    if root is None:
        raise ConfigError(f"{path}:1: the configuration file is empty", "Write at least one section, as `model:`.")
    if not isinstance(root, MappingNode):
        line = root.start_mark.line + 1
        cause = f"{path}:{line}: the top level is not made of `key: value` lines"
        raise ConfigError(cause, "Begin with a section, as `model:`.")
    return entries(root, lambda node: f"{path}:{node.start_mark.line + 1}")


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"the configuration file {path} does not exist", _neighbour(path)) from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, not a configuration file", "Name a YAML file inside it.") from None
    except OSError as error:
        cause = f"the configuration file {path} can't be read: {error.strerror}"
        raise ConfigError(cause, "Check its path and its permissions.") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: the file is not UTF-8 text", "Save it again as UTF-8.") from None


def _neighbour(path: Path) -> str:
    """A remedy for a file that is not there: the one beside it that looks most like it."""
    beside = sorted(p.name for p in path.parent.iterdir() if p.is_file()) if path.parent.is_dir() else []
    found = get_close_matches(path.name, beside, n=1)
    return f"Did you mean {path.parent / found[0]}?" if found else "Check the path."


def _line_of(error: Exception, text: str) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        return int(mark.line) + 1
    position = getattr(error, "position", 0)
    return text.count("\n", 0, position) + 1
