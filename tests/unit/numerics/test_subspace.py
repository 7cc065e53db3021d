"""Projection: sides, shapes, and products that are wanted in place of gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algebra import project_back
from sophia_galore.numerics.bases import random_basis
from sophia_galore.numerics.subspace import Projector, basis_shape, project, projected_shape, projection_side


@given(st.integers(1, 24), st.integers(1, 24), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_shapes_and_lengths(m: int, n: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    draw = torch.Generator().manual_seed(seed)
    grad, basis = torch.randn(m, n, generator=draw), random_basis(min(m, n), rank, draw)
    assert basis.shape == basis_shape((m, n), rank)
    low = project(grad, basis)
    assert low.shape == projected_shape((m, n), rank)
    back = project_back(low, basis, projection_side((m, n)))
    assert back.shape == grad.shape
    assert float(back.norm()) <= float(grad.norm()) * (1 + 1e-5)  # a projection shortens
    # Projected once more it is the same: float32 products; worst seen 6e-7 for entries of about 1.
    assert torch.allclose(project(back, basis), low, atol=1e-5)


@pytest.mark.parametrize(("shape", "side"), [((5, 3), "right"), ((3, 5), "left"), ((4, 4), "right")])
def test_the_shorter_side(shape: tuple[int, int], side: str) -> None:
    assert projection_side(shape) == side


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)], ids=str)
def test_a_projectors_product_begins_with_the_projection(shape: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(0)
    grad, matrix = torch.randn(shape, generator=draw), torch.randn(4, 3, generator=draw)
    side = projection_side(shape)
    assert torch.equal(Projector(matrix, side).of(grad), project(grad, matrix))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_projector_works_on_either_side(side: str) -> None:
    """Its side need not be the shorter one."""
    grad = torch.arange(6.0).view(2, 3)
    matrix = torch.eye(3)[:, :1] if side == "right" else torch.eye(2)[:, :1]
    expected = grad[:, :1] if side == "right" else grad[:1]
    assert torch.equal(Projector(matrix, side).of(grad), expected)  # type: ignore[arg-type]
