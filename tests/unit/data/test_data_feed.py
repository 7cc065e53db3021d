"""Which examples a step gets: a function of seed and step, every example once an epoch, packed or not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.config import load_config
from sophia_galore.data.batches import MicroBatch
from sophia_galore.data.example import Example
from sophia_galore.data.feed import Arrangement, Feed
from sophia_galore.data.order import epoch_order, grouped_order
from sophia_galore.data.packing import pack

MAX_LENGTH = 40
ARRANGED: dict[Arrangement, list[str]] = {
    "shuffled": [],
    "grouped": ["data.group_by_length=true"],
    "packed": ["data.packing=true"],
}
lengths_strategy = st.lists(st.integers(2, MAX_LENGTH), min_size=1, max_size=40)
arranged = pytest.mark.parametrize("arrangement", ARRANGED)


def feed_of(
    lengths: list[int],
    arrangement: Arrangement = "shuffled",
    *,
    batch_size: int = 1,
    accumulation: int = 1,
    seed: int = 7,
) -> Feed:
    """Examples whose tokens are their numbers, from 1."""
    examples = [Example.of([n] * length, [True] * length, "") for n, length in enumerate(lengths, 1)]
    words = [
        f"training.batch_size={batch_size}",
        f"training.gradient_accumulation_steps={accumulation}",
        f"training.max_length={MAX_LENGTH}",
        f"training.seed={seed}",
        *ARRANGED[arrangement],
    ]
    return Feed.of(load_config(None, words), examples)


def tokens(batches: list[MicroBatch]) -> dict[int, int]:
    """By example, how many of its tokens there are."""
    every = torch.cat([batch.input_ids.flatten() for batch in batches])
    numbers, counts = every[every != 0].unique(return_counts=True)
    return dict(zip(numbers.tolist(), counts.tolist(), strict=True))


# ---- order


@given(st.integers(1, 200), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_an_epoch_visits_everything_once_in_an_order_of_its_own(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert order == epoch_order(n, seed, epoch)


def test_seeds_and_epochs_differ() -> None:
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25
    lengths = tuple(range(50))
    assert len({grouped_order(lengths, 2, seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


def test_the_orders_are_frozen() -> None:
    # A change here breaks resuming of runs that were started with an older version.
    assert epoch_order(8, 42, 0) == [0, 6, 7, 5, 4, 2, 1, 3]
    assert epoch_order(8, 42, 1) == [4, 0, 5, 6, 2, 7, 1, 3]
    lengths = (5, 9, 2, 7, 7, 3, 8, 4, 6)
    assert grouped_order(lengths, 2, 42, 0) == (0, 5, 3, 2, 1, 8, 6, 4, 7)
    assert pack(lengths, 12, 42) == ((1, 5), (6, 7), (3, 2), (4, 0), (8,))


@given(lengths_strategy, st.integers(1, 4), st.integers(0, 3))
def test_grouped_everything_comes_once_and_a_part_at_the_end(lengths: list[int], batch_size: int, epoch: int) -> None:
    order = grouped_order(tuple(lengths), batch_size, 3, epoch)
    assert sorted(order) == list(range(len(lengths)))


def test_grouped_micro_batches_waste_less() -> None:
    lengths = torch.randint(2, MAX_LENGTH, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    feed = feed_of(lengths, "grouped", batch_size=4, accumulation=8)
    assert feed.shuffled().fill < 0.7  # uniform lengths: half of the longest of four, which is four fifths
    assert feed.fill > 0.97
    in_steps = [sum(batch.num_tokens for batch in feed.step(step)) for step in range(1, feed.steps_per_epoch)]
    # Steps have short micro-batches beside long ones: their mean is 672, all short or all long would be 64 and 1280.
    assert min(in_steps) > 350 and max(in_steps) < 1000


# ---- packing


@given(lengths_strategy, st.integers(0, 5))
def test_no_example_is_left_out_and_no_row_overflows(lengths: list[int], seed: int) -> None:
    rows = pack(tuple(lengths), MAX_LENGTH, seed)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[number] for number in row) for row in rows)
    assert sums[-1] <= MAX_LENGTH
    assert len(sums) == 1 or sums[0] + sums[1] > MAX_LENGTH


def test_short_examples_fill_rows() -> None:
    lengths = tuple(torch.randint(20, 201, (1000,), generator=torch.Generator().manual_seed(0)).tolist())
    rows = pack(lengths, 512, 0)
    assert sum(lengths) / (512 * len(rows)) > 0.99
    assert rows == pack(lengths, 512, 0) != pack(lengths, 512, 1)


# ---- steps


@arranged
@given(lengths=lengths_strategy, batch_size=st.integers(1, 4), accumulation=st.integers(1, 4), epoch=st.integers(0, 3))
def test_the_steps_of_an_epoch_hold_every_example_once(
    arrangement: Arrangement, lengths: list[int], batch_size: int, accumulation: int, epoch: int
) -> None:
    feed = feed_of(lengths, arrangement, batch_size=batch_size, accumulation=accumulation)
    first, steps = 1 + epoch * feed.steps_per_epoch, feed.steps_per_epoch
    seen: list[MicroBatch] = []
    for number in reversed(range(first, first + steps)):  # any order: there is no state
        step = feed.step(number)
        if number < first + steps - 1:
            assert [len(batch.input_ids) for batch in step] == [batch_size] * accumulation
        else:
            rows_left = len(feed.rows) - (steps - 1) * batch_size * accumulation
            assert sum(len(batch.input_ids) for batch in step) == rows_left > 0
        seen += step
    assert tokens(seen) == dict(enumerate(lengths, 1))
    assert tokens(feed.longest_first()) == dict(enumerate(lengths, 1))


def test_the_shuffled_steps_are_the_order_in_pieces() -> None:
    feed = feed_of([2, 3, 4, 5, 6], batch_size=2)
    rows = [int(row[0]) - 1 for step in (4, 5, 6) for batch in feed.step(step) for row in batch.input_ids]
    assert rows == epoch_order(5, 7, 1)


@arranged
@given(lengths=lengths_strategy, batch_size=st.integers(1, 5))
def test_evaluation_begins_with_the_longest(arrangement: Arrangement, lengths: list[int], batch_size: int) -> None:
    batches = feed_of(lengths, arrangement, batch_size=batch_size).longest_first()
    widths = [batch.input_ids.shape[1] for batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert all(len(batch.input_ids) == batch_size for batch in batches[:-1])


@arranged
def test_no_examples_no_batches(arrangement: Arrangement) -> None:
    assert feed_of([], arrangement).longest_first() == []


# ---- the largest


def sizes(batches: list[MicroBatch]) -> tuple[int, int]:
    """Places for tokens, and the sum of the squares of the examples' lengths."""
    return sum(batch.input_ids.numel() for batch in batches), sum(count**2 for count in tokens(batches).values())


