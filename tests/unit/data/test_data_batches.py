"""Examples become token ids and targets, one a row or several side by side."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.data.batches import IGNORED, collate
from sophia_galore.data.example import Example

PAD = 0


def make(length: int, number: int = 1) -> Example:
    return Example.of([100 * number + i for i in range(length)], [i % 3 != 1 for i in range(length)], f"x:{number}")


examples_strategy = st.lists(st.integers(2, 9), min_size=1, max_size=20).map(
    lambda lengths: [make(length, number) for number, length in enumerate(lengths, start=1)]
)
rows_strategy = st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=4), min_size=1, max_size=4).map(
    lambda rows: [
        [make(length, 10 * row + column) for column, length in enumerate(rows[row], 1)] for row in range(len(rows))
    ]
)


def targets_of(example: Example) -> list[int]:
    ids, counted = example.input_ids.tolist(), example.counted.tolist()
    return [ids[t + 1] if counted[t + 1] else IGNORED for t in range(len(ids) - 1)] + [IGNORED]


@given(examples_strategy)
def test_labels_are_the_next_token_where_it_counts(examples: list[Example]) -> None:
    batch = collate([[example] for example in examples], PAD)
    longest = max(example.num_tokens for example in examples)
    assert batch.input_ids.shape == batch.labels.shape == (len(examples), longest)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    for row, example in enumerate(examples):
        missing = longest - example.num_tokens
        assert batch.input_ids[row].tolist() == example.input_ids.tolist() + [PAD] * missing
        assert batch.labels[row].tolist() == targets_of(example) + [IGNORED] * missing
    if len({example.num_tokens for example in examples}) == 1:
        assert batch.attention_mask is None
    else:
        assert batch.attention_mask is not None and batch.attention_mask.dtype == torch.int64
        expected = [[int(t < example.num_tokens) for t in range(longest)] for example in examples]
        assert batch.attention_mask.tolist() == expected
    assert batch.lengths is None
    assert batch.num_tokens == sum(example.num_tokens for example in examples)
    assert batch.num_counted == int((batch.labels != IGNORED).sum()) == sum(e.num_counted for e in examples)


@given(rows_strategy, st.integers(0, 50))
def test_labels_never_cross_examples_of_a_row(rows: list[list[Example]], width: int) -> None:
    batch = collate(rows, PAD, width=width)
    sums = [sum(example.num_tokens for example in row) for row in rows]
    assert batch.input_ids.shape == batch.labels.shape == (len(rows), max(width, *sums))
    for number, (row, length) in enumerate(zip(rows, sums, strict=True)):
        missing = batch.input_ids.shape[1] - length
        ids = [token for example in row for token in example.input_ids.tolist()]
        assert batch.input_ids[number].tolist() == ids + [PAD] * missing
        targets = [target for example in row for target in targets_of(example)]
        assert batch.labels[number].tolist() == targets + [IGNORED] * missing
    packed = any(len(row) > 1 for row in rows)
    assert batch.lengths == (tuple(tuple(e.num_tokens for e in row) for row in rows) if packed else None)
    assert (batch.attention_mask is None) == (packed or min(sums) == batch.input_ids.shape[1])
    assert batch.num_tokens == sum(sums)
    assert batch.num_counted == sum(example.num_counted for row in rows for example in row)
