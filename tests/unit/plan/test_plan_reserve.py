"""What a limit leaves to the allocator of tensors."""

from __future__ import annotations

import pytest
import torch

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.plan.reserve import allocator_bytes, outside_bytes

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
