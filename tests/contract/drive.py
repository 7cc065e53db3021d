"""Steps of one parameter, for the tests of the contract."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from contract.cases import Case
from engines import CPU
from sophia_galore.numerics.random import generator
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.weights.int8 import Int8Format, quantise
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.weight import Weight

NUM_SAMPLES = 5
# Neither divides the columns of the cases nor is divided by them.
INT8_BLOCK = 4


def make(spec: ParamSpec, seed: int = 0) -> ParamOptimizer:
    """The door, for one parameter."""
    return ParamOptimizer([spec], seed=seed, device=CPU)


def start(case: Case) -> Weight:
    """A weight to begin with."""
    weight = torch.randn(case.shape, generator=generator(1, "weight"))
    if case.dtype in (torch.int8, "folded"):
        return quantise(weight, Int8Format(INT8_BLOCK))
    assert isinstance(case.dtype, torch.dtype)
    return PlainWeight(weight.to(case.dtype))


def values(weight: Weight) -> Tensor:
    """A copy of what a stored weight stands for, in float32."""
    return weight.values(torch.float32).clone()


def gradient(spec: ParamSpec, step: int) -> Tensor:
    """A gradient of a step."""
    return torch.randn(spec.shape, generator=generator(1, "gradient", step))


def one_step(optimizer: ParamOptimizer, name: str, weight: Weight, step: int) -> None:
    """A step of one parameter; at every other one it has a look at the curvature first."""
    spec = optimizer.specs[name]
    if step % 2:
        sampled = 3 * gradient(spec, 1000 + step)
        optimizer.observe_curvature(name, sampled, step=step, num_samples=NUM_SAMPLES)
    optimizer.step_param(name, weight, gradient(spec, step), step=step, factor=1.0)


def go(optimizer: ParamOptimizer, weight: Weight, steps: Iterable[int]) -> Weight:
    """Steps of the only parameter."""
    (name,) = optimizer.specs
    weight = optimizer.with_deferred_update(name, weight)
    for step in steps:
        one_step(optimizer, name, weight, step)
    return weight


def copies(optimizer: ParamOptimizer) -> dict[str, Tensor]:
    """The state as it is now."""
    return {name: tensor.clone() for name, tensor in optimizer.states.named().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
