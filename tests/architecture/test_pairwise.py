"""The default run's share of what is crossed: each pair of words meets, and the rest is left to the thorough run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, product

from pairwise import covering, words_of


@dataclass(frozen=True)
class Made:
    """A combination in one value."""

    kind: str
    size: int


def test_each_pair_meets_in_few() -> None:
    cases = [
        words_of({"a": a, "made": Made(b, c), "d": d}) for a, b, c, d in product("xyz", "xyz", (1, 2), (None, True))
    ]
    chosen = covering(cases)
    assert 9 <= len(chosen) <= 12 < len(cases) == 36
    assert set().union(*(combinations(cases[index], 2) for index in chosen)) == set().union(
        *(combinations(case, 2) for case in cases)
    )


def test_what_can_not_be_left_out_is_not() -> None:
    assert covering([[("a", "x")]]) == [0]
    assert covering([[("a", word)] for word in "xyz"]) == [0, 1, 2]
    assert covering([]) == []
