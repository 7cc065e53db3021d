"""One contract for every rule, shape and weight format: what must be true whatever the rule is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines import CPU
from sophia_galore.errors import CheckpointError, NonFiniteError
from sophia_galore.numerics.rules import Hyper
from sophia_galore.optim import move as module
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec

SUBSPACES = {
    "dense": None,
    "galore": SubspaceSpec(rank=3, gap=2, offset=1, scale=0.25),
    "galore-full-rank": SubspaceSpec(rank=5, gap=100, offset=0, scale=1.0),
}
SHAPES = [(12, 5), (5, 12), (6, 6), (7,)]
FORMATS = [torch.float32, torch.bfloat16]
NUM_STEPS = 5


def cases() -> Iterator[object]:
    for name, subspace in SUBSPACES.items():
        for shape in SHAPES:
            if subspace and (len(shape) == 1 or min(shape) < subspace.rank):
                continue
            for dtype in FORMATS:
                spec = ParamSpec("w", shape, 1e-2, 0.1, Hyper(), subspace=subspace)
                yield pytest.param(spec, dtype, id=f"{name}-{'x'.join(map(str, shape))}-{dtype}")


everything = pytest.mark.parametrize(("spec", "dtype"), list(cases()))


def make(spec: ParamSpec, seed: int = 0) -> ParamOptimizer:
    return ParamOptimizer([spec], seed=seed, device=CPU)


def start(spec: ParamSpec, dtype: torch.dtype) -> Tensor:
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def grad(spec: ParamSpec, step: int) -> Tensor:
    return torch.randn(spec.shape, generator=torch.Generator().manual_seed(100 + step))


def go(optimizer: ParamOptimizer, weight: Tensor, steps: range) -> Tensor:
    for step in steps:
        optimizer.step_param("w", weight, grad(optimizer.specs["w"], step), step=step, factor=1.0)
    return weight


@everything
def test_zero_gradient_moves_nothing_but_decay(spec: ParamSpec, dtype: torch.dtype) -> None:
    plain = replace(spec, weight_decay=0.0)
    weight = start(spec, dtype)
    make(plain).step_param("w", weight, torch.zeros(spec.shape), step=1, factor=1.0)
    assert torch.equal(weight, start(spec, dtype))
    decayed = start(spec, torch.float32)
    make(spec).step_param("w", decayed, torch.zeros(spec.shape), step=1, factor=1.0)
    assert torch.equal(decayed, start(spec, torch.float32) * (1 - 1e-2 * 0.1))


@everything
def test_learning_rate_zero_moves_nothing(spec: ParamSpec, dtype: torch.dtype) -> None:
    weight = start(spec, dtype)
    make(spec).step_param("w", weight, grad(spec, 1), step=1, factor=0.0)
    assert torch.equal(weight, start(spec, dtype))


@everything
def test_goes_downhill(spec: ParamSpec, dtype: torch.dtype) -> None:
    """On |w|^2 / 2, whose gradient is w itself, every rule comes nearer to the bottom."""
    weight = start(spec, dtype)
    optimizer = make(replace(spec, weight_decay=0.0))
    before = float(weight.float().norm())
    for step in range(1, 31):
        optimizer.step_param("w", weight, weight.float().clone(), step=step, factor=1.0)
    assert float(weight.float().norm()) < 0.99 * before


@everything
def test_state_goes_to_disk_and_back_to_the_bit(spec: ParamSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = go(make(spec), start(spec, dtype), range(1, 2 * NUM_STEPS))
    first = make(spec)
    weight = go(first, start(spec, dtype), range(1, NUM_STEPS))
    save_file(first.named_state(), tmp_path / "state.safetensors")
    second = make(spec)
    second.load_named_state(load_file(tmp_path / "state.safetensors"))
    for name, tensor in first.named_state().items():
        assert torch.equal(tensor, second.named_state()[name])
    assert torch.equal(go(second, weight, range(NUM_STEPS, 2 * NUM_STEPS)), whole)


@everything
def test_a_bad_gradient_touches_neither_weight_nor_state(spec: ParamSpec, dtype: torch.dtype) -> None:
    optimizer = make(spec)
    weight = go(optimizer, start(spec, dtype), range(1, 3))
    kept = weight.clone()
    state = {name: tensor.clone() for name, tensor in optimizer.named_state().items()}
    for bad in (float("nan"), float("inf"), float("-inf")):
        broken = grad(spec, 3)
        broken.view(-1)[-1] = bad
        with pytest.raises(NonFiniteError, match="w is not finite at step 3"):
            optimizer.step_param("w", weight, broken, step=3, factor=1.0)
    assert torch.equal(weight, kept)
    assert all(torch.equal(tensor, state[name]) for name, tensor in optimizer.named_state().items())


@everything
def test_blocks_of_rows_change_no_bit(spec: ParamSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32; the bits of bf16's stochastic rounding are drawn block by block, so there only nearly."""
    whole = go(make(spec), start(spec, dtype), range(1, NUM_STEPS))
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 1)
    blocked = go(make(spec), start(spec, dtype), range(1, NUM_STEPS))
    if dtype == torch.float32:
        # Matrix products of one row may sum in another order than those of all rows: one rounding or two.
        assert torch.allclose(blocked, whole, rtol=0, atol=1e-6)
    else:
        assert torch.allclose(blocked, whole, rtol=2**-6, atol=0)  # four roundings of 2^-8


@everything
def test_the_seed_matters_to_rounding_alone(spec: ParamSpec, dtype: torch.dtype) -> None:
    one, other = (go(make(spec, seed), start(spec, dtype), range(1, 40)) for seed in (0, 1))
    assert torch.equal(one, other) == (dtype == torch.float32)


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "dtype"])
def test_a_state_that_does_not_fit_is_refused_whole(change: str) -> None:
    spec = ParamSpec("w", (12, 5), 1e-2, 0.0, Hyper(), subspace=SUBSPACES["galore"])
    optimizer = make(spec)
    state = {name: torch.ones_like(tensor) for name, tensor in optimizer.named_state().items()}
    if change == "missing":
        del state["w/basis"]
    elif change == "extra":
        state["v/basis"] = torch.ones(1)
    elif change == "shape":
        state["w/basis"] = torch.ones(5, 4)
    else:
        state["w/basis"] = state["w/basis"].bfloat16()
    with pytest.raises(CheckpointError, match=r"[wv]/basis"):
        optimizer.load_named_state(state)
    assert all(not tensor.any() for tensor in optimizer.named_state().values())


def test_order_of_parameters_does_not_matter() -> None:
    specs = [ParamSpec(name, (12, 5), 1e-2, 0.0, Hyper(), subspace=SUBSPACES["galore"]) for name in "abc"]
    results = []
    for order in ("abc", "cab"):
        optimizer = ParamOptimizer(specs, seed=3, device=CPU)
        weights = {name: start(specs[0], torch.bfloat16) for name in "abc"}
        for step in range(1, NUM_STEPS):
            for name in order:
                optimizer.step_param(name, weights[name], grad(specs[0], step), step=step, factor=1.0)
        results.append(weights)
    assert all(torch.equal(results[0][name], results[1][name]) for name in "abc")
    # Same start and gradients, but every parameter rounds by its own draws.
    assert not torch.equal(results[0]["a"], results[0]["b"])
