"""Sums in the order of a tree: the same bits however subtrees are dealt out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sophia_galore.numerics.pairwise_sum import PairwiseSum


def terms_of(num_blocks: int) -> list[Tensor]:
    """Float32 terms of which another order gives another sum."""
    draw = torch.Generator().manual_seed(num_blocks)
    return [torch.randn(257, generator=draw) * 10.0**power for power in range(num_blocks)]


def total(terms: dict[int, Tensor]) -> Tensor:
    sums = PairwiseSum()
    for block, term in terms.items():
        sums.add(block, {"a": term.clone()})
    return sums.total()["a"]


def by_halves(terms: Sequence[Tensor]) -> Tensor:
    """The definition: half of them, and the other half."""
    if len(terms) == 1:
        return terms[0]
    middle = len(terms) // 2
    return by_halves(terms[:middle]) + by_halves(terms[middle:])


@pytest.mark.parametrize("num_blocks", [1, 2, 4, 8, 16])
def test_halves_are_summed_first(num_blocks: int) -> None:
    terms = terms_of(num_blocks)
    found = total(dict(enumerate(terms)))
    assert torch.equal(found, by_halves(terms))
    if num_blocks > 2:
        assert not torch.equal(found, reduce(torch.add, terms)), "the order would not matter"


@given(st.sets(st.integers(0, 15), min_size=1), st.sampled_from([1, 2, 4, 8, 16]))
def test_no_bit_depends_on_who_sums_which_part(blocks: set[int], num_parts: int) -> None:
    terms = {block: term for block, term in enumerate(terms_of(16)) if block in blocks}
    size = 16 // num_parts
    parts = [
        {block - part * size: term for block, term in terms.items() if block // size == part}
        for part in range(num_parts)
    ]
    sums = {number: total(part) for number, part in enumerate(parts) if part}
    assert torch.equal(total(sums), total(terms))


def test_a_block_may_lack_a_tensor() -> None:
    sums = PairwiseSum()
    one, two = torch.ones(2), torch.ones(2)
    sums.add(0, {"a": one})
    sums.add(1, {"b": two})
    sums.add(3, {"a": torch.ones(2)})
    found = sums.total()
    assert found["a"].tolist() == [2, 2] and found["b"] is two
    assert sums.total() == {}


def test_few_sums_wait() -> None:
    sums = PairwiseSum()
    most = 0
    for block in range(16):
        sums.add(block, {"a": torch.ones(1)})
        most = max(most, len(sums._waiting))
    assert most == 4 and sums.total()["a"].item() == 16
