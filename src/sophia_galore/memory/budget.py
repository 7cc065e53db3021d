"""A memory budget: how much of a device's memory is left for tensors.

On a GPU the context takes 0.1 to 0.9 GiB, and a desktop 0.3 to 0.5 GiB. The allocator hands out the rest in blocks,
between which gaps remain.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sophia_galore.config import RunConfig
from sophia_galore.config.size import bytes_in_words
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.plan.facts import DeviceFacts

ASSUMED_OUTSIDE_BYTES = int(0.8 * 2**30)
"""What context and desktop take of a GPU that is not here to be asked: about the middle of what is seen."""

FRAGMENTATION = 0.05
"""Share of the tensors' bytes that a GPU's allocator holds beyond them."""


@dataclass(frozen=True)
class Budget:
    """What there is for tensors.

    Args:
        limit_bytes: What the process may take on the device.
        outside_bytes: Part of it that others than tensors take.
        fragmentation: What the allocator needs beyond the tensors, as a share of their bytes.
    """

    limit_bytes: int
    outside_bytes: int = 0
    fragmentation: float = 0.0

    @property
    def tensor_bytes(self) -> int:
        """Most bytes that tensors may take."""
        return max(0, int((self.limit_bytes - self.outside_bytes) / (1 + self.fragmentation)))

    @property
    def reserve_bytes(self) -> int:
        """What is left to others and to gaps."""
        return self.limit_bytes - self.tensor_bytes

    def fits(self, peak_bytes: int) -> bool:
        """Whether tensors of so many bytes fit."""
        return peak_bytes <= self.tensor_bytes


def budget_of(config: RunConfig, device: DeviceFacts) -> Budget | None:
    """What a run may take.

    Args:
        config: What was asked.
        device: Where it would run; a GPU that is not here has no total.

    Returns:
        The budget by `memory.limit` or, without that, by what the card has; None: neither is known.
    """
    limit = config.memory.limit or device.total_bytes
    if limit is None:
        return None
    reserve = config.memory.reserve
    if reserve is not None or device.is_cpu:
        return Budget(limit, reserve or 0)
    here = device.total_bytes is not None
    outside = outside_bytes(torch.device(device.place), None) if here else ASSUMED_OUTSIDE_BYTES
    return Budget(limit, outside, FRAGMENTATION)


def outside_bytes(device: torch.device, reserve_bytes: int | None) -> int:
    """Bytes of a device's memory that others than the allocator take: on CUDA the context, and other programs.

    Args:
        device: The device.
        reserve_bytes: What was asked for (`memory.reserve`); None: 0 on a CPU, on CUDA as measured now.
    """
    if reserve_bytes is not None:
        return reserve_bytes
    if device.type != "cuda":
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return max(0, total_bytes - free_bytes - torch.cuda.memory_reserved(device))


def allocator_bytes(device: torch.device, limit_bytes: int, reserve_bytes: int | None) -> int:
    """What a limit leaves to the allocator of tensors.

    Args:
        device: The device.
        limit_bytes: What the process may take on it.
        reserve_bytes: As for `outside_bytes`.

    Raises:
        EnvironmentProblem: The card is smaller than the limit, or nothing is left.
    """
    if device.type == "cuda":
        total_bytes = torch.cuda.mem_get_info(device)[1]
        if limit_bytes > total_bytes:
            raise EnvironmentProblem(
                f"memory.limit is {bytes_in_words(limit_bytes)}, but the GPU has only {bytes_in_words(total_bytes)}.",
                "Lower memory.limit, or leave it out.",
            )
    outside = outside_bytes(device, reserve_bytes)
    if outside >= limit_bytes:
        raise EnvironmentProblem(
            f"memory.limit ({bytes_in_words(limit_bytes)}) leaves nothing to tensors: {bytes_in_words(outside)} of the "
            "device are taken by the GPU's context and other programs.",
            "End other programs on the GPU, raise memory.limit, or say with memory.reserve how much others may take.",
        )
    return limit_bytes - outside
