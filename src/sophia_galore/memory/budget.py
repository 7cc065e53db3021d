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
"""Memory that context and desktop take on a GPU that is not in this machine: about the usual value."""

FRAGMENTATION = 0.05
"""Overhead of a GPU's allocator, as a share of the tensors' bytes."""


@dataclass(frozen=True)
class Budget:
    """The memory that is available for tensors.

    Args:
        limit_bytes: Memory that the process may use on the device.
        outside_bytes: Part of it that is not used for tensors.
        fragmentation: Overhead of the allocator, as a share of the tensors' bytes.
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
        """Bytes that are not available for tensors."""
        return self.limit_bytes - self.tensor_bytes

    def fits(self, peak_bytes: int) -> bool:
        """Return whether tensors of this many bytes fit."""
        return peak_bytes <= self.tensor_bytes


def budget_of(config: RunConfig, device: DeviceFacts) -> Budget | None:
    """Return the memory budget of a run.

    Args:
        config: The configuration.
        device: The device; the memory of a GPU that is not in this machine is unknown.

    Returns:
        The budget from `memory.limit` or else from the memory of the GPU; None if neither is known.
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
    """Return the bytes of a device that the allocator can't use: on CUDA those of the context and of other programs.

    Args:
        device: The device.
        reserve_bytes: `memory.reserve`; None: 0 on a CPU, measured on CUDA.
    """
    if reserve_bytes is not None:
        return reserve_bytes
    if device.type != "cuda":
        return 0
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return max(0, total_bytes - free_bytes - torch.cuda.memory_reserved(device))


def allocator_bytes(device: torch.device, limit_bytes: int, reserve_bytes: int | None) -> int:
    """Return the bytes of a limit that are left for the allocator.

    Args:
        device: The device.
        limit_bytes: Memory that the process may use on it.
        reserve_bytes: As for `outside_bytes`.

    Raises:
        EnvironmentProblem: The GPU has less memory than the limit, or nothing is left.
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
