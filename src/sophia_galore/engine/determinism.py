"""Deterministic algorithms, so that the same run gives the same bits on a GPU too. On a CPU it always does. And
streams of random numbers that begin at a seed, for modules that draw from torch's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Let modules draw their random numbers from a stream of their own inside the context; torch's goes on behind it.

    Args:
        device: The compute device.
        seed: Begins the stream.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # Only the generator that is used: torch.manual_seed seeds those of all kinds of devices, which takes longer
        # than a small layer.
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        else:
            torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Make torch use deterministic algorithms inside the context; where it has none, it warns.

    By default, CUDA uses faster algorithms that are not deterministic, such as sums by atomic additions. cuBLAS also
    needs a fixed workspace, which must be set before its first use.

    Args:
        device: The compute device.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with _deterministic_algorithms(warn_only=True):
        yield


@contextmanager
def strictly_repeatable(device: torch.device) -> Iterator[None]:
    """Turn warnings about algorithms that are not deterministic into errors; for use inside `repeatable`.

    CUDA's attention uses its deterministic backward only in this strict mode.

    Args:
        device: The compute device.
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
