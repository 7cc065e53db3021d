"""The storage tracker: exact bytes of what is alive, whoever made it, and the peak's composition."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sophia_galore.memory.tracker import StorageTracker

CPU = torch.device("cpu")


def live_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the distinct storages of some tensors: what the tracker must say, by other means."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.parametrize(
    ("make", "num_bytes"),
    [
        (lambda: torch.empty(10), 40),
        (lambda: torch.empty(10, dtype=torch.bfloat16), 20),
        (lambda: torch.ones(3, 5, dtype=torch.float64), 120),
        (lambda: torch.zeros(7, dtype=torch.bool), 7),
        (lambda: torch.arange(6), 48),
        (lambda: torch.empty_strided((2, 2), (100, 1)), 4 * 102),
        (lambda: torch.empty(0), 0),
        (lambda: torch.nn.Linear(4, 3), 4 * (4 * 3 + 3)),
    ],
    ids=["float32", "bfloat16", "float64", "bool", "int64", "strided", "empty", "module"],
)
def test_counts_the_bytes_of_a_storage_while_it_lives(make: Callable[[], object], num_bytes: int) -> None:
    with StorageTracker(CPU) as tracker:
        made = make()
        assert tracker.allocated_bytes == num_bytes
        del made
        # A module's initialiser leaves nothing, but its parameters may sit in a reference cycle.
        gc.collect()
        assert tracker.allocated_bytes == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda tensor: tensor[2:],
        lambda tensor: tensor.view(2, 5).T,
        lambda tensor: tensor.detach(),
        lambda tensor: tensor.expand(3, 10),
        lambda tensor: torch.nn.Parameter(tensor),
        lambda tensor: tensor.split(5),
    ],
    ids=["slice", "transpose", "detach", "expand", "parameter", "split"],
)
def test_a_view_counts_once_and_keeps_its_storage_alive(view: Callable[[Tensor], object]) -> None:
    with StorageTracker(CPU) as tracker:
        tensor = torch.empty(10)
        seen = view(tensor)
        assert tracker.allocated_bytes == 40
        del tensor
        assert tracker.allocated_bytes == 40
        del seen
        assert tracker.allocated_bytes == 0


def test_in_place_operations_add_nothing() -> None:
    with StorageTracker(CPU) as tracker:
        tensor = torch.zeros(10)
        tensor.add_(1).mul_(2)
        tensor[3] = 1.0
        torch.add(tensor, tensor, out=tensor)
        assert tracker.allocated_bytes == 40
        assert tracker.peak_bytes <= 40 + 4  # the scalar that is written to an entry may be a tensor


def test_a_temporary_shows_in_the_peak_only() -> None:
    with StorageTracker(CPU) as tracker:
        tensor = torch.zeros(10)
        total = (tensor + 1).sum()
        assert tracker.allocated_bytes == live_bytes([tensor, total]) == 44
        assert tracker.peak_bytes == 84


def test_what_was_made_before_is_unknown_until_tagged() -> None:
    before = torch.zeros(10)
    with StorageTracker(CPU) as tracker:
        assert tracker.allocated_bytes == 0
        tracker.tag(before, "weights")
        assert tracker.by_category["weights"] == tracker.allocated_bytes == 40


def test_what_dies_after_the_context_leaves_too() -> None:
    with StorageTracker(CPU) as tracker:
        tensor = torch.zeros(10)
    assert tracker.allocated_bytes == 40
    del tensor
    assert tracker.allocated_bytes == 0
    after = torch.zeros(10)
    assert after.numel() == 10 and tracker.allocated_bytes == 0


def test_other_devices_are_not_counted() -> None:
    with StorageTracker(CPU) as tracker:
        meta = torch.empty(1000, device="meta")
        tracker.tag(meta, "weights")
        assert meta.add(1).device.type == "meta"
        assert tracker.allocated_bytes == tracker.peak_bytes == 0


def test_a_tag_moves_bytes_between_categories() -> None:
    with StorageTracker(CPU) as tracker:
        tracker.default = "activations"
        tensor, view = torch.zeros(10), None
        view = tensor[1:]
        other = torch.zeros(5)
        tracker.tag(view, "gradients")  # a view stands for its storage
        assert (tracker.by_category["gradients"], tracker.by_category["activations"]) == (40, 20)
        tracker.tag(tensor, "weights")
        assert (tracker.by_category["gradients"], tracker.by_category["weights"]) == (0, 40)
        assert tracker.allocated_bytes == 60
        del tensor, view
        assert tracker.by_category["weights"] == 0
        del other
    assert not any(tracker.by_category.values())


def test_the_peak_is_remembered_with_its_composition() -> None:
    with StorageTracker(CPU) as tracker:
        weights = torch.zeros(100)
        tracker.tag(weights, "weights")
        tracker.default = "activations"
        activations = torch.zeros(50)
        del activations
        tracker.default = "logits"
        logits = torch.zeros(10)
        assert tracker.peak_bytes == 600
        assert tracker.peak_by_category == {"weights": 400, "activations": 200}
        tracker.reset_peak()
        assert tracker.peak_bytes == tracker.allocated_bytes == 440
        assert tracker.peak_by_category == {"weights": 400, "logits": 40}
        del logits


def test_a_tag_given_just_after_the_peak_still_counts_in_it() -> None:
    with StorageTracker(CPU) as tracker:
        old = torch.zeros(5)
        highest = torch.zeros(100)
        assert tracker.peak_by_category == {"other": 420}
        tracker.tag(highest, "gradients")
        assert tracker.peak_by_category == {"other": 20, "gradients": 400}
        del highest
        later = torch.zeros(10)
        tracker.tag(later, "logits")  # was not there at the peak
        assert tracker.peak_by_category == {"other": 20, "gradients": 400}
        tracker.tag(old, "weights")
        assert +tracker.peak_by_category == {"weights": 20, "gradients": 400}
        assert tracker.peak_bytes == 420


def test_storages_that_backward_makes_are_seen() -> None:
    weight = torch.ones(10, 10, requires_grad=True)
    with StorageTracker(CPU) as tracker:
        tracker.tag(weight, "weights")
        tracker.default = "activations"
        loss = (weight @ weight).sum()
        loss.backward()
        del loss
        assert weight.grad is not None
        assert tracker.allocated_bytes == 800
        assert tracker.by_category["activations"] == 400
        tracker.tag(weight.grad, "gradients")
        weight.grad = None
        assert tracker.by_category["gradients"] == 0
        assert tracker.allocated_bytes == 400


def test_a_key_that_is_used_again_is_a_new_storage() -> None:
    with StorageTracker(CPU) as tracker:
        keys = set()
        for size in range(1, 60):
            tracker.default = "weights" if size % 2 else "logits"
            tensor = torch.empty(size)
            keys.add(tensor.untyped_storage()._cdata)
            assert tracker.allocated_bytes == tracker.by_category[tracker.default] == 4 * size
            del tensor
            assert tracker.allocated_bytes == 0
        # The allocator did hand out addresses again; otherwise this test would show nothing.
        assert len(keys) < 59


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["alloc", "view", "copy", "free", "tag", "out of place"]), st.integers(0, 99)),
        max_size=40,
    )
)
def test_any_sequence_keeps_the_sum_right(moves: list[tuple[str, int]]) -> None:
    alive: list[Tensor] = []
    highest = 0
    with StorageTracker(CPU) as tracker:
        for move, number in moves:
            chosen = alive[number % len(alive)] if alive else None
            if move == "alloc" or chosen is None:
                alive.append(torch.empty(number + 1))
            elif move == "view":
                alive.append(chosen[len(chosen) // 2 :])
            elif move == "copy":
                alive.append(chosen.clone())
            elif move == "out of place":
                alive[number % len(alive)] = chosen + 1
            elif move == "tag":
                tracker.tag(chosen, "gradients")
            else:
                del alive[number % len(alive)]
            del chosen
            now = live_bytes(alive)
            assert tracker.allocated_bytes == now
            assert sum(tracker.by_category.values()) == now
            highest = max(highest, now)
            # "out of place" holds the old and the new storage for a moment.
            assert highest <= tracker.peak_bytes <= highest + 4 * 100
            assert sum(tracker.peak_by_category.values()) == tracker.peak_bytes
