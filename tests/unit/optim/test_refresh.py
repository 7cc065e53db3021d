"""When a basis is made anew, and when an adaptive gap thinks better of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engines import CPU
from sophia_galore.numerics.bases import BasisKind, random_basis
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.random import generator
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.recipes import ProjectionBits
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec
from sophia_galore.weights.tensor_stream import TensorStream

kinds = st.sampled_from(["svd", "tracked", "random"])


def refreshes(spec: SubspaceSpec, num_steps: int) -> list[int]:
    return [step for step in range(1, num_steps + 1) if spec.refreshes_at(step)]


@pytest.mark.parametrize(
    ("kind", "gap", "offset", "expected"),
    [
        ("svd", 4, 0, [1, 5, 9]),
        ("svd", 4, 1, [1, 4, 8, 12]),
        ("random", 1, 0, list(range(1, 13))),
        # 2 and 4 (8 and later in their octaves are past the gap), beside 1 and 7
        ("tracked", 6, 0, [1, 2, 4, 7]),
        # half-way through each octave below the gap: 2 + 1, 4 + 2, 8 + 4; and one gap, half of it early: 9
        ("tracked", 16, 8, [1, 3, 6, 9, 12]),
    ],
)
def test_refresh_steps(kind: BasisKind, gap: int, offset: int, expected: list[int]) -> None:
    assert refreshes(SubspaceSpec(rank=1, gap=gap, offset=offset, kind=kind), 12) == expected


@given(kinds, st.integers(1, 60), st.data())
@settings(max_examples=100)
def test_once_in_each_gap(kind: BasisKind, gap: int, data: st.DataObject) -> None:
    """After the first gap: every `gap` steps, and at the first step in any case."""
    offset = data.draw(st.integers(0, gap - 1))
    spec = SubspaceSpec(rank=1, gap=gap, offset=offset, kind=kind)
    assert spec.refreshes_at(1)
    regular = [step for step in refreshes(spec, 5 * gap) if step > gap]
    assert len(regular) == 4
    assert {later - earlier for earlier, later in pairwise(regular)} <= {gap}
    if kind == "tracked":
        for octave in (2, 4, 8, 16, 32):
            if 2 * octave <= gap:
                early = [step for step in range(octave, 2 * octave) if spec.refreshes_early_at(step)]
                assert len(early) == 1
        assert not any(spec.refreshes_early_at(step) for step in range(max(2, gap), 5 * gap))
    else:
        assert refreshes(spec, gap) == sorted({1, 1 + (-offset) % gap})


@given(kinds, st.integers(2, 60))
@settings(max_examples=60)
def test_staggered_offsets_spread_the_work(kind: BasisKind, gap: int) -> None:
    """A parameter for each offset: past the first gap, one refresh a step; before, never all but at the first step."""
    specs = [SubspaceSpec(rank=1, gap=gap, offset=offset, kind=kind) for offset in range(gap)]
    load = Counter(step for spec in specs for step in refreshes(spec, 3 * gap))
    assert load[1] == gap
    assert all(load[step] == 1 for step in range(gap + 1, 3 * gap + 1))
    # Tracked: an octave of k steps holds one refresh of each, and regular ones come on top.
    assert all(load[step] <= -(-gap // (1 << (step.bit_length() - 1))) + 1 for step in range(2, gap + 1))


@given(st.integers(1, 40), st.data())
@settings(max_examples=60)
def test_periods_change_exactly_at_refreshes(gap: int, data: st.DataObject) -> None:
    spec = SubspaceSpec(rank=1, gap=gap, offset=data.draw(st.integers(0, gap - 1)), kind="random")
    for step in range(2, 4 * gap):
        assert (spec.period(step) != spec.period(step - 1)) == spec.refreshes_at(step)


def test_a_random_basis_is_a_function_of_seed_name_and_period() -> None:
    """Seen through the door: a gradient that the basis can't see moves nothing, one that it sees moves along it."""
    for kind in ("random", "gaussian"):
        subspace = SubspaceSpec(rank=3, gap=4, offset=1, kind=kind, residual="none")  # type: ignore[arg-type]
        spec = ParamSpec("w", (12, 7), 1e-1, 0.0, Hyper(), subspace=subspace)
        assert not [name for name in spec.state_tensors() if "basis" in name]
        for name, seed, step in (("w", 0, 1), ("w", 0, 4), ("v", 0, 4), ("w", 5, 9)):
            optimizer = ParamOptimizer([replace(spec, name=name)], seed=seed, device=CPU)
            weight = torch.zeros(12, 7)
            optimizer.step_param(name, weight, torch.randn(12, 7), step=step, factor=1.0)
            drawn = torch.randn(7, 3, generator=generator(seed, "basis", name, step // 4))
            expected = torch.linalg.qr(drawn).Q
            # Each row of the step lies in the span of the basis: roundings of float32 are left outside.
            assert 0 < float((weight - weight @ expected @ expected.T).norm()) <= 1e-5 * float(weight.norm())


def turning(num_steps: int, turn_at: set[int]) -> list[Tensor]:
    """Gradients of rank 2 that keep their row space, but at the steps named, from which on they have another."""
    grads, era = [], 0
    for step in range(1, num_steps + 1):
        era += step in turn_at
        rows = random_basis(40, 2, generator(0, "era", era))
        grads.append(torch.randn(50, 2, generator=generator(0, "left", step)) @ rows.T)
    return grads


def refresh_log(spec: ParamSpec, grads: list[Tensor], reload_at: int = 0) -> list[int]:
    """The steps at which the stored basis or its plan was written."""
    optimizer, weight, log = ParamOptimizer([spec], seed=0, device=CPU), torch.zeros(50, 40), []
    for step, grad in enumerate(grads, 1):
        if step == reload_at:
            kept = {name: tensor.clone() for name, tensor in optimizer.states.named().items()}
            optimizer = ParamOptimizer([spec], seed=0, device=CPU)
            optimizer.states.load(TensorStream.of(kept))
        before = optimizer.states.named()["w/next_refresh"].clone()
        optimizer.step_param("w", weight, grad, step=step, factor=1.0)
        if not torch.equal(before, optimizer.states.named()["w/next_refresh"]):
            log.append(step)
    return log


@pytest.mark.parametrize("bits", [32, 16, 4])
@pytest.mark.parametrize("kind", ["svd", "randomized", "tracked"])
def test_adaptive_gaps(kind: BasisKind, bits: ProjectionBits) -> None:
    """Doubled while the subspace holds still, back to the one that was asked for when it turns, 16 times at most."""
    subspace = SubspaceSpec(rank=2, gap=4, kind=kind, adaptive=True, projection_bits=bits)
    spec = ParamSpec("w", (50, 40), 1e-3, 0.0, Hyper(), subspace=subspace)
    # Still from step 1 on: at 5 the gap becomes 8, at 13 16, at 29 32. At 61 it has turned, and is 4 again.
    assert refresh_log(spec, turning(80, {45})) == [5, 13, 29, 61, 65, 73]
    still = refresh_log(spec, turning(330, set()))
    assert still == [5, 13, 29, 61, 125, 189, 253, 317]  # from 64 on it is capped


def test_adaptive_gaps_survive_a_reload() -> None:
    subspace = SubspaceSpec(rank=2, gap=4, kind="svd", adaptive=True, transport=True)
    spec = ParamSpec("w", (50, 40), 1e-3, 0.0, Hyper(), subspace=subspace)
    grads = turning(80, {45})
    for step in (2, 5, 6, 30, 61, 62):
        assert refresh_log(spec, grads, reload_at=step) == refresh_log(spec, grads)


def test_an_offset_moves_adaptive_gaps_too() -> None:
    spec = ParamSpec("w", (50, 40), 1e-3, 0.0, Hyper(), subspace=SubspaceSpec(rank=2, gap=8, offset=3, adaptive=True))
    assert refresh_log(spec, turning(40, set())) == [6, 22]


def test_the_first_curvature_follows_the_first_basis() -> None:
    """It comes before the first gradient, by a basis of its own; without transport it would stay there for good."""
    spec = ParamSpec(
        "w", (24, 10), 1e-2, 0.0, Hyper(), rule="sophia", subspace=SubspaceSpec(rank=10, gap=50, transport=False)
    )
    door = ParamOptimizer([spec], seed=0, device=CPU)
    sampled, grad = (torch.randn(24, 10, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    door.observe_curvature("w", sampled, step=1, num_samples=1)
    before = door.states.named()["w/curvature"].clone()
    door.step_param("w", torch.zeros(24, 10), grad, step=1, factor=0.0)
    after = door.states.named()["w/curvature"]
    assert not torch.equal(before, after)
    # At full rank nothing lies outside: each row keeps its sum. A float32 product; worst seen 2e-6.
    assert torch.allclose(before.sum(1), after.sum(1), rtol=1e-5)
