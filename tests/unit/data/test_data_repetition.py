"""The count of token sequences: against its plain definition, and on texts where the answer is known."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sophia_galore.data.example import Example
from sophia_galore.data.repetition import ORDER, repetition


def example(tokens: Sequence[int], counted: Sequence[bool] | None = None) -> Example:
    return Example.of(list(tokens), list(counted or [True] * len(tokens)), "x:1")


def plainly(train: Sequence[Sequence[int]], text: Sequence[int], vocabulary: int) -> list[float]:
    """Probability of each token of a text by the formula, with dictionaries."""
    after: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    for tokens in train:
        for place in range(len(tokens)):
            for order in range(min(place, ORDER) + 1):
                after[tuple(tokens[place - order : place])][tokens[place]] += 1

    def probability(context: tuple[int, ...], token: int) -> float:
        lower = probability(context[1:], token) if context else 1 / vocabulary
        counts = after.get(context)
        if not counts:
            return lower
        return (counts[token] + len(counts) * lower) / (counts.total() + len(counts))

    return [probability(tuple(text[max(0, place - ORDER) : place]), text[place]) for place in range(len(text))]


TEXTS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=30), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(TEXTS, st.lists(st.integers(0, 6), min_size=2, max_size=30))
def test_it_is_the_formula(train: list[list[int]], text: list[int]) -> None:
    vocabulary = 1 + max(max(text), max(max(tokens) for tokens in train))
    found = repetition([example(tokens) for tokens in train], [example(text)])
    expected = plainly(train, text, vocabulary)[1:]  # the first token never counts
    assert found is not None
    # Both sum in float64; the worst seen was 2e-16 relative.
    assert found.loss == pytest.approx(-sum(map(math.log, expected)) / len(expected), rel=1e-12)
    assert found.share == sum(value > 0.5 for value in expected) / len(expected)


def test_a_text_that_was_read_is_told_and_another_is_not() -> None:
    template = list(range(100, 140))
    train = [example([number, *template]) for number in range(20)]
    mask = [False, *[True] * 40]
    told = repetition(train, [example([77, *template], mask)])
    foreign = repetition(train, [example([77, *range(200, 240)], mask)])
    assert told is not None and foreign is not None
    # 39 of 40 tokens came 20 times after the same ones: (20 + lower) / 21 and better, so 0.03 together. What follows 77
    # was never seen; among 41 equally frequent tokens that costs log(41) / 40 = 0.09 and a little.
    assert told.share == 39 / 40 and told.loss < 0.13
    assert foreign.share == 0.0 and foreign.loss > math.log(100)


def test_only_counted_tokens_are_asked_for() -> None:
    train = [example([1, 2, 3, 4])]
    known, unknown = (
        repetition(train, [example([1, 2, 3, 9], mask)])
        for mask in ([False, True, True, False], [False, False, False, True])
    )
    assert known is not None and unknown is not None
    assert known.loss < unknown.loss


def test_without_an_evaluation_there_is_nothing_to_say() -> None:
    assert repetition([example([1, 2])], []) is None
    assert repetition([example([1, 2])], [example([3])]) is None


def test_sequences_do_not_reach_over_the_border_of_examples() -> None:
    apart = repetition([example([1, 2]), example([3, 4])], [example([2, 3])])
    together = repetition([example([1, 2, 3, 4])], [example([2, 3])])
    assert apart is not None and together is not None
    assert apart.loss > together.loss
