"""Every rule and every step in a subspace against its plainest float64 form, 20 steps with refreshes."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from contract.cases import Case, is_meaningful, main_product
from engines import CPU
from sophia_galore.numerics.bases import gaussian_basis, random_basis
from sophia_galore.numerics.int4 import unpack
from sophia_galore.numerics.random import generator
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.recipes import STORED_BASES, StateBits
from sophia_galore.optim.spec import ParamSpec

sys.path.insert(0, str(Path(__file__).parent))
from plain_projected import PlainProjected
from plain_rules import PLAIN_RULES, Sophia

NUM_STEPS = 20
NUM_SAMPLES = 11  # labels of a curvature estimate
SEED = 4
# Distance of the ends, relative to the way: float32 against float64, most of it the weight's own roundings, since
# weights are larger than the way. Worst seen 6.0e-6 (AdamW, svd, square).
TOLERANCE = 2e-5
SHAPES = {"right": (14, 6), "left": (6, 14), "square": (9, 9)}


def gradient(shape: tuple[int, ...], step: int, purpose: str = "gradient") -> Tensor:
    """A part that stays and a part that does not."""
    steady = torch.randn(shape, generator=generator(SEED, "steady", str(shape)))
    return steady + torch.randn(shape, generator=generator(SEED, purpose, str(shape), step))


def start(shape: tuple[int, ...]) -> Tensor:
    return 0.3 * torch.randn(shape, generator=generator(SEED, "weight", str(shape)))


def basis_of(optimizer: ParamOptimizer, spec: ParamSpec, step: int) -> Tensor:
    """The basis that is in use: what was stored, or what the seed says."""
    assert spec.subspace is not None
    state, subspace, short = optimizer.states.named(), spec.subspace, min(spec.shape)
    if subspace.kind not in STORED_BASES:
        draw = generator(SEED, "basis", spec.name, (step - 1 + subspace.offset) // subspace.gap)
        make = gaussian_basis if subspace.kind == "gaussian" else random_basis
        return make(short, subspace.rank, draw)
    if subspace.projection_bits == 4:
        packed, scales = state[f"{spec.name}/basis.packed"], state[f"{spec.name}/basis.scales"]
        return unpack(packed, scales, (short, subspace.rank))
    return state[f"{spec.name}/basis"].float().clone()


def relative_error(weight: Tensor, plain: Tensor, begun: Tensor) -> float:
    """Distance of two ends, relative to the way that was gone."""
    return float((weight - plain).norm() / (plain - begun).norm())


@pytest.mark.pairwise
@pytest.mark.parametrize("case", [case for case in main_product() if case.kind != "dense"], ids=str)
def test_every_step_in_a_subspace(case: Case) -> None:
    """Given the bases. Curvature is looked at every fifth step, as often as bases are refreshed, and at the same."""
    for side, shape in SHAPES.items():
        spec = replace(case, shape=shape).spec(gap=5, offset=0)
        optimizer = ParamOptimizer([spec], seed=SEED, device=CPU)
        weight, begun = start(shape), start(shape)
        rank = spec.subspace.rank if spec.subspace else 0
        plain = PlainProjected(spec, PLAIN_RULES[case.rule](spec.hyper, (max(shape), rank)), weight)
        for step in range(1, NUM_STEPS + 1):
            if step % 5 == 1:
                sampled = gradient(shape, step, "curvature")
                optimizer.observe_curvature("w", sampled, step=step, num_samples=NUM_SAMPLES)
                if case.rule == "sophia":
                    plain.observe(sampled, basis_of(optimizer, spec, max(1, step - 1)), NUM_SAMPLES)
            grad = gradient(shape, step)
            optimizer.step_param("w", weight, grad.clone(), step=step, factor=1.0)
            plain.step(grad, basis_of(optimizer, spec, step), step)
        error = relative_error(weight, plain.weight, begun)
        assert error <= TOLERANCE, side


@pytest.mark.parametrize(
    "case",
    [
        case
        for rule in RULES
        for shape in [*SHAPES.values(), (13,)]
        if is_meaningful(case := Case(rule, "dense", shape=shape))
    ],
    ids=str,
)
def test_every_rule_on_full_gradients(case: Case) -> None:
    spec, shape = case.spec(), case.shape
    optimizer = ParamOptimizer([spec], seed=SEED, device=CPU)
    weight, plain = start(shape), start(shape).double()
    reference = PLAIN_RULES[case.rule](spec.hyper, shape)
    for step in range(1, NUM_STEPS + 1):
        if step % 5 == 1:
            sampled = gradient(shape, step, "curvature")
            optimizer.observe_curvature("w", sampled, step=step, num_samples=NUM_SAMPLES)
            if isinstance(reference, Sophia):
                reference.observe(sampled.double(), NUM_SAMPLES)
        grad = gradient(shape, step)
        optimizer.step_param("w", weight, grad, step=step, factor=1.0)
        plain = (1 - spec.learning_rate * spec.weight_decay) * plain
        plain -= spec.learning_rate * reference.direction(grad.double(), step)
    assert relative_error(weight, plain, start(shape)) <= TOLERANCE


# In bfloat16 two numbers are 2^-8 to 2^-7 of themselves apart, so a rounding costs 0.4% at most, and many of them
# average out: worst seen 5.6e-3. Eight-bit codes of first moments are 6% to 13% apart, of second ones half of that,
# of which a direction sees the root: worst seen 5.3e-2.
@pytest.mark.parametrize(("state_bits", "tolerance"), [(16, 1.2e-2), (8, 0.1)])
@pytest.mark.parametrize(
    "case",
    [
        case
        for rule in RULES
        for kind in ("dense", "svd")
        if RULES[rule].slots and is_meaningful(case := Case(rule, kind, shape=(40, 16)))
    ],
    ids=str,
)
def test_narrow_states(case: Case, state_bits: StateBits, tolerance: float) -> None:
    """Against the same steps with states in float32."""
    ends = []
    bits: StateBits
    for bits in (32, state_bits):
        spec = replace(case, state_bits=bits).spec(gap=5, offset=0)
        optimizer = ParamOptimizer([spec], seed=SEED, device=CPU)
        weight = start(case.shape)
        for step in range(1, NUM_STEPS + 1):
            if step % 5 == 1:
                sampled = gradient(case.shape, step, "curvature")
                optimizer.observe_curvature("w", sampled, step=step, num_samples=NUM_SAMPLES)
            optimizer.step_param("w", weight, gradient(case.shape, step), step=step, factor=1.0)
        ends.append(weight)
    assert 0 < relative_error(ends[1], ends[0], start(case.shape)) <= tolerance