@arranged
@given(
    lengths=lengths_strategy,
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    num_steps=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_the_largest_step_is_one_of_the_run_and_none_is_larger(
    arrangement: Arrangement, lengths: list[int], batch_size: int, accumulation: int, num_steps: int, seed: int
) -> None:
    feed = feed_of(lengths, arrangement, batch_size=batch_size, accumulation=accumulation, seed=seed)
    found = feed.largest_step(num_steps)
    run = [feed.step(step) for step in range(1, num_steps + 1)]
    assert sizes(found) == max(map(sizes, run))
    shapes = [[batch.input_ids.shape for batch in batches] for batches in run]
    assert [batch.input_ids.shape for batch in found] in shapes


@arranged
@given(lengths=lengths_strategy, batch_size=st.integers(1, 4), accumulation=st.integers(1, 3))
def test_no_step_is_larger_than_the_largest_window(
    arrangement: Arrangement, lengths: list[int], batch_size: int, accumulation: int
) -> None:
    feed = feed_of(lengths, arrangement, batch_size=batch_size, accumulation=accumulation)
    window = feed.largest_window()
    for number in range(1, 1 + 2 * feed.steps_per_epoch):
        step = feed.step(number)
        assert len(step) <= len(window)
        # In all, and each micro-batch by itself: places, and pairs of tokens that see each other.
        assert all(ours <= theirs for ours, theirs in zip(sizes(step), sizes(window), strict=True))
        assert max(batch.input_ids.numel() for batch in step) <= max(batch.input_ids.numel() for batch in window)
        if arrangement == "packed":
            assert max(sizes([batch])[1] for batch in step) <= max(sizes([batch])[1] for batch in window)
