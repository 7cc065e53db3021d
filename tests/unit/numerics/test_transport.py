"""Moments by a new basis: what they say must not depend on how the subspace is written down."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from algebra import project_back
from sophia_galore.numerics.bases import random_basis
from sophia_galore.numerics.int4 import pack, unpack
from sophia_galore.numerics.subspace import Side, projected_shape
from sophia_galore.numerics.transport import change_of_basis, move_first_moment, move_second_moment

SIDES: list[tuple[Side, tuple[int, int]]] = [("right", (30, 12)), ("left", (12, 30))]
both_sides = pytest.mark.parametrize(("side", "shape"), SIDES)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def basis(seed: int, rank: int = 4) -> Tensor:
    return random_basis(12, rank, draw(seed))


def moment(shape: tuple[int, int], rank: int = 4) -> Tensor:
    return torch.rand(projected_shape(shape, rank), generator=draw(9))


@both_sides
def test_a_turned_basis_of_the_same_subspace(side: Side, shape: tuple[int, int]) -> None:
    """What a first moment says in full size stays: M P^T = M' P'^T."""
    old = basis(0)
    turn = random_basis(4, 4, draw(1))
    change = change_of_basis(old, old @ turn)
    before = moment(shape)
    after = move_first_moment(before, change, side)
    # Three float32 products; worst seen 4e-7.
    assert torch.allclose(project_back(after, old @ turn, side), project_back(before, old, side), atol=2e-6)


@both_sides
def test_columns_in_another_order(side: Side, shape: tuple[int, int]) -> None:
    """Moments are reordered likewise, the second ones too, and signs do not matter to these."""
    old, order = basis(0), torch.tensor([2, 0, 3, 1])
    change = change_of_basis(old, -old[:, order])
    values, along = moment(shape), 1 if side == "right" else 0
    expected = values.index_select(along, order)
    assert torch.allclose(move_first_moment(values, change, side), -expected, atol=1e-6)  # one float32 rounding
    assert torch.allclose(move_second_moment(values, change, side), expected, atol=1e-6)


@both_sides
def test_an_orthogonal_subspace_knows_only_the_mean(side: Side, shape: tuple[int, int]) -> None:
    whole = basis(0, 8)
    change = change_of_basis(whole[:, :4], whole[:, 4:])
    values, along = moment(shape), 1 if side == "right" else 0
    assert float(move_first_moment(values, change, side).abs().max()) <= 1e-5  # zero but for roundings
    expected = values.mean(along, keepdim=True).expand_as(values)
    assert torch.allclose(move_second_moment(values, change, side), expected, atol=1e-5)


@both_sides
def test_second_moments_stay_positive(side: Side, shape: tuple[int, int]) -> None:
    for seed in range(20):
        moved = move_second_moment(moment(shape) * 1e-12, change_of_basis(basis(seed), basis(seed + 1)), side)
        assert float(moved.min()) > 0


@both_sides
def test_second_moments_of_uncorrelated_coordinates(side: Side, shape: tuple[int, int]) -> None:
    """The square of what a rotated observer sees, averaged over many gradients, is what V (C * C) says."""
    old, new = basis(0), basis(0) @ random_basis(4, 4, draw(1))
    deviations = torch.tensor([1.0, 2.0, 3.0, 4.0])
    coordinates = torch.randn(200_000, 4, generator=draw(2)) * deviations
    seen = (coordinates @ (old.T @ new)).square().mean(0)
    moved = move_second_moment(deviations.square()[None], change_of_basis(old, new), "right")[0]
    # A mean of 200,000 squares of normal numbers is within sqrt(2 / 200000) = 0.3% of its own, four of these.
    assert torch.allclose(seen, moved, rtol=1.3e-2)
    turned = move_second_moment(deviations.square()[:, None], change_of_basis(old, new), "left")[:, 0]
    assert torch.allclose(turned, moved, rtol=1e-6)


@both_sides
def test_a_rounded_basis_that_holds_still(side: Side, shape: tuple[int, int]) -> None:
    """With P^T Q of four-bit bases both moments would grow by some percent each time."""
    stored = unpack(*pack(basis(0)), (12, 4))
    assert float((stored.T @ stored - torch.eye(4)).abs().max()) > 1e-2
    change = change_of_basis(stored, stored)
    first = second = moment(shape)
    for _ in range(10):
        first, second = move_first_moment(first, change, side), move_second_moment(second, change, side)
    # Ten times some roundings; worst seen 4e-6.
    assert torch.allclose(first, moment(shape), atol=2e-5)
    assert torch.allclose(second, moment(shape), atol=2e-5)


def test_no_basis_so_far() -> None:
    assert torch.equal(change_of_basis(torch.zeros(12, 4), basis(0)), torch.zeros(4, 4))
