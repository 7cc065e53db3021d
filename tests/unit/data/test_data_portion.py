"""What each process gets of an effective batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.data.batches import MicroBatch
from sophia_galore.data.portion import deal, in_blocks, to_evaluate, whole


def batches(count: int) -> list[MicroBatch]:
    return [MicroBatch(torch.tensor([[n, n]]), None, torch.tensor([[n, -100]]), 2, 1) for n in range(count)]


def number(batch: MicroBatch) -> int:
    return int(batch.input_ids[0, 0])


@given(st.integers(1, 20), st.integers(1, 6))
def test_every_micro_batch_is_dealt_out_once(count: int, num_processes: int) -> None:
    portions = [deal(batches(count), rank, num_processes) for rank in range(num_processes)]
    dealt = [batch for portion in portions for batch in portion.batches if batch.num_counted]
    assert [number(batch) for batch in dealt] == list(range(count))
    assert all(portion.num_counted == count and portion.batches for portion in portions)
    assert all(batch.block == 0 for portion in portions for batch in portion.batches)
    busy = [portion for portion in portions if portion.batches[0].num_counted]
    assert [portion.first_batch for portion in busy] == [number(portion.batches[0]) for portion in busy]


@given(st.integers(1, 40), st.sampled_from([(blocks, n) for blocks in (2, 4, 8) for n in (1, 2, 4, 8) if n <= blocks]))
def test_a_process_has_a_part_of_the_blocks(count: int, sizes: tuple[int, int]) -> None:
    sum_blocks, num_processes = sizes
    expected = {number(batch): batch.block for batch in in_blocks(batches(count), sum_blocks)}
    each = sum_blocks // num_processes
    for rank in range(num_processes):
        for batch in deal(batches(count), rank, num_processes, sum_blocks=sum_blocks).batches:
            assert 0 <= batch.block < each
            if batch.num_counted:
                assert batch.block + rank * each == expected[number(batch)]


@pytest.mark.parametrize(
    ("count", "blocks"),
    [(4, [0, 1, 2, 3]), (5, [0, 1, 2, 3, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3]), (3, [1, 2, 3]), (1, [3])],
)
def test_blocks_are_of_about_the_same_size(count: int, blocks: list[int]) -> None:
    assert [batch.block for batch in in_blocks(batches(count), 4)] == blocks


def test_micro_batches_are_evaluated_apart_if_their_gradients_are() -> None:
    assert [batch.block for batch in to_evaluate(batches(3), 4)] == [0, 1, 2]
    assert [batch.block for batch in to_evaluate(batches(3), 1)] == [0, 0, 0]
    assert len(whole(batches(3)).batches) == 3
