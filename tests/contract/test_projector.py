"""Products in place of gradients: `ParamOptimizer.projector` and steps with a `ProjectedGradient`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from contract.cases import Case, all_cases
from contract.drive import NUM_SAMPLES, copies, gradient, make, same, start, values
from sophia_galore.errors import NonFiniteError
from sophia_galore.numerics.random import generator
from sophia_galore.numerics.subspace import Gradient, ProjectedGradient, tensor_of
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec

FAST = [case for case in all_cases() if case.kind != "dense" and case.residual == "none"]
every_fast_case = pytest.mark.parametrize("case", FAST, ids=str)


def fast(case: Case, *, gap: int = 3) -> ParamSpec:
    spec = case.spec(gap=gap)
    assert spec.subspace is not None
    return replace(spec, subspace=replace(spec.subspace, fast=True))


def product(optimizer: ParamOptimizer, grad: Tensor, step: int) -> Gradient:
    """The gradient, or what is asked for in its place."""
    wanted = optimizer.projector("w", step)
    return grad if wanted is None else ProjectedGradient(wanted.of(grad))


@every_fast_case
def test_products_make_the_same_step(case: Case) -> None:
    whole, quick = make(case.spec()), make(fast(case))
    one, other = whole.with_deferred_update("w", start(case)), quick.with_deferred_update("w", start(case))
    ways = []
    for step in range(1, 9):
        if step % 2:
            sampled = 3 * gradient(whole.specs["w"], 1000 + step)
            low = product(quick, sampled, step)
            whole.observe_curvature("w", sampled, step=step, num_samples=NUM_SAMPLES)
            quick.observe_curvature("w", low, step=step, num_samples=NUM_SAMPLES)
        grad = gradient(whole.specs["w"], step)
        low = product(quick, grad, step)
        ways.append(isinstance(low, ProjectedGradient))
        whole.step_param("w", one, grad, step=step, factor=1.0)
        quick.step_param("w", other, low, step=step, factor=1.0)
    assert any(ways) and not all(ways)
    begun = values(start(case))
    error = float((values(one) - values(other)).norm() / (values(one) - begun).norm())
    # Columns of a wider product may sum in another order; worst seen 6.0e-7. Where states or weights are rounded, the
    # last bit may tip a rounding over: not seen here, but one code of 8 bits is an eighth of a number.
    exact = case.dtype == torch.float32 and case.state_bits == 32
    assert error <= (1e-5 if exact else 2e-2)


@every_fast_case
def test_bad_products_touch_neither_weight_nor_state(case: Case) -> None:
    spec = fast(case, gap=50)
    optimizer = make(spec)
    weight = optimizer.with_deferred_update("w", start(case))
    optimizer.step_param("w", weight, gradient(spec, 1), step=1, factor=1.0)
    step = next(step for step in range(2, 50) if optimizer.projector("w", step))
    kept, state = values(weight), copies(optimizer)
    for bad in (float("nan"), float("inf")):
        low = product(optimizer, gradient(spec, 2), step)
        assert isinstance(low, ProjectedGradient)
        low.product.view(-1)[-1] = bad  # in a probe, where there are any: the full gradient was not finite either
        with pytest.raises(NonFiniteError):
            optimizer.step_param("w", weight, low, step=step, factor=1.0)
        if case.rule == "sophia":
            with pytest.raises(NonFiniteError):
                optimizer.observe_curvature("w", low, step=step, num_samples=2)
    assert torch.equal(values(weight), kept)
    assert same(optimizer.states.named(), state)


@every_fast_case
def test_asking_changes_nothing(case: Case) -> None:
    optimizer, weight = make(fast(case)), start(case)
    for step in range(1, 5):
        state = copies(optimizer)
        one, other = optimizer.projector("w", step), optimizer.projector("w", step)
        assert same(optimizer.states.named(), state)
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one.matrix, other.matrix)
        optimizer.step_param("w", weight, gradient(optimizer.specs["w"], step), step=step, factor=1.0)


@pytest.mark.parametrize("case", [case for case in all_cases() if case.residual != "none"][::10], ids=str)
def test_residuals_want_the_whole_gradient(case: Case) -> None:
    optimizer, weight = make(fast(case, gap=50)), start(case)
    optimizer.step_param("w", weight, gradient(optimizer.specs["w"], 1), step=1, factor=1.0)
    assert not any(optimizer.projector("w", step) for step in range(1, 10))


def test_before_there_is_a_state_the_gradient_is_wanted() -> None:
    """States are made when they are first needed, if no device was named."""
    case = Case("adamw", "svd")
    optimizer = ParamOptimizer([fast(case, gap=50)], seed=0)
    assert optimizer.projector("w", 1) is None and optimizer.projector("w", 2) is None
    optimizer.step_param("w", start(case), gradient(optimizer.specs["w"], 1), step=1, factor=1.0)
    assert optimizer.projector("w", 2) is not None


def test_only_where_it_is_wanted() -> None:
    for case in (Case("adamw", "dense"), Case("adamw", "svd")):
        optimizer, weight = make(case.spec(gap=50)), start(case)
        optimizer.step_param("w", weight, gradient(optimizer.specs["w"], 1), step=1, factor=1.0)
        assert optimizer.projector("w", 2) is None


@pytest.mark.parametrize("kind", ["svd", "random"])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (30, 8), (30, 3)], ids=str)
def test_norms_of_products_estimate_the_gradients(kind: str, shape: tuple[int, int]) -> None:
    """|G A|^2 is |G|^2 on average, over steps, each of which draws its own probes."""
    case = Case("adamw", kind, shape=shape)
    spec = fast(case, gap=1000)
    optimizer, weight = make(spec), start(case)
    optimizer.step_param("w", weight, gradient(spec, 1), step=1, factor=1.0)
    grad = torch.randn(shape, generator=generator(0, "another"))
    steps = range(10, 410)
    found = [product(optimizer, grad, step) for step in steps]
    products = [low.product for low in found if isinstance(low, ProjectedGradient)]
    assert len(products) == len(steps)
    squares = torch.stack([low.square().sum() for low in products])
    exact, spread = float(grad.square().sum()), float(squares.std() / len(steps) ** 0.5)
    # Four standard errors of the mean of 400; where the basis is the whole space there are no probes, but roundings.
    assert abs(float(squares.mean()) - exact) <= 4 * spread + 1e-5 * exact
    assert products[0].shape[1 if shape[0] >= shape[1] else 0] == 3 + min(8, min(shape) - 3)
    # One product, whose norm is what is recorded: 8 probes see the rest, which is most of it here.
    assert float((squares.sqrt() / exact**0.5 - 1).abs().mean()) <= (0.15 if min(shape) > 8 else 0.35)


def test_estimates_by_four_bit_bases_are_a_little_high() -> None:
    """P^T P is 1 to 3 in a hundred above 1, and so is the share of the norm that lies in the subspace."""
    case = Case("adamw", "svd", projection_bits=4, shape=(300, 64))
    spec = fast(case, gap=1000)
    assert spec.subspace is not None
    spec = replace(spec, subspace=replace(spec.subspace, rank=16))
    optimizer, weight = make(spec), start(case)
    grad = torch.randn(300, 16) @ torch.randn(16, 64)  # all of it in the subspace
    optimizer.step_param("w", weight, grad, step=1, factor=1.0)
    products = [tensor_of(product(optimizer, grad, step)) for step in range(10, 60)]
    squares = [float(low.square().sum() / grad.square().sum()) for low in products]
    mean = sum(squares) / len(squares)
    assert 1 < mean <= 1.04  # worst seen 1.015
