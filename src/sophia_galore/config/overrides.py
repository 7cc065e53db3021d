"""Words of the form `training.max_steps=20`, as the command line passes them on."""

from __future__ import annotations

from collections.abc import Sequence

from sophia_galore.config.given import Given
from sophia_galore.config.problems import Problem
from sophia_galore.config.yaml_core import YAMLError, compose, one_entry, plain_words


def read_overrides(words: Sequence[str]) -> list[Given | Problem]:
    """The values that override words ask for, in their order.

    Args:
        words: Each `key=value`; the value is read as YAML, so `null`, `true` and `[0.9, 0.99]` work.
    """
    return [entry for word in words for entry in _read(word)]


def _read(word: str) -> list[Given | Problem]:
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
    return one_entry(key, node, node, lambda _: where)
