"""The tracker's limit: what is refused is gone, what is counted is true, and there is a way on with less."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sophia_galore.errors import OutOfMemory
from sophia_galore.memory.tracker import StorageTracker

CPU = torch.device("cpu")
# Leaves 100 bytes free beside the ten floats that the tests below begin with.
LIMIT = 140


def test_what_fits_exactly_is_let_in() -> None:
    with StorageTracker(CPU, limit_bytes=80) as tracker:
        first, second = torch.zeros(10), torch.zeros(10)
        assert tracker.allocated_bytes == tracker.peak_bytes == 80
        with pytest.raises(OutOfMemory, match="1 bytes more do not fit: 80 bytes of 80 bytes are taken"):
            torch.zeros(1, dtype=torch.bool)
        del first
        again = torch.zeros(10)
        assert tracker.allocated_bytes == 80 and again.numel() == second.numel()


REFUSED: dict[str, Callable[[Tensor], object]] = {
    "made": lambda tensor: torch.empty(30),
    "copied": lambda tensor: tensor.expand(3, 10).clone(),
    "computed": lambda tensor: tensor[:, None] @ tensor[None],
    "converted": lambda tensor: torch.cat([tensor.double(), tensor.double()]),
    "several at once": lambda tensor: torch.ops.aten.split_copy(torch.ops.aten.expand(tensor, (4, 10)), 2),
    "the second of two": lambda tensor: tensor.expand(2, 10).sort(),
    "between operations of one call": lambda tensor: torch.nn.functional.one_hot(torch.arange(2), 16),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_is_refused_leaves_nothing_behind(make: Callable[[Tensor], object]) -> None:
    with StorageTracker(CPU, LIMIT) as tracker:
        tensor = torch.zeros(10)
        with pytest.raises(OutOfMemory):
            make(tensor)
        assert tracker.allocated_bytes == sum(tracker.by_category.values()) == 40
        assert tracker.peak_bytes <= LIMIT
        assert tracker.refusal is not None and tracker.refusal.asked_bytes > LIMIT - tracker.peak_bytes
        smaller = torch.zeros(25)
        assert tracker.allocated_bytes == LIMIT == tracker.peak_bytes
        del smaller, tensor
        assert tracker.allocated_bytes == 0


def test_the_error_itself_holds_nothing_of_what_was_refused() -> None:
    with StorageTracker(CPU, LIMIT) as tracker:
        try:
            torch.zeros(10).expand(2, 10).sort()
        except OutOfMemory:
            # While it is handled, and its traceback is alive: neither the values, which fitted, nor the indices.
            assert tracker.allocated_bytes == 40
        assert tracker.allocated_bytes == 0


def test_views_and_in_place_operations_go_on_at_the_limit() -> None:
    with StorageTracker(CPU, limit_bytes=40) as tracker:
        tensor = torch.zeros(10)
        tensor.add_(1).mul_(2)
        assert tensor[2:].view(2, 4).T.shape == (4, 2)
        torch.add(tensor, tensor, out=tensor)
        assert tracker.allocated_bytes == tracker.peak_bytes == 40
    assert tensor[0] == 4


def test_a_storage_that_grows_counts_as_it_is() -> None:
    with StorageTracker(CPU, LIMIT) as tracker:
        tensor, target = torch.zeros(10), torch.empty(0)
        torch.add(tensor, 1, out=target)
        assert tracker.allocated_bytes == tracker.peak_bytes == 80
        # It is refused too, but can't be undone: what is there is counted.
        with pytest.raises(OutOfMemory, match="do not fit"):
            target.resize_(100)
        assert tracker.allocated_bytes == 40 + target.untyped_storage().nbytes() == 440
        target.untyped_storage().resize_(0)
        target.resize_(5)  # seen with the next operation on it
        assert tracker.allocated_bytes == 40 + target.untyped_storage().nbytes()


def test_what_only_a_cycle_holds_makes_room() -> None:
    with StorageTracker(CPU, LIMIT) as tracker:
        cycle: list[object] = [torch.zeros(10)]
        cycle.append(cycle)
        del cycle
        tensor = torch.zeros(30)
        assert tracker.allocated_bytes == tensor.untyped_storage().nbytes() == 120


def test_an_unknown_tensor_is_refused_by_its_tag() -> None:
    before = torch.zeros(100)
    with StorageTracker(CPU, LIMIT) as tracker:
        with pytest.raises(OutOfMemory):
            tracker.tag(before, "weights")
        assert tracker.allocated_bytes == 0 == tracker.by_category["weights"]


def test_other_devices_have_no_limit() -> None:
    with StorageTracker(CPU, LIMIT):
        assert torch.empty(1000, device="meta").numel() == 1000


def forward_and_backward(limit_bytes: int | None) -> tuple[bool, int]:
    """Whether it came to its end, and its peak; nothing but the weight and its gradient may be left."""
    weight = torch.ones(10, 10, requires_grad=True)
    with StorageTracker(CPU, limit_bytes) as tracker:
        tracker.tag(weight, "weights")
        try:
            (weight @ weight).tanh().sum().backward()
        except OutOfMemory as error:
            assert type(error) is OutOfMemory
        gc.collect()
        done = weight.grad is not None
        assert tracker.allocated_bytes == 400 * (1 + done)
        assert done == (tracker.refusal is None)
    return done, tracker.peak_bytes


def test_backward_is_refused_with_the_same_error_and_nothing_stays() -> None:
    """At every size of the limit, so at every place of forward and backward."""
    done, needed = forward_and_backward(None)
    assert done and needed > 1200
    for limit_bytes in range(400, needed + 100, 50):
        done, peak = forward_and_backward(limit_bytes)
        assert done == (limit_bytes >= needed) and peak <= limit_bytes


def test_an_error_in_a_hook_of_backward_comes_through() -> None:
    weight = torch.ones(10, requires_grad=True)
    with StorageTracker(CPU, 1000) as tracker:
        weight.register_post_accumulate_grad_hook(lambda _: torch.zeros(1000))  # type: ignore[arg-type, return-value]
        with pytest.raises(OutOfMemory, match="4 KiB more"):
            (weight * 2).sum().backward()
        refusal = tracker.refusal
        assert refusal is not None
        assert (refusal.asked_bytes, refusal.shape, refusal.dtype) == (4000, (1000,), torch.float32)
        # What was alive then: the gradient at least; not what was refused.
        assert 40 <= refusal.held.allocated_bytes == sum(refusal.held.by_category.values()) <= 1000
        assert refusal.held.largest[0][1].num_bytes == 40


def test_the_largest_are_named_with_what_they_are() -> None:
    with StorageTracker(CPU) as tracker:
        small, large = torch.zeros(10), torch.zeros(30, 2, dtype=torch.bfloat16)
        middle = torch.zeros(20)
        tracker.tag(large, "logits")
        (first_key, first), (second_key, second) = tracker.largest(2)
        assert (first_key, second_key) == (tracker.storage_key(large), tracker.storage_key(middle[3:]))
        assert (first.num_bytes, first.category, first.shape, first.dtype) == (120, "logits", (30, 2), torch.bfloat16)
        assert (second.num_bytes, second.category, second.shape) == (80, "other", (20,))
        del large
        assert [live.num_bytes for _, live in tracker.largest(5)] == [80, 40]
        assert small.numel() == 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["alloc", "copy", "free", "pair"]), st.integers(0, 60)), max_size=40),
    st.integers(40, 800),
)
def test_any_sequence_stays_within_the_limit(moves: list[tuple[str, int]], limit_bytes: int) -> None:
    alive: list[Tensor] = []
    with StorageTracker(CPU, limit_bytes) as tracker:
        for move, number in moves:
            before = tracker.allocated_bytes
            chosen = alive[number % len(alive)] if alive else None
            try:
                if move == "alloc" or chosen is None:
                    alive.append(torch.empty(number + 1))
                elif move == "copy":
                    alive.append(chosen.clone())
                elif move == "pair":
                    alive.extend(chosen.sort())
                else:
                    del alive[number % len(alive)]
            except OutOfMemory:
                assert tracker.allocated_bytes == before
            del chosen
            assert tracker.allocated_bytes == sum(tensor.untyped_storage().nbytes() for tensor in alive)
            assert tracker.peak_bytes <= limit_bytes
