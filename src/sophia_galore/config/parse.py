"""Parse a YAML file and overrides into values with their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

from sophia_galore.config.keys import children, sections
from sophia_galore.config.problems import Given, Problem
from sophia_galore.config.yaml_core import YAMLError, compose, plain_words, value_of
from sophia_galore.errors import ConfigError


def read_file(path: Path) -> list[Given | Problem]:
    """Read all values of a configuration file.

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
    return _entries(root, lambda node: f"{path}:{node.start_mark.line + 1}")


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
    """Suggest a file with a similar name for one that does not exist."""
    beside = sorted(p.name for p in path.parent.iterdir() if p.is_file()) if path.parent.is_dir() else []
    found = get_close_matches(path.name, beside, n=1)
    return f"Did you mean {path.parent / found[0]}?" if found else "Check the path."


def _line_of(error: Exception, text: str) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    if mark is not None:
        return int(mark.line) + 1
    position = getattr(error, "position", 0)
    return text.count("\n", 0, position) + 1


def read_overrides(words: Sequence[str]) -> list[Given | Problem]:
    """Parse overrides, in order.

    Args:
        words: Each `key=value`; the value is read as YAML, so `null`, `true` and `[0.9, 0.99]` work.
    """
    return [entry for word in words for entry in _read_override(word)]


def _read_override(word: str) -> list[Given | Problem]:
    where = f"in the override '{word}'"
    key, equals, text = word.partition("=")
    key = key.strip()
    if not equals or not key:
        return [Problem(where, "an override has the form key=value", "Write it as training.max_steps=20.")]
    try:
        node = compose(text)
    except (YAMLError, RecursionError) as error:
        cause = f"the value can't be read: {plain_words(error)}"
        return [Problem(where, cause, f"Put the value in quotes: {key}='\"...\"'.")]
    if node is None:
        return [Problem(where, "there is no value after '='", f"Write {key}=null if you mean none.")]
    return _one_entry(key, node, node, lambda _: where)


def _entries(node: Node, locate: Callable[[Node], str], prefix: str = "") -> list[Given | Problem]:
    """Return every value below a node.

    Args:
        node: A section of the document; null is an empty section.
        locate: Returns the place of a node, for messages.
        prefix: Dotted name of the section; "" is the top level.

    Returns:
        Values and problems in the order of the text.
    """
    if isinstance(node, ScalarNode) and str(node.tag).endswith(":null"):
        return []
    if not isinstance(node, MappingNode):
        words = ", ".join(children(prefix))
        return [Problem(locate(node), f"{prefix} is a section, not a value", f"Keys under it: {words}.")]
    found: list[Given | Problem] = []
    places: dict[str, str] = {}
    for key_node, value_node in node.value:
        where = locate(key_node)
        if not isinstance(key_node, ScalarNode) or not key_node.value:
            found.append(Problem(where, "a key must be a word", "Write `key: value`."))
            continue
        name = f"{prefix}.{key_node.value}" if prefix else key_node.value
        if name in places:
            cause = f"'{name}' stands twice in the same section, first at {places[name]}"
            found.append(Problem(where, cause, "Keep one of them."))
            continue
        places[name] = where
        found.extend(_one_entry(name, key_node, value_node, locate))
    return found


def _one_entry(name: str, key_node: Node, value_node: Node, locate: Callable[[Node], str]) -> list[Given | Problem]:
    """Return the values of one key: a whole section, or a single value."""
    if name in sections():
        return _entries(value_node, locate, name)
    try:
        value = value_of(value_node)
    except (YAMLError, ValueError, RecursionError) as error:
        cause = f"the value of '{name}' can't be read: {plain_words(error)}"
        return [Problem(locate(key_node), cause, "Write a plain value, text in quotes, or a list.")]
    return [Given(name, value, locate(key_node), name)]
