from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.data.batches import (
    IGNORED,
    MicroBatch,
    collate,
    epoch_order,
    eval_batches,
    largest_step,
    window,
    windows,
)
from sophia_galore.data.example import Example

PAD = 0


def make(length: int, number: int = 1) -> Example:
    return Example.of([100 * number + i for i in range(length)], [i % 3 != 1 for i in range(length)], f"x:{number}")


examples_strategy = st.lists(st.integers(2, 9), min_size=1, max_size=20).map(
    lambda lengths: [make(length, number) for number, length in enumerate(lengths, start=1)]
)


def rows(batches: list[MicroBatch]) -> list[int]:
    return [int(row[0]) // 100 for batch in batches for row in batch.input_ids]


@given(st.integers(1, 200), st.integers(0, 2**63 - 1), st.integers(0, 1000))
def test_an_epoch_visits_everything_once_in_an_order_of_its_own(n: int, seed: int, epoch: int) -> None:
    order = epoch_order(n, seed, epoch)
    assert sorted(order) == list(range(n))
    assert order == epoch_order(n, seed, epoch)


def test_seeds_and_epochs_differ() -> None:
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}) == 25


def test_the_order_is_frozen() -> None:
    # A change here breaks resuming of runs that were started with an older version.
    assert epoch_order(8, 42, 0) == [0, 6, 7, 5, 4, 2, 1, 3]
    assert epoch_order(8, 42, 1) == [4, 0, 5, 6, 2, 7, 1, 3]


@given(examples_strategy, st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_the_windows_of_an_epoch_are_its_order_in_pieces(
    examples: list[Example], batch_size: int, accumulation: int, epoch: int
) -> None:
    n = len(examples)
    steps = windows(n, batch_size, accumulation)
    assert (steps - 1) * batch_size * accumulation < n <= steps * batch_size * accumulation
    seen: list[int] = []
    for index in reversed(range(steps)):  # any order: there is no state
        step = window(
            examples,
            seed=7,
            epoch=epoch,
            index=index,
            batch_size=batch_size,
            accumulation=accumulation,
            pad_id=PAD,
        )
        if index < steps - 1:
            assert [len(batch.input_ids) for batch in step] == [batch_size] * accumulation
        seen = rows(step) + seen
    assert seen == [i + 1 for i in epoch_order(n, 7, epoch)]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_window_that_is_not_there(index: int) -> None:
    with pytest.raises(IndexError):
        window([make(3)] * 4, seed=0, epoch=0, index=index, batch_size=1, accumulation=2, pad_id=PAD)


@given(examples_strategy)
def test_labels_are_the_next_token_where_it_counts(examples: list[Example]) -> None:
    batch = collate(examples, PAD)
    longest = max(example.num_tokens for example in examples)
    assert batch.input_ids.shape == batch.labels.shape == (len(examples), longest)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    for row, example in enumerate(examples):
        ids, counted, length = example.input_ids.tolist(), example.counted.tolist(), example.num_tokens
        assert batch.input_ids[row].tolist() == ids + [PAD] * (longest - length)
        targets = [ids[t + 1] if counted[t + 1] else IGNORED for t in range(length - 1)]
        assert batch.labels[row].tolist() == targets + [IGNORED] * (longest - length + 1)
    if len({example.num_tokens for example in examples}) == 1:
        assert batch.attention_mask is None
    else:
        assert batch.attention_mask is not None and batch.attention_mask.dtype == torch.int64
        expected = [[int(t < example.num_tokens) for t in range(longest)] for example in examples]
        assert batch.attention_mask.tolist() == expected
    assert batch.num_tokens == sum(example.num_tokens for example in examples)
    assert batch.num_counted == int((batch.labels != IGNORED).sum()) == sum(e.num_counted for e in examples)


@given(examples_strategy, st.integers(1, 5))
def test_eval_batches_hold_everything_once_longest_first(examples: list[Example], batch_size: int) -> None:
    batches = eval_batches(examples, batch_size, PAD)
    assert sorted(rows(batches)) == list(range(1, len(examples) + 1))
    lengths = [batch.input_ids.shape[1] for batch in batches]
    assert lengths == sorted(lengths, reverse=True)
    assert all(len(batch.input_ids) == batch_size for batch in batches[:-1])


def test_no_examples_no_batches() -> None:
    assert eval_batches([], 4, PAD) == []


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=23),
    batch_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    num_steps=st.integers(1, 30),
    seed=st.integers(0, 5),
)
def test_the_largest_step_is_one_of_the_run_and_none_is_larger(
    lengths: list[int], batch_size: int, accumulation: int, num_steps: int, seed: int
) -> None:
    examples = [Example.of([1] * length, [True] * length, "") for length in lengths]
    shape = {"seed": seed, "batch_size": batch_size, "accumulation": accumulation, "pad_id": 0}
    found = largest_step(examples, num_steps=num_steps, **shape)
    each = windows(len(examples), batch_size, accumulation)
    run = [window(examples, epoch=step // each, index=step % each, **shape) for step in range(num_steps)]
    numbers = [sum(batch.input_ids.numel() for batch in batches) for batches in run]
    shapes = [[batch.input_ids.shape for batch in batches] for batches in run]
    assert [batch.input_ids.shape for batch in found] == shapes[numbers.index(max(numbers))]
