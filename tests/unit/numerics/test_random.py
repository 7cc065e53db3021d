"""Randomness is a function of seed and purpose."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.numerics.random import generator, key

PURPOSE = st.lists(st.one_of(st.text(max_size=5), st.integers(0, 99)), max_size=4)


@given(st.integers(0, 2**62), PURPOSE, st.integers(0, 2**62), PURPOSE)
def test_same_arguments_same_key_others_another(seed: int, purpose: list, other: int, aim: list) -> None:  # type: ignore[type-arg]
    assert key(seed, *purpose) == key(seed, *purpose)
    assert 0 <= key(seed, *purpose) < 2**63
    if (seed, purpose) != (other, aim):
        assert key(seed, *purpose) != key(other, *aim)


def test_words_and_numbers_are_told_apart() -> None:
    assert len({key(1, "a", 1), key(1, "a1"), key(1, "a", "1"), key(1, 1, "a"), key(11, "a"), key(1)}) == 6


def test_draws_don_t_depend_on_what_was_drawn_before() -> None:
    first = torch.rand(5, generator=generator(3, "x", 1))
    torch.rand(100, generator=generator(3, "y", 1))
    torch.rand(100)
    assert torch.equal(first, torch.rand(5, generator=generator(3, "x", 1)))


def test_keys_are_pinned() -> None:
    """Checkpoints of earlier versions resume to the same bits only while this number stays."""
    assert key(42, "rounding", "w", 1) == 2192439494819128339
