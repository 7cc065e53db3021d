"""Shuffle the rows of an epoch by seed and epoch, optionally with rows of similar length in each micro-batch."""

from __future__ import annotations

from functools import lru_cache

import torch

from sophia_galore.numerics.random import generator

# Number of batches that are sorted together. More of them mean less padding, but also less randomness.
_SORTED_TOGETHER = 50
_LEAST_PARTS = 4


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the rows in one epoch.

    Args:
        n: Number of rows.
        seed: The run's seed.
        epoch: The epoch, from 0.

    Returns:
        A permutation of 0 .. n-1, a pure function of the arguments.
    """
    order: list[int] = torch.randperm(n, generator=generator(seed, "epoch order", epoch)).tolist()
    return order


@lru_cache(maxsize=2)  # every step of an epoch needs this sort of all rows
def grouped_order(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[int, ...]:
    """Return the order of the rows in one epoch, in which rows of similar length share a micro-batch.

    The shuffled epoch is cut into parts of 50 micro-batches (less if it has fewer than 200), each part is sorted by
    length and cut into micro-batches, and these are shuffled. So each epoch combines other rows, and a step has short
    and long micro-batches.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows in a micro-batch.
        seed: The run's seed.
        epoch: The epoch, from 0.

    Returns:
        A permutation of the row indices, a pure function of the arguments. A micro-batch that is not full comes last.
    """
    order = epoch_order(len(lengths), seed, epoch)
    together = batch_size * max(1, min(len(order) // (batch_size * _LEAST_PARTS), _SORTED_TOGETHER))
    ordered = [
        row
        for start in range(0, len(order), together)
        for row in sorted(order[start : start + together], key=lambda row: -lengths[row])
    ]
    num_full = len(ordered) // batch_size
    places: list[int] = torch.randperm(num_full, generator=generator(seed, "group order", epoch)).tolist()
    full = [row for place in places for row in ordered[place * batch_size : (place + 1) * batch_size]]
    return (*full, *ordered[num_full * batch_size :])
