"""The default run's share of what is crossed: each pair of words meets, and the rest is left to the thorough run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise, product

import pytest

from in_part import CASES, spread
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


@pytest.mark.parametrize(("count", "num_kept"), [(1, 0), (1, 1), (2, 5), (10, 3), (163, 40), (7, 7)])
def test_cases_are_spread_over_all(count: int, num_kept: int) -> None:
    kept = sorted(spread(count, num_kept))
    assert len(kept) == min(count, num_kept) and kept[:1] == [0][: len(kept)]
    gaps = {after - before for before, after in pairwise(kept)}
    assert max(gaps, default=0) - min(gaps, default=0) <= 1


def test_the_table_is_sorted() -> None:
    assert list(CASES) == sorted(CASES)
