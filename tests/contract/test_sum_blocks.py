"""With `distributed.sum_blocks` no bit depends on the number of processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from contract.test_placements import SETTINGS, words_of
from contract.test_processes import DEALT, by_processes
from placed import Left, PlacedRuns, assert_same

BLOCKS = (*DEALT, "distributed.sum_blocks=4")
SOON = {(0, 2), (4, 4), (12, 2), (16, 2), (21, 4)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> PlacedRuns:
    return PlacedRuns(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def by_one_process(runs: PlacedRuns) -> Callable[[int], Left]:
    @cache
    def left(number: int) -> Left:
        return runs.train(runs.folder / f"one-{number}", SETTINGS[number][2], *BLOCKS, *words_of(number))

    return left


@pytest.mark.parametrize(
    ("number", "count"),
    [
        pytest.param(
            number,
            count,
            id=f"{', '.join(SETTINGS[number])}: {count}",
            marks=[] if (number, count) in SOON else [pytest.mark.thorough],
        )
        for number in range(len(SETTINGS))
        for count in (2, 4)
    ],
)
def test_no_bit_depends_on_the_number_of_processes(
    number: int, count: int, runs: PlacedRuns, by_one_process: Callable[[int], Left], tmp_path: Path
) -> None:
    found = by_processes(count, runs, tmp_path / "run", SETTINGS[number][2], *BLOCKS, *words_of(number))
    assert_same(found, by_one_process(number))
