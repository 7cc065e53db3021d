"""Stochastic rounding to bfloat16: exact where it can be, unbiased elsewhere, never out of range."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.random import generator
from sophia_galore.numerics.rounding import stochastic_round_bf16, write_rounded

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_every_bfloat16_stays_as_it_is() -> None:
    """All 65,536 bit patterns: infinities stay infinite, NaNs stay NaN, -0.0 stays -0.0."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rounded = stochastic_round_bf16(every.float(), Noise.of(0, "every"))
    nan = every.isnan()
    assert torch.equal(rounded[~nan].view(torch.int16), every[~nan].view(torch.int16))
    assert rounded[nan].isnan().all()


@given(FINITE, st.integers(0, 1000))
def test_goes_to_one_of_the_two_neighbours(value: float, seed: int) -> None:
    exact = torch.tensor([value], dtype=torch.float32)
    rounded = stochastic_round_bf16(exact, Noise.of(seed, "neighbours"))
    assert rounded.isfinite().all()
    below = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32)
    above = (below.view(torch.int32) + (1 << 16)).view(torch.float32)
    largest = torch.finfo(torch.bfloat16).max
    assert float(rounded) in (float(below), min(max(float(above), -largest), largest))


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-30, 65504.3, 1 + 2**-9, 1 + 2**-16])
def test_is_unbiased(value: float) -> None:
    draws = 100_000
    exact = torch.full((draws,), value)
    rounded = stochastic_round_bf16(exact, Noise.of(1, "unbiased")).double()
    step = abs(value) * 2**-7  # at most the distance of two neighbours
    # Standard error of a two-point draw is at most step / 2 / sqrt(draws); five of them.
    assert abs(float(rounded.mean()) - float(exact[0])) <= 5 * step / 2 / draws**0.5


class Every(Noise):
    """All numbers of sixteen bits, once each."""

    def pieces(
        self, like: Tensor, dtype: torch.dtype, columns: int = 1, *, odd: bool = True
    ) -> Iterator[tuple[slice, Tensor]]:
        assert not odd and like.numel() == 2**16
        yield slice(0, 2**16), torch.arange(-(2**15), 2**15).to(dtype)


@pytest.mark.parametrize(
    "value", [1.001, -1.001, 3.14159, 1e-30, 65504.3, 1 + 2**-9, 1 + 2**-23, -1 - 2**-23, 2 - 2**-23]
)
def test_the_expectation_is_the_value_exactly(value: float) -> None:
    """Over all noise, in float64, which holds the sum of 65,536 bfloat16 of two neighbours."""
    exact = torch.full((2**16,), value)
    rounded = stochastic_round_bf16(exact, Every(0, ()))
    assert float(rounded.double().mean()) == float(exact[0])


def test_each_element_follows_its_own_draw() -> None:
    """Against the formula in float64: the number of steps, and a draw in [0, 1), rounded down."""
    values, noise = torch.randn(100_001, generator=generator(0, "values")), Noise.of(0, "rounding", "w", 1)
    draws = torch.cat([drawn.clone() for _, drawn in noise.pieces(values, torch.float32, odd=False)]).double()
    size = torch.exp2(values.double().abs().log2().floor() - 7)
    steps = (values.double().abs() / size + (draws + 2**15) / 2**16).floor()
    assert torch.equal(stochastic_round_bf16(values, noise).double(), steps * size * values.double().sign())


def test_small_updates_survive_on_average() -> None:
    """A thousand updates of a tenth of half a step: rounding to nearest would lose them all."""
    weight = torch.ones(2000, dtype=torch.bfloat16)
    nearest = weight.clone()
    update = 2**-8 / 20
    for step in range(1000):
        write_rounded(weight, weight.float() + update, Noise.of(0, "w", step))
        nearest = (nearest.float() + update).bfloat16()
    assert float(nearest.max()) == 1.0
    # 1000 x 2^-8 / 20 = 0.195; the spread of one weight is about 0.02, of the mean of 2000 some 5e-4.
    assert float(weight.float().mean()) == pytest.approx(1 + 1000 * update, abs=3e-3)


def test_same_key_same_bits() -> None:
    values = torch.randn(1000, generator=generator(0, "values"))
    one, other, another = (stochastic_round_bf16(values, Noise.of(0, "w", step)) for step in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, another)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_does_not_round_is_written_plainly(dtype: torch.dtype) -> None:
    values = torch.randn(10, dtype=dtype)
    stored = torch.empty(10, dtype=dtype)
    write_rounded(stored, values, Noise.of(0, "w"))
    assert torch.equal(stored, values)


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(TypeError, match="float16"):
        write_rounded(torch.empty(10, dtype=torch.float16), torch.randn(10), Noise.of(0, "w"))
