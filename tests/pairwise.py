"""Which combinations of a test that is crossed are in the default run: so many that each pair of words meets.

A fault that needs three words at once is found by the rest, which run as `thorough`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from itertools import combinations
from typing import Any

import pytest

Word = tuple[str, str]


def leave_to_thorough(items: Sequence[pytest.Item]) -> None:
    """Mark as `thorough` what the other combinations of a test marked `pairwise` make up for.

    Args:
        items: Everything that was collected. A combination that is asked for by its own name stands alone, and runs.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("pairwise") is not None and hasattr(item, "callspec"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in tests.values():
        words = [words_of(item.callspec.params) for item in found]  # type: ignore[attr-defined]
        chosen = set(covering(words))
        for index, item in enumerate(found):
            if index not in chosen:
                item.add_marker(pytest.mark.thorough)


def words_of(params: dict[str, Any]) -> list[Word]:
    """A combination's words: the values of its parameters, of a dataclass those of its fields."""
    words: list[Word] = []
    for name, value in params.items():
        if is_dataclass(value):
            words += [(f"{name}.{field.name}", repr(getattr(value, field.name))) for field in fields(value)]
        else:
            words.append((name, repr(value)))
    return words


def covering(cases: Sequence[Iterable[Word]]) -> list[int]:
    """Indices of cases among which each pair of words meets that meets in any: always the one with most new pairs."""
    pairs = [set(combinations(words, 2)) or {(word,) for word in words} for words in map(list, cases)]
    missing: set[Any] = set().union(*pairs)
    chosen: list[int] = []
    while missing:
        best = max(range(len(pairs)), key=lambda index: len(pairs[index] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return sorted(chosen)
