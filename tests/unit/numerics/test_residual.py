"""Norms of what is never formed, against forming it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from algebra import project_back
from sophia_galore.numerics.bases import random_basis
from sophia_galore.numerics.int4 import pack, unpack
from sophia_galore.numerics.residual import channel_scales, growth_factor, residual_norm, scaled_norm
from sophia_galore.numerics.subspace import Side, project

SIDES: list[tuple[Side, tuple[int, int]]] = [("right", (30, 12)), ("left", (12, 30)), ("right", (12, 12))]
all_sides = pytest.mark.parametrize(("side", "shape"), SIDES)


def parts(shape: tuple[int, int], rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    grad, basis = torch.randn(shape, generator=draw), random_basis(min(shape), rank, draw)
    return grad, basis, project(grad, basis)


def channel_shape(side: Side, shape: tuple[int, int]) -> tuple[int, int]:
    return (shape[0], 1) if side == "right" else (1, shape[1])


@all_sides
@pytest.mark.parametrize("rounded", [False, True], ids=["orthonormal", "four bits"])
def test_residual_norm(side: Side, shape: tuple[int, int], rounded: bool) -> None:
    grad, basis, _ = parts(shape)
    if rounded:
        basis = unpack(*pack(basis), basis.shape)
    low = project(grad, basis)
    scales = torch.rand(channel_shape(side, shape), generator=torch.Generator().manual_seed(1))
    expected = (scales * (grad - project_back(low, basis, side))).norm()
    # |g|^2 - 2 |R|^2 + ... in float32, where most of |g|^2 is left; worst seen 3e-7.
    assert float(residual_norm(grad, low, basis.T @ basis, scales, side)) == pytest.approx(float(expected), rel=2e-6)


@all_sides
def test_no_residual_where_the_subspace_is_everything(side: Side, shape: tuple[int, int]) -> None:
    grad, basis, low = parts(shape, rank=12)
    norm = float(residual_norm(grad, low, basis.T @ basis, torch.ones(channel_shape(side, shape)), side))
    # Roundings of 1e-7 |g|^2 under a root; never the root of a negative number. Worst seen 6e-4.
    assert 0 <= norm <= 2e-3 * float(grad.norm())


@all_sides
def test_scaled_norm(side: Side, shape: tuple[int, int]) -> None:
    grad, _, _ = parts(shape)
    for scales in (torch.rand(channel_shape(side, shape)), torch.rand(1, 1)):
        # One float32 sum in another order.
        assert float(scaled_norm(grad, scales, side)) == pytest.approx(float((scales * grad).norm()), rel=1e-6)


@all_sides
def test_channel_scales(side: Side, shape: tuple[int, int]) -> None:
    """What a rule did to each channel; nothing is divided by a channel of zeros."""
    _, _, low = parts(shape)
    factors = 0.5 + torch.rand(channel_shape(side, shape))
    assert torch.allclose(channel_scales(low * factors, low, side), factors, rtol=1e-6)
    low = low.clone()
    (low[0] if side == "right" else low[:, 0]).zero_()
    scales = channel_scales(torch.ones_like(low), low, side)
    assert scales.flatten()[0] == 0 and (scales.flatten()[1:] > 0).all() and scales.isfinite().all()


@pytest.mark.parametrize(
    ("norm", "previous", "limit", "expected"),
    [
        (2.0, 1.0, 1.01, 1.01 / 2),
        (1.005, 1.0, 1.01, 1.0),  # within the limit
        (0.1, 1.0, 1.01, 1.0),  # shrinking is free
        (5.0, 0.0, 1.01, 1.0),  # nothing to compare with
        (0.0, 0.0, 1.01, 1.0),
        (5.0, 1.0, 0.0, 1.0),  # no limit
    ],
)
def test_growth_factor(norm: float, previous: float, limit: float, expected: float) -> None:
    factor = growth_factor(torch.tensor(norm), torch.tensor(previous), limit)
    assert float(factor) == pytest.approx(expected, rel=1e-6)
