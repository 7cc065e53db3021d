"""Stochastic rounding to bfloat16: exact where it can be, unbiased elsewhere, never out of range."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


def test_float32_is_written_plainly_and_unknown_formats_are_refused() -> None:
    values = torch.randn(10)
    stored = torch.empty(10)
    write_rounded(stored, values, Noise.of(0, "w"))
    assert torch.equal(stored, values)
    with pytest.raises(TypeError, match="float16"):
        write_rounded(torch.empty(10, dtype=torch.float16), values, Noise.of(0, "w"))
