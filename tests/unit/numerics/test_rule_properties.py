"""What each rule promises beyond its formula, which tests/reference has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.rules import RULES, State, sophia_curvature

HYPER = Hyper()
SHAPE = (12, 8)


def fresh(rule: str, shape: tuple[int, int] = SHAPE) -> State:
    extents = {"full": shape, "rows": (shape[0], 1), "columns": (1, shape[1])}
    return {name: torch.zeros(extents[slot.extent]) for name, slot in RULES[rule].slots.items()}


def gradient(shape: tuple[int, int] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients_have_no_direction(rule: str) -> None:
    direction, state = RULES[rule].update(torch.zeros(SHAPE), fresh(rule), HYPER, 1)
    assert not direction.any()
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("eps", [1e-8, 1e-15, 1e-30])
@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e6, 1e12])
@pytest.mark.parametrize("rule", RULES)
def test_directions_are_finite(rule: str, size: float, eps: float) -> None:
    """With zero rows and columns, at any size, with any epsilon that a user may give."""
    grad = size * gradient()
    grad[3], grad[:, 2] = 0, 0
    for given in (grad, torch.zeros(SHAPE)):
        direction, state = RULES[rule].update(given, fresh(rule), replace(HYPER, eps=eps), 1)
        assert direction.isfinite().all()
        assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("rule", ["adamw", "adafactor", "muon"])
@pytest.mark.parametrize("size", [0.1, 1e3])
def test_directions_do_not_depend_on_the_size_of_gradients(rule: str, size: float) -> None:
    one, _ = RULES[rule].update(gradient(), fresh(rule), HYPER, 1)
    other, _ = RULES[rule].update(size * gradient(), fresh(rule), HYPER, 1)
    # Epsilon, 1e-8, beside the smallest entries of 0.1 times a normal draw; worst seen 1.0e-4 of a step of about 1.
    assert torch.allclose(one, other, atol=1e-3)


@pytest.mark.parametrize("rule", ["adafactor", "muon", "adamw"])
def test_transposed_gradients_have_transposed_directions(rule: str) -> None:
    tall, _ = RULES[rule].update(gradient(), fresh(rule), HYPER, 1)
    wide, _ = RULES[rule].update(gradient().T.contiguous(), fresh(rule, SHAPE[::-1]), HYPER, 1)
    assert torch.allclose(tall, wide.T, atol=1e-5)  # the same sums in another order; worst seen 5e-7


@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (16, 16)], ids=str)
def test_muon_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    direction, _ = RULES["muon"].update(gradient(shape), fresh("muon", shape), HYPER, 1)
    values = torch.linalg.svdvals(direction) / (0.2 * max(shape) ** 0.5)
    # The iteration's own range, for singular values that are not tiny beside the largest.
    assert float(values[-2]) >= 0.3 and float(values[0]) <= 1.25
    assert float(direction.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)  # AdamW's root mean square


def test_sophias_directions_are_clipped() -> None:
    state = fresh("sophia")
    state["curvature"] = torch.full(SHAPE, 1e3)
    state["curvature"][:6] = 0
    direction, _ = RULES["sophia"].update(gradient(), state, HYPER, 1)
    assert torch.equal(direction[:6], gradient()[:6].sign())
    assert float(direction[6:].abs().max()) < 1


def test_curvature() -> None:
    grad = gradient()
    first = sophia_curvature(grad, None, HYPER, 7)
    assert torch.allclose(first, 7 * grad.square())
    assert torch.equal(grad, gradient())
    second = sophia_curvature(torch.zeros(SHAPE), first, replace(HYPER, beta2=0.9), 7)
    assert torch.allclose(second, 0.9 * first)


def test_adafactors_updates_are_at_most_of_length_1_a_number() -> None:
    state: State = fresh("adafactor")
    for step, size in enumerate([1e-3, 1e-3, 10.0], 1):  # a sudden gradient that the second moment does not know
        direction, state = RULES["adafactor"].update(size * gradient(seed=step), state, replace(HYPER, beta1=0.0), step)
        assert float(direction.square().mean().sqrt()) <= 1 + 1e-6
