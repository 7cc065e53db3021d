"""The same bits from the same run, on a GPU too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Inside the context torch chooses algorithms that repeat to the bit.

    On a CPU they all do. On CUDA some (sums by atomic additions) are chosen for speed otherwise; cuBLAS
    needs a fixed workspace, set before its first use. What has no such algorithm is warned of; the backward
    of attention repeats only where that is an error, which the engine asks for (`layerwise.strictly`).

    Args:
        device: Where the arithmetic runs.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warn_only)
