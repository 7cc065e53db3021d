"""Decompositions of matrices, with the same bits for every number of threads.

LAPACK divides a decomposition over threads in a way that changes how it rounds, which products of matrices do not. A
basis that is turned by a rounding error would lead to another curve. So on a CPU decompositions run in one thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def orthonormal(columns: Tensor) -> Tensor:
    """Return orthonormal columns that span the given ones (and more, if these are linearly dependent).

    Args:
        columns: (k, r), k >= r, float32.

    Returns:
        (k, r), float32.
    """
    with _one_thread(columns):
        basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def leading_eigenvectors(symmetric: Tensor, rank: int) -> Tensor:
    """Return the eigenvectors of the largest eigenvalues, the largest first.

    Args:
        symmetric: (n, n).
        rank: Number of vectors, at most n.

    Returns:
        (n, rank), in the same precision.
    """
    with _one_thread(symmetric):
        # eigh sorts ascending: the last columns are the leading ones.
        vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors[:, -rank:].flip(1)
    return vectors


def pseudo_inverse(symmetric: Tensor) -> Tensor:
    """Return the pseudo-inverse of a symmetric matrix.

    Args:
        symmetric: (n, n).

    Returns:
        (n, n), in the same precision; zero for zero.
    """
    with _one_thread(symmetric):
        inverse: Tensor = torch.linalg.pinv(symmetric, hermitian=True)
    return inverse


@contextmanager
def _one_thread(matrix: Tensor) -> Iterator[None]:
    threads = torch.get_num_threads()
    if matrix.device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
