"""A refresh by products of a gradient that was never formed, against the refresh by the gradient itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from contract.test_stepper import SUBSPACE, Parts, worst_error
from engines import CPU
from sophia_galore.data.portion import whole
from sophia_galore.engine import cross_entropy
from sophia_galore.engine.projected_gradient import LazyTerms
from sophia_galore.errors import NonFiniteError
from sophia_galore.memory.tracker import StorageTracker
from sophia_galore.numerics.bases import BasisKind, overlap, randomized_basis, tracked_basis
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.subspace import ProjectedGradient, Projector
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.weights.int8 import Int8Format, quantise
from tiny import VOCAB, ragged_batches

SHAPES = pytest.mark.parametrize("shape", [(60, 24), (24, 60), (24, 24)], ids=["right", "left", "square"])
KINDS: list[BasisKind] = ["tracked", "randomized", "random", "gaussian"]
RANK = SUBSPACE.rank


def unformed(grad: Tensor) -> LazyTerms:
    return LazyTerms(grad.shape, CPU, lambda product: product.add_whole(grad))


def gradient(shape: tuple[int, int], step: int) -> Tensor:
    """With singular values that fall like 1 / k: a basis that is well determined, so that roundings stay roundings."""
    draw = torch.Generator().manual_seed(step)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=draw), full_matrices=False)
    return left / torch.arange(1, min(shape) + 1) @ right


@SHAPES
def test_bases_from_products(shape: tuple[int, int]) -> None:
    grad, short = gradient(shape, 1), min(shape)
    start = torch.linalg.qr(torch.randn(short, RANK, generator=torch.Generator().manual_seed(3))).Q
    for make in (
        lambda given: tracked_basis(given, start),
        lambda given: randomized_basis(given, RANK, torch.Generator().manual_seed(4)),
    ):
        basis, expected = make(unformed(grad)), make(grad)
        assert basis.shape == expected.shape == (short, RANK)
        # Products in another order, through two QR decompositions; a mean of squared cosines; worst seen 1.8e-7.
        assert float(overlap(basis, expected)) == pytest.approx(1, abs=2e-6)
        assert float((basis.T @ basis - torch.eye(RANK)).abs().max()) <= 2e-6  # roundings of a QR


def spec_of(shape: tuple[int, int], **more: Any) -> ParamSpec:
    subspace = replace(SUBSPACE, fast=True, gap=3, **{"kind": "tracked", **more})
    return ParamSpec("w", shape, 1e-2, 0.01, Hyper(), subspace=subspace)


def end(spec: ParamSpec, by_products: bool, num_steps: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Weight and state after some steps, each by a product wherever the optimizer asks for one, or by gradients."""
    optimizer, weight = ParamOptimizer([spec], seed=0), torch.zeros(spec.shape)
    for step in range(1, num_steps + 1):
        grad = gradient((spec.shape[0], spec.shape[1]), step)
        projector = None
        if by_products:
            projector = optimizer.projector("w", step)
            if projector is None:
                choose = optimizer.basis_from_gradient("w", step)
                assert choose is not None
                projector = choose(unformed(grad))
        given = grad if projector is None else ProjectedGradient(projector.of(grad))
        optimizer.step_param("w", weight, given, step=step, factor=1.0)
    return weight, optimizer.states.named()


@SHAPES
@pytest.mark.parametrize("adaptive", [False, True], ids=["fixed gap", "adaptive gap"])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_by_products_alone(shape: tuple[int, int], kind: BasisKind, adaptive: bool) -> None:
    """Through first step, octaves and gaps no gradient is seen: weight and state are those of full gradients."""
    spec = spec_of(shape, kind=kind, adaptive=adaptive and kind in ("tracked", "randomized"))
    weight, state = end(spec, True, 8)
    expected, expected_state = end(spec, False, 8)
    # Eight steps of Adam, which divides what is nearly zero by its size; worst seen 5.2e-7.
    assert float((weight - expected).norm() / expected.norm()) <= 5e-6
    assert state.keys() == expected_state.keys()
    for name, tensor in state.items():
        other = expected_state[name]
        assert float((tensor - other).double().norm()) <= 5e-6 * float(other.double().norm()), name  # as above


@pytest.mark.parametrize("kind", ["svd", "residual", "not fast", "dense"])
def test_gradients_are_wanted_where_products_are_not_enough(kind: str) -> None:
    more: dict[str, dict[str, Any]] = {"svd": {"kind": "svd"}, "residual": {"residual": "fira"}, "not fast": {}}
    spec = spec_of((60, 24), **more.get(kind, {}))
    assert spec.subspace is not None
    if kind in ("not fast", "dense"):
        spec = replace(spec, subspace=replace(spec.subspace, fast=False) if kind == "not fast" else None)
    assert ParamOptimizer([spec], seed=0).basis_from_gradient("w", 1) is None


@SHAPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
def test_a_gradient_that_is_not_finite_leaves_the_state_alone(
    shape: tuple[int, int], kind: BasisKind, bad: float
) -> None:
    """Whether the products that make the basis tell, or the one that is the step's."""
    optimizer, grad, weight = (
        ParamOptimizer([spec_of(shape, kind=kind)], seed=0),
        gradient(shape, 1),
        torch.zeros(shape),
    )
    optimizer.states.of("w", CPU)
    before = {name: tensor.clone() for name, tensor in optimizer.states.named().items()}
    grad[3, 5] = bad
    choose = optimizer.basis_from_gradient("w", 1)
    assert choose is not None
    with pytest.raises(NonFiniteError, match="gradient of w is not finite at step 1"):
        product = choose(unformed(grad)).of(grad)
        optimizer.step_param("w", weight, ProjectedGradient(product), step=1, factor=1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in optimizer.states.named().items())
    assert not weight.any()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["tracked", "randomized", "random"])
def test_curvature_by_products_alone(tmp_path: Path, kind: BasisKind, tied: bool) -> None:
    """Sophia's estimates fall on the first step and on refreshes, where the curvature waits in the last basis."""
    runs = {}
    for fast in (False, True):
        subspace = replace(SUBSPACE, kind=kind, gap=3, fast=fast)
        parts = Parts(tmp_path, subspace=subspace, rule="sophia", curvature_every=2, tied=tied)
        begun = parts.weights()
        parts.go(5)
        runs[fast] = parts.weights(), parts.optimizer.states.named()
    # Sophia clips what it divides by a curvature that is a square: worst seen 7.3e-6.
    assert worst_error(runs[True][0], runs[False][0], begun) <= 5e-5
    for name, tensor in runs[False][1].items():
        if name.split("/")[0] in ("model.embed_tokens.weight", "lm_head.weight"):
            error = float((runs[True][1][name] - tensor).norm() / tensor.norm())
            assert error <= 5e-5, name  # as above; worst seen 1.8e-6


class _Largest(StorageTracker):
    """Bytes of the largest storage that an operation made; codes are given, and seen through views."""

    def __init__(self, codes: set[int]) -> None:
        super().__init__(CPU)
        self.codes, self.largest = codes, 0

    def _add(self, tensor: Tensor, category: Any) -> bool:
        fits = super()._add(tensor, category)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.codes:
            self.largest = max(self.largest, storage.nbytes())
        return fits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["tracked", "randomized", "random"])
def test_nothing_as_large_as_the_head_is_ever_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: BasisKind, tied: bool
) -> None:
    """With weights in eight bits, in each of the first steps and looks at the curvature: no V x d in any float."""
    monkeypatch.setattr(cross_entropy, "_BLOCK_BYTES", 4 * 192 * 64)
    monkeypatch.setattr(cross_entropy, "_CHUNK_BYTES", {"cpu": 4 * 192 * 32})
    num_words = 4 * VOCAB
    parts = Parts(
        tmp_path,
        subspace=replace(SUBSPACE, kind=kind, fast=True),
        rule="sophia",
        curvature_every=1,
        tied=tied,
        vocab_size=num_words,
    )
    big = [spec.name for spec in parts.specs if spec.shape == (num_words, 64)]
    assert len(big) == (1 if tied else 2)
    codes = set()
    for name in big:
        weight = parts.store[name]
        packed = quantise(weight.values(torch.float32), Int8Format())
        parts.store[name] = packed
        codes.add(packed.codes.untyped_storage().data_ptr())
    monkeypatch.setattr("sophia_galore.numerics.row_blocks._BLOCK_ELEMENTS", 64 * 64)
    for step in range(1, 3):
        with _Largest(codes) as tracker:
            parts.stepper.take(whole(ragged_batches(step)), step=step, factor=1.0)
        # Products are V x (rank + probes), 14 columns of 64; the weight would be 32 of them even in bfloat16.
        assert tracker.largest <= 4 * num_words * (RANK + 8), step


def test_choosers_and_projectors_say_the_same() -> None:
    """After its refresh a chooser gives what the fast path gives at any other step: basis and probes."""
    spec = spec_of((60, 24))
    optimizer = ParamOptimizer([spec], seed=0)
    choose = optimizer.basis_from_gradient("w", 1)
    assert choose is not None
    chosen = choose(unformed(gradient((60, 24), 1)))
    assert isinstance(chosen, Projector) and chosen.side == "right"
    assert chosen.matrix.shape == (24, RANK + 8)
    assert torch.equal(chosen.matrix[:, :RANK], optimizer.states.named()["w/basis"])
    # Probes are orthogonal to the basis, so that their products add to the norm what the basis does not see.
    assert float((chosen.matrix[:, :RANK].T @ chosen.matrix[:, RANK:]).abs().max()) <= 1e-6  # roundings
