"""How much of a device's memory is not for the allocator of tensors."""

from __future__ import annotations

import torch

from sophia_galore.config.size import bytes_in_words
from sophia_galore.errors import EnvironmentProblem


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
