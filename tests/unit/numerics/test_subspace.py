"""Bases: orthonormal, leading, the same for the same gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sophia_galore.numerics import subspace
from sophia_galore.numerics.subspace import (
    basis_shape,
    project,
    project_back,
    projected_shape,
    projection_side,
    svd_basis,
)

SHAPES = [(40, 12), (12, 40), (20, 20), (5000, 6), (1, 7), (7, 1)]


def low_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], rank, generator=draw) @ torch.randn(rank, shape[1], generator=draw)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_shapes_and_orthonormality(m: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    grad = torch.randn(m, n, generator=torch.Generator().manual_seed(seed))
    basis = svd_basis(grad, rank)
    assert basis.shape == basis_shape((m, n), rank)
    # float64 eigenvectors rounded to float32: worst seen 4e-7.
    assert float((basis.T @ basis - torch.eye(rank)).abs().max()) <= 1e-5
    low = project(grad, basis)
    assert low.shape == projected_shape((m, n), rank)
    back = project_back(low, basis, projection_side((m, n)))
    assert back.shape == grad.shape
    assert float(back.norm()) <= float(grad.norm()) * (1 + 1e-5)  # a projection shortens


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_full_rank_gives_the_gradient_back(shape: tuple[int, int]) -> None:
    grad = low_rank(shape, min(shape))
    basis = svd_basis(grad, min(shape))
    back = project_back(project(grad, basis), basis, projection_side(shape))
    assert float((back - grad).norm() / grad.norm()) <= 1e-5  # float32 products; worst seen 6e-7


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20), (5000, 6)], ids=str)
def test_spans_the_leading_singular_vectors(shape: tuple[int, int]) -> None:
    grad = low_rank(shape, 3) + 1e-2 * low_rank(shape, min(shape), seed=1)
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    expected = vh[:3].T if projection_side(shape) == "right" else u[:, :3]
    cosines = torch.linalg.svdvals(expected.T @ svd_basis(grad, 3).double())
    # Cosines of the principal angles; 1 - 1e-6 is an angle of a tenth of a degree. Worst seen 1 - 2e-7.
    assert float(cosines.min()) >= 1 - 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_a_function_of_the_gradient(shape: tuple[int, int]) -> None:
    grad = low_rank(shape, min(shape))
    rank = max(1, min(shape) // 2)
    assert torch.equal(svd_basis(grad, rank), svd_basis(grad.clone(), rank))
    # The sign is fixed by the basis alone: turning the gradient round gives the same basis.
    assert torch.allclose(svd_basis(-grad, rank), svd_basis(grad, rank), atol=1e-6)


def test_row_blocks_of_the_gram_matrix_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = low_rank((300, 8), 8)
    whole = svd_basis(grad, 4)
    monkeypatch.setattr(subspace, "_GRAM_ROWS", 7)
    assert torch.allclose(svd_basis(grad, 4), whole, atol=1e-6)  # float64 sums in another order


def test_zero_gradient_has_a_basis_all_the_same() -> None:
    basis = svd_basis(torch.zeros(9, 4), 2)
    assert torch.allclose(basis.T @ basis, torch.eye(2), atol=1e-6)
