"""Decompositions: what they are, with the same bits for every number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from sophia_galore.numerics.decompositions import leading_eigenvectors, orthonormal, pseudo_inverse


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def square(size: int) -> Tensor:
    return matrix(size, size) @ matrix(size, size).T


@pytest.mark.parametrize(
    "decompose",
    [
        # LAPACK divides each of these sizes over two threads, and then rounds in another way.
        lambda: orthonormal(matrix(1536, 128)),
        lambda: leading_eigenvectors(square(576).double(), 128),
        lambda: pseudo_inverse(square(256)),
    ],
    ids=["orthonormal", "eigenvectors", "pseudo-inverse"],
)
def test_no_bit_depends_on_the_number_of_threads(decompose: Callable[[], Tensor]) -> None:
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(decompose())
        assert torch.get_num_threads() == count
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_number_of_threads_is_put_back_after_a_failure() -> None:
    torch.set_num_threads(2)
    with pytest.raises(RuntimeError):
        leading_eigenvectors(torch.ones(2, 3), 1)
    assert torch.get_num_threads() == 2


def test_what_they_are() -> None:
    columns = matrix(40, 6)
    basis = orthonormal(columns)
    # float32 of sums of 40 terms.
    assert torch.allclose(basis.T @ basis, torch.eye(6), atol=1e-6)
    assert torch.allclose(basis @ (basis.T @ columns), columns, atol=1e-5)
    wide = square(20).double()
    vectors = leading_eigenvectors(wide, 3)
    values = torch.linalg.eigvalsh(wide).flip(0)[:3]
    assert torch.allclose(wide @ vectors, vectors * values, atol=1e-9)
    assert torch.allclose(pseudo_inverse(wide) @ wide, torch.eye(20, dtype=torch.float64), atol=1e-6)
    assert not pseudo_inverse(torch.zeros(3, 3)).any()
