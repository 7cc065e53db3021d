"""A matrix in eight bits with a low-rank remainder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.random import generator
from sophia_galore.weights.deferred import DeferredWeight
from sophia_galore.weights.int8 import Int8Format, quantise


def made(shape: tuple[int, int] = (12, 20), rank: int = 3) -> tuple[DeferredWeight, Tensor]:
    """The weight, and what it stands for in float64."""
    draw = generator(0, "folded", *shape)
    base = quantise(0.05 * torch.randn(*shape, generator=draw), Int8Format(8))
    left = (0.01 * torch.randn(shape[0], rank, generator=draw)).to(torch.bfloat16)
    right = torch.randn(rank, shape[1], generator=draw)
    shrink = torch.tensor([0.9])
    exact = base.values(torch.float32).double() * shrink.double() + left.double() @ right.double()
    return DeferredWeight(base, shrink, lambda: (left, right)), exact


def test_it_stands_for_the_sum() -> None:
    weight, exact = made()
    # One product of rank 3 and a sum in float32; worst seen 1.2e-8 at values of 0.2.
    assert torch.allclose(weight.values(torch.float32).double(), exact, atol=1e-7)
    # bfloat16 rounds both terms, the factors and the sum: 2^-8 of the largest value each.
    assert torch.allclose(weight.values(torch.bfloat16).double(), exact, atol=4 * 2**-8 * float(exact.abs().max()))
    assert (weight.shape, weight.numel(), weight.device) == ((12, 20), 240, torch.device("cpu"))


def test_rows_are_those_of_the_whole() -> None:
    weight, _ = made()
    whole = weight.values(torch.float32)
    for rows in (slice(3, 7), torch.tensor([11, 0, 3])):
        assert torch.allclose(weight[rows].values(torch.float32), whole[rows], atol=1e-8)


def test_it_can_be_changed_by_its_factors_only() -> None:
    weight, _ = made()
    with pytest.raises(TypeError, match="factors"):
        weight.write(torch.zeros(12, 20), Noise.of(0, "rounding"))


def test_its_tensors_say_all() -> None:
    weight, _ = made()
    tensors = weight.tensors()
    assert list(tensors) == ["", ".scales", ".left", ".right", ".shrink"]
    assert tensors[".right"].dtype == torch.bfloat16 and tensors[".right"].is_contiguous()
    assert weight.problem() is None
