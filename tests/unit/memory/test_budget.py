"""What a limit leaves to the allocator of tensors."""

from __future__ import annotations

import pytest
import torch

from sophia_galore.config.schema import RunConfig
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.memory.budget import (
    ASSUMED_OUTSIDE_BYTES,
    FRAGMENTATION,
    Budget,
    allocator_bytes,
    budget_of,
    outside_bytes,
)
from sophia_galore.plan.facts import DeviceFacts

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 8 GiB: 5 GiB are free, our allocator holds 2 GiB, so 1 GiB is somebody else's."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)


@pytest.mark.parametrize(
    ("device", "reserve_bytes", "expected"),
    [(CPU, None, 0), (CPU, 0, 0), (CPU, GIB, GIB), (GPU, None, GIB), (GPU, 0, 0), (GPU, 2 * GIB, 2 * GIB)],
)
def test_what_others_take(device: torch.device, reserve_bytes: int | None, expected: int) -> None:
    assert outside_bytes(device, reserve_bytes) == expected
    assert allocator_bytes(device, 4 * GIB, reserve_bytes) == 4 * GIB - expected


def test_a_limit_above_the_card_names_both() -> None:
    assert allocator_bytes(GPU, 8 * GIB, None) == 7 * GIB
    with pytest.raises(EnvironmentProblem, match=r"memory.limit is 9.00 GiB, but the GPU has only 8.00 GiB"):
        allocator_bytes(GPU, 9 * GIB, None)
    assert allocator_bytes(CPU, 9 * GIB, None) == 9 * GIB


def test_a_limit_that_others_use_up_is_refused() -> None:
    with pytest.raises(EnvironmentProblem, match=r"1.00 GiB\) leaves nothing to tensors: 1.00 GiB") as caught:
        allocator_bytes(GPU, GIB, None)
    assert "memory.reserve" in caught.value.remedy


@pytest.mark.parametrize(
    ("budget", "tensor_bytes"),
    [
        (Budget(1000), 1000),
        (Budget(1000, outside_bytes=400), 600),
        (Budget(1000, outside_bytes=1200), 0),
        (Budget(1050, fragmentation=0.05), 1000),
        (Budget(1000, outside_bytes=370, fragmentation=0.05), 600),
    ],
)
def test_a_budget_to_the_byte(budget: Budget, tensor_bytes: int) -> None:
    assert budget.tensor_bytes == tensor_bytes
    assert budget.tensor_bytes + budget.reserve_bytes == budget.limit_bytes
    assert budget.fits(tensor_bytes) and not budget.fits(tensor_bytes + 1)


CARD = DeviceFacts("cuda:0", "a card", (8, 0), real_bf16=True, total_bytes=8 * GIB)
AWAY = DeviceFacts("cuda:0", "a CUDA card", real_bf16=True)


@pytest.mark.parametrize(
    ("memory", "device", "expected"),
    [
        ({}, DeviceFacts(), None),
        ({}, AWAY, None),
        ({"limit": 4 * GIB}, DeviceFacts(), Budget(4 * GIB)),
        ({"limit": 4 * GIB, "reserve": GIB}, DeviceFacts(), Budget(4 * GIB, GIB)),
        ({"limit": 4 * GIB}, AWAY, Budget(4 * GIB, ASSUMED_OUTSIDE_BYTES, FRAGMENTATION)),
        ({"limit": 4 * GIB, "reserve": 0}, AWAY, Budget(4 * GIB)),
        ({"limit": 4 * GIB}, CARD, Budget(4 * GIB, GIB, FRAGMENTATION)),
        ({}, CARD, Budget(8 * GIB, GIB, FRAGMENTATION)),
        ({"reserve": 2 * GIB}, CARD, Budget(8 * GIB, 2 * GIB)),
    ],
)
def test_what_a_run_may_take(memory: dict[str, int], device: DeviceFacts, expected: Budget | None) -> None:
    assert budget_of(RunConfig.model_validate({"memory": memory}), device) == expected
