"""Bases: orthonormal for every gradient, leading where they should be, drawn from the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algebra import project_back
from sophia_galore.numerics import bases
from sophia_galore.numerics.bases import (
    gaussian_basis,
    overlap,
    random_basis,
    randomized_basis,
    svd_basis,
    tracked_basis,
)
from sophia_galore.numerics.subspace import basis_shape, project, projection_side

SHAPES = [(40, 12), (12, 40), (20, 20), (5000, 6), (1, 7), (7, 1)]


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(shape: tuple[int, int], rank: int, seed: int = 0) -> Tensor:
    """A gradient of a certain rank."""
    left, right = torch.randn(shape[0], rank, generator=draw(seed)), torch.randn(rank, shape[1], generator=draw(-seed))
    return left @ right


def decaying(shape: tuple[int, int], spectrum: Tensor, seed: int = 0) -> Tensor:
    """A gradient with these singular values."""
    count = spectrum.numel()
    return (random_basis(shape[0], count, draw(seed)) * spectrum) @ random_basis(shape[1], count, draw(seed + 1)).T


def captured(grad: Tensor, basis: Tensor) -> float:
    """Share of the squared norm in the span of an orthonormal basis."""
    return float(project(grad, basis).double().square().sum() / grad.double().square().sum())


Maker = Callable[[Tensor, int], Tensor]
FROM_GRADIENTS: dict[str, Maker] = {
    "svd": svd_basis,
    "randomized": lambda grad, rank: randomized_basis(grad, rank, draw(5)),
    "tracked": lambda grad, rank: tracked_basis(grad, random_basis(min(grad.shape), rank, draw(5))),
    "tracked twice": lambda grad, rank: tracked_basis(
        grad, tracked_basis(grad, svd_basis(torch.zeros_like(grad), rank))
    ),
    "random": lambda grad, rank: random_basis(min(grad.shape), rank, draw(5)),
}


@pytest.mark.parametrize("kind", FROM_GRADIENTS)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(0, 9),
    st.sampled_from([1e-25, 1e-12, 1e-6, 1.0, 1e6, 1e25]),
    st.integers(0, 99),
    st.data(),
)
@settings(max_examples=80, deadline=None)
def test_orthonormal(kind: str, m: int, n: int, grad_rank: int, size: float, seed: int, data: st.DataObject) -> None:
    """Whatever the shape and rank; for gradients of any size, of less rank than the basis, and zero ones."""
    rank = data.draw(st.integers(1, min(m, n)))
    basis = FROM_GRADIENTS[kind](size * low_rank((m, n), grad_rank, seed), rank)
    assert basis.shape == basis_shape((m, n), rank) and basis.dtype == torch.float32
    worst = float((basis.T @ basis - torch.eye(rank)).abs().max())
    assert worst <= 1e-5, worst  # worst seen 7.2e-7 (svd, whose eigenvectors are float64's: 2.4e-7)


@pytest.mark.parametrize("kind", FROM_GRADIENTS)
@pytest.mark.parametrize("shape", [(2000, 300), (300, 2000)], ids=str)
@pytest.mark.parametrize("rank", [128, 300])
def test_orthonormal_in_a_layers_size(kind: str, shape: tuple[int, int], rank: int) -> None:
    basis = FROM_GRADIENTS[kind](low_rank(shape, 20) + 1e-3 * low_rank(shape, 300), rank)
    assert float((basis.T @ basis - torch.eye(rank)).abs().max()) <= 1e-5  # worst seen 9.5e-7


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", FROM_GRADIENTS)
def test_full_rank_gives_the_gradient_back(shape: tuple[int, int], kind: str) -> None:
    grad = low_rank(shape, min(shape))
    basis = FROM_GRADIENTS[kind](grad, min(shape))
    back = project_back(project(grad, basis), basis, projection_side(shape))
    assert float((back - grad).norm() / grad.norm()) <= 1e-5  # float32 products; worst seen 9e-7


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20), (5000, 6)], ids=str)
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_svd_spans_the_leading_singular_vectors(shape: tuple[int, int], size: float) -> None:
    grad = size * (low_rank(shape, 3) + 1e-2 * low_rank(shape, min(shape), seed=1))
    u, _, vh = torch.linalg.svd(grad.double(), full_matrices=False)
    expected = vh[:3].T if projection_side(shape) == "right" else u[:, :3]
    cosines = torch.linalg.svdvals(expected.T @ svd_basis(grad, 3).double())
    # Cosines of the principal angles; 1 - 1e-6 is an angle of a tenth of a degree. Worst seen 1 - 2e-7.
    assert float(cosines.min()) >= 1 - 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_svd_is_a_function_of_the_gradient(shape: tuple[int, int]) -> None:
    grad = low_rank(shape, min(shape))
    rank = max(1, min(shape) // 2)
    assert torch.equal(svd_basis(grad, rank), svd_basis(grad.clone(), rank))
    # The sign is fixed by the basis alone: turning the gradient round gives the same basis.
    assert torch.allclose(svd_basis(-grad, rank), svd_basis(grad, rank), atol=1e-6)


def test_row_blocks_of_the_gram_matrix_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    grad = low_rank((300, 8), 8)
    whole = svd_basis(grad, 4)
    monkeypatch.setattr(bases, "_GRAM_ROWS", 7)
    assert torch.allclose(svd_basis(grad, 4), whole, atol=1e-6)  # float64 sums in another order


@pytest.mark.parametrize("shape", [(300, 80), (80, 300), (100, 100)], ids=str)
@pytest.mark.parametrize("size", [1e-25, 1e-12, 1.0, 1e6, 1e18, 1e25])
# By how singular values fall with k; worst seen 0.9959 (rank 16), 1.0000, and 0.893 (rank 4).
@pytest.mark.parametrize(("decay", "least"), [(1.0, 0.99), (2.0, 0.999), (0.5, 0.85)])
def test_randomized_captures_what_svd_does(shape: tuple[int, int], size: float, decay: float, least: float) -> None:
    """Of the squared norm, on spectra that fall like k^-decay."""
    grad = size * decaying(shape, torch.arange(1, 81).float() ** -decay)
    for rank in (4, 16, 64):
        best = captured(grad, svd_basis(grad, rank))
        shares = [captured(grad, randomized_basis(grad, rank, draw(seed))) / best for seed in range(5)]
        assert least <= min(shares) <= max(shares) <= 1 + 1e-5


def test_randomized_is_a_function_of_gradient_and_generator() -> None:
    grad = low_rank((60, 40), 40)
    assert torch.equal(randomized_basis(grad, 5, draw(1)), randomized_basis(grad, 5, draw(1)))
    assert not torch.equal(randomized_basis(grad, 5, draw(1)), randomized_basis(grad, 5, draw(2)))


@pytest.mark.parametrize("shape", [(300, 80), (80, 300), (100, 100)], ids=str)
def test_tracked_arrives_at_the_leading_subspace(shape: tuple[int, int]) -> None:
    """On a gradient that stays. The error shrinks by (s_r+1 / s_r)^2 each time: here to a quarter of a quarter."""
    grad = decaying(shape, 2.0 ** -torch.arange(20.0))
    basis, best = random_basis(min(shape), 6, draw(3)), svd_basis(grad, 6)
    overlaps = []
    for _ in range(12):
        basis = tracked_basis(grad, basis)
        overlaps.append(float(overlap(basis, best)))
    assert all(later >= earlier - 1e-6 for earlier, later in pairwise(overlaps))
    assert overlaps[0] > 0.5 and overlaps[-1] >= 1 - 1e-5, overlaps  # worst seen 1 - 5e-7


def test_tracked_finds_its_way_back_from_nothing() -> None:
    """A gradient that is zero at one refresh, or that lies outside of the basis altogether, loses nothing for long."""
    grad = decaying((60, 30), 2.0 ** -torch.arange(20.0))
    basis = tracked_basis(torch.zeros(60, 30), svd_basis(grad, 4))
    outside = random_basis(30, 30, draw(2))
    for other in (basis, (outside - svd_basis(grad, 20) @ (svd_basis(grad, 20).T @ outside))[:, :4].contiguous()):
        for _ in range(12):
            other = tracked_basis(grad, other)
        assert float(overlap(other, svd_basis(grad, 4))) >= 1 - 1e-5


@given(st.integers(1, 20), st.integers(0, 99), st.data())
@settings(max_examples=60, deadline=None)
def test_overlap(short: int, seed: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, short))
    one, other = random_basis(short, rank, draw(seed)), random_basis(short, rank, draw(seed + 1))
    value = float(overlap(one, other))
    # Two subspaces of more than half the dimensions must share some. The bounds are met within float32's roundings.
    assert max(0.0, 2 * rank - short) / rank - 1e-5 <= value <= 1 + 1e-5
    assert float(overlap(other, one)) == pytest.approx(value, abs=1e-5)
    turned = one @ random_basis(rank, rank, draw(seed))
    assert float(overlap(one, turned)) == pytest.approx(1, abs=1e-5)
    assert float(overlap(turned, other)) == pytest.approx(value, abs=1e-5)


def test_overlap_of_orthogonal_and_of_random_subspaces() -> None:
    whole = random_basis(200, 40, draw(0))
    assert float(overlap(whole[:, :20], whole[:, 20:])) <= 1e-10
    # r / k = 0.1 on average; the spread of one draw is below 0.01.
    values = [float(overlap(random_basis(200, 20, draw(s)), random_basis(200, 20, draw(s + 99)))) for s in range(20)]
    assert sum(values) / 20 == pytest.approx(0.1, abs=0.01)


def test_gaussian_keeps_norms_on_average() -> None:
    """Entries of variance 1 / r, so E |x P|^2 = |x|^2 (Johnson and Lindenstrauss)."""
    x = torch.randn(60, generator=draw(0))
    ratios = [float((x @ gaussian_basis(60, 8, draw(seed))).square().sum() / x.square().sum()) for seed in range(400)]
    # A ratio is chi-square(8) / 8 with deviation 0.5; the mean of 400 within four times 0.025.
    assert sum(ratios) / 400 == pytest.approx(1, abs=0.1)
