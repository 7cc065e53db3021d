"""The same bits from the same run, on a GPU too. A CPU's algorithms all repeat to the bit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Inside the context torch takes algorithms that repeat to the bit, where it has them; else it warns.

    On CUDA some (sums by atomic additions) are chosen for speed otherwise; cuBLAS needs a fixed
    workspace, set before its first use.

    Args:
        device: Where the arithmetic runs.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with _deterministic_algorithms(warn_only=True):
        yield


@contextmanager
def strictly_repeatable(device: torch.device) -> Iterator[None]:
    """Inside the context, within that of `repeatable`, what can't repeat to the bit is an error.

    CUDA's attention takes its repeatable backward only if its other one is forbidden, not if it is
    warned of.

    Args:
        device: Where the arithmetic runs.
    """
    if device.type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        yield
        return
    with _deterministic_algorithms(warn_only=False):
        yield


@contextmanager
def _deterministic_algorithms(*, warn_only: bool) -> Iterator[None]:
    was_on = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_on, warn_only=was_warn_only)
