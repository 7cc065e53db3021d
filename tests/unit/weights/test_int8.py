"""Weights in eight bits: exact where nothing moves, unbiased where something does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.random import generator
from sophia_galore.weights.int8 import LARGEST_CODE, Int8Format, Int8Weight, quantise

CODES = torch.arange(-LARGEST_CODE, LARGEST_CODE + 1, dtype=torch.int8)  # all 255
BLOCKS = [0, 1, 3, 16, 64, 128]
BY_ROW = Int8Format(0)


def matrix(rows: int, columns: int, seed: int = 0, size: float = 0.05) -> Tensor:
    return size * torch.randn(rows, columns, generator=generator(seed, "matrix"))


def copy(weight: Int8Weight) -> Int8Weight:
    return Int8Weight(weight.codes.clone(), weight.scales.clone(), weight.form)


def same(one: Int8Weight, other: Int8Weight) -> bool:
    return torch.equal(one.codes, other.codes) and torch.equal(one.scales, other.scales)


def with_scale(scale: float, block: int, codes: Tensor = CODES) -> Int8Weight:
    form = Int8Format(block)
    scales = torch.full((1, form.num_scales(len(codes))), scale).to(torch.bfloat16)
    return Int8Weight(codes[None].clone(), scales, form)


@settings(deadline=None)
@given(
    st.sampled_from(BLOCKS),
    # From the smallest scale that is written to where 127 times it would leave float32.
    st.floats(2.0**-109, 2.0**120),
    st.integers(0, 100),
)
def test_all_255_codes_survive_a_zero_update(block: int, scale: float, seed: int) -> None:
    """Whatever the scale and the draw: reading and writing back changes neither code nor scale."""
    weight = with_scale(scale, block)
    before = copy(weight)
    weight.write(weight.values(torch.float32), Noise.of(seed, "rounding"))
    assert same(weight, before)


@dataclass(frozen=True)
class Extreme(Noise):
    """The same number for each element."""

    drawn: int = 0

    def pieces(
        self, like: Tensor, dtype: torch.dtype, columns: int = 1, *, odd: bool = True
    ) -> Iterator[tuple[slice, Tensor]]:
        assert odd
        yield slice(0, like.numel()), torch.full((like.numel(),), self.drawn, dtype=dtype)


@pytest.mark.parametrize("drawn", [2**15 - 1, 1 - 2**15])
def test_no_code_moves_by_the_inverse_of_a_scale(drawn: int) -> None:
    """Every code with every bfloat16 that is a scale, at the ends of the noise, where an error would show."""
    bits = torch.arange((127 - 110) << 7, (127 + 121) << 7, dtype=torch.int16)
    scales = bits.view(torch.bfloat16)[:, None]
    weight = Int8Weight(CODES.repeat(len(scales), 1), scales, Int8Format(0))
    before = copy(weight)
    weight.write(weight.values(torch.float32), Extreme(0, (), drawn=drawn))
    assert same(weight, before)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 200), st.sampled_from(BLOCKS), st.integers(0, 100), st.floats(-20, 20))
def test_quantised_once_it_stays(rows: int, columns: int, block: int, seed: int, exponent: float) -> None:
    values = matrix(rows, columns, seed, 10**exponent)
    weight = quantise(values, Int8Format(block))
    assert weight.problem() is None
    # Half a code of the block's own scale, which is at most (65/64 + 2^-7) / 127 of its largest entry.
    for start in range(0, columns, block or columns):
        part = slice(start, start + (block or columns))
        error = (weight.values(torch.float32) - values)[:, part].abs().amax(1)
        assert (error <= 0.5 * 1.024 / 127 * values[:, part].abs().amax(1)).all()
    before = copy(weight)
    for step in range(3):
        weight.write(weight.values(torch.float32), Noise.of(step, "rounding"))
    assert same(weight, before)


def test_a_write_is_unbiased() -> None:
    """Over 100,000 draws the mean code is the value: for small steps, for large ones, and where the scale grows."""
    num_draws = 100_000
    start = quantise(matrix(1, 64), Int8Format(64))
    step = torch.linspace(-2, 2, 64) * float(start.scales[0, 0])
    for factor in (1e-3, 0.3, 40.0):
        value = start.values(torch.float32) + factor * step
        many = Int8Weight(start.codes.repeat(num_draws, 1), start.scales.repeat(num_draws, 1), start.form)
        many.write(value.repeat(num_draws, 1), Noise.of(0, "draws", str(factor)))
        scale = float(many.scales[0, 0])
        assert (many.scales == many.scales[0, 0]).all()
        assert (scale > float(start.scales[0, 0])) == (factor > 1)
        error = (many.values(torch.float32).double().mean(0) - value[0].double()) / scale
        # A code is one of two neighbours: a standard deviation of at most 1/2; five of its mean's, for 64 elements.
        assert float(error.abs().max()) <= 5 * 0.5 / num_draws**0.5


class Every(Noise):
    """All odd numbers that there are, once each."""

    def pieces(
        self, like: Tensor, dtype: torch.dtype, columns: int = 1, *, odd: bool = True
    ) -> Iterator[tuple[slice, Tensor]]:
        assert odd and like.numel() == 2**15
        yield slice(0, 2**15), torch.arange(1 - 2**15, 2**15, 2).to(dtype)


def test_the_expectation_is_the_quotient_in_float64() -> None:
    """Over all noise: within half a step of the noise for each fraction of a code, and without bias over fractions."""
    off = []
    for numerator in range(80 * 2**17, 82 * 2**17, 2**10 + 1):  # two codes, in the steps that float32 has there
        weight = Int8Weight(torch.full((1, 2**15), 80, dtype=torch.int8), torch.full((1, 1), 0.5).bfloat16(), BY_ROW)
        weight.write(torch.full((1, 2**15), numerator / 2**18), Every(0, ()))
        assert float(weight.scales) == 0.5, "kept"
        off.append(float(weight.codes.double().mean()) - numerator / 2**17)
    assert max(map(abs, off)) <= 2.0**-16
    assert abs(sum(off) / len(off)) <= 2.0**-16 / 100


def test_each_code_follows_its_own_draw() -> None:
    """Against the formula in float64; left out are sums so close to a half that float32 may round them away."""
    weight, noise = quantise(matrix(256, 192), Int8Format(64)), Noise.of(0, "rounding", "w", 1)
    target = weight.values(torch.float32) * 0.99
    weight.write(target.clone(), noise)
    scales = weight.scales.double().repeat_interleave(64, 1)
    moved = target.double() / scales + noise.integers(target).double() * 2.0**-16
    clear = (moved - moved.floor() - 0.5).abs() > 2.0**-16
    assert float(clear.double().mean()) > 0.999
    assert torch.equal(weight.codes[clear].double(), (moved + 0.5).floor()[clear])


def test_goes_to_one_of_the_two_neighbours() -> None:
    weight = quantise(matrix(50, 100), Int8Format(32))
    target = weight.values(torch.float32) * 0.999
    weight.write(target.clone(), Noise.of(0, "rounding"))
    scales = weight.scales.float().repeat_interleave(32, 1)[:, :100]
    assert ((weight.values(torch.float32) - target).abs() <= scales * (1 + 1e-6)).all()


def test_small_steps_add_up_and_are_lost_to_nearest() -> None:
    """A hundred steps of a hundredth of a code: with the right mean they go one code, to nearest nowhere."""
    ends = {}
    for stochastic in (True, False):
        weight = quantise(matrix(64, 128), Int8Format(128, stochastic))
        begun = copy(weight)
        step = 0.01 * weight.scales.float()
        for number in range(100):
            weight.write(weight.values(torch.float32).add_(step), Noise.of(number, "rounding"))
        ends[stochastic] = float((weight.codes.float() - begun.codes.float()).mean())
    assert ends[True] == pytest.approx(1, abs=0.1)  # worst seen 1.02; some blocks outgrow their scale on the way
    assert ends[False] == 0


def test_the_draw_decides_and_nothing_else() -> None:
    ends = []
    for seed in (1, 1, 2):
        weight = quantise(matrix(20, 70), Int8Format(16))
        weight.write(weight.values(torch.float32).mul_(1.001), Noise.of(seed, "rounding"))
        ends.append(weight)
    assert same(ends[0], ends[1]) and not same(ends[0], ends[2])


def test_a_scale_follows_its_block() -> None:
    weight = quantise(matrix(4, 128), Int8Format(64))
    begun = copy(weight)
    values = weight.values(torch.float32)
    values[1, 3] *= 10  # outgrows the first block of its row
    values[2, 64:] *= 0.39  # falls below half of the second
    values[3, :64] *= 0.6  # does not
    expected = values.clone()
    weight.write(values, Noise.of(0, "rounding"))
    changed = weight.scales != begun.scales
    assert changed.tolist() == [[False] * 2, [True, False], [False, True], [False] * 2]
    assert weight.scales[1, 0] > begun.scales[1, 0] and weight.scales[2, 1] < begun.scales[2, 1]
    assert int(weight.codes[1, :64].abs().max()) in (124, 125)  # room for two more
    scales = weight.scales.float().repeat_interleave(64, 1)
    assert ((weight.values(torch.float32) - expected).abs() <= scales).all()


def test_zero_and_tiny_blocks() -> None:
    weight = quantise(torch.zeros(3, 32), Int8Format(16))
    assert not weight.scales.any() and not weight.values(torch.float32).any()
    weight.write(torch.full((3, 32), 0.5), Noise.of(0, "rounding"))
    assert torch.allclose(weight.values(torch.float32), torch.tensor(0.5), rtol=1 / 125)
    weight.write(torch.full((3, 32), 1e-40), Noise.of(0, "rounding"))  # below the smallest scale
    assert weight.problem() is None and float(weight.values(torch.float32).abs().max()) <= 1e-38


def test_the_largest_numbers_stay_finite() -> None:
    values = torch.full((2, 16), torch.finfo(torch.float32).max)
    weight = quantise(values, Int8Format(16))
    assert weight.problem() is None
    assert torch.isfinite(weight.values(torch.float32)).all()


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_rounding_to_the_precision(block: int, dtype: torch.dtype) -> None:
    """The value itself is a product of two short numbers, which float64 and float32 hold exactly."""
    weight = quantise(matrix(33, 100, size=3.0), Int8Format(block))
    size = block or 100
    exact = weight.codes.double() * weight.scales.double().repeat_interleave(size, 1)[:, :100]
    assert torch.equal(weight.values(torch.float32).double(), exact)
    assert torch.equal(weight.values(dtype), exact.to(dtype))
    assert torch.equal(weight.values(dtype), exact.to(dtype))


def test_scales_too_small_for_fp16() -> None:
    weight = quantise(matrix(3, 16, size=1e-5), Int8Format(16))
    expected = weight.values(torch.float32).to(torch.float16)
    assert torch.equal(weight.values(torch.float16), expected) and expected.any()


def test_rows() -> None:
    """By a slice a view, so that a write goes through; by numbers a copy."""
    weight = quantise(matrix(10, 24), Int8Format(8))
    whole = weight.values(torch.float32)
    assert torch.equal(weight[2:5].values(torch.float32), whole[2:5])
    numbers = torch.tensor([7, 0, 7])
    assert torch.equal(weight[numbers].values(torch.float32), whole[numbers])
    weight[2:5].write(torch.zeros(3, 24), Noise.of(0, "rounding"))
    assert not weight.values(torch.float32)[2:5].any()
    assert torch.equal(weight.values(torch.float32)[5:], whole[5:])
    assert (weight.shape, weight.numel(), weight.device) == ((10, 24), 240, torch.device("cpu"))


def test_bytes() -> None:
    """One an element, and two for a block."""
    weight = quantise(matrix(6, 300), Int8Format(128))
    stored = sum(tensor.numel() * tensor.element_size() for tensor in weight.tensors().values())
    assert stored == weight.form.num_bytes((6, 300)) == 6 * (300 + 2 * 3)
    assert Int8Format(0).num_bytes((6, 300)) == 6 * 302


@pytest.mark.parametrize(
    ("codes", "scales", "words"),
    [
        (torch.zeros(2, 8, dtype=torch.uint8), torch.ones(2, 2, dtype=torch.bfloat16), "uint8 codes"),
        (torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 2), "float32 scales"),
        (torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 1, dtype=torch.bfloat16), r"shape \(2, 1\)"),
        (torch.zeros(8, dtype=torch.int8), torch.ones(2, dtype=torch.bfloat16), "shape"),
        (torch.full((2, 8), -128, dtype=torch.int8), torch.ones(2, 2, dtype=torch.bfloat16), "-128"),
        (torch.zeros(2, 8, dtype=torch.int8), torch.full((2, 2), torch.nan, dtype=torch.bfloat16), "not finite"),
        (torch.zeros(2, 8, dtype=torch.int8), -torch.ones(2, 2, dtype=torch.bfloat16), "negative"),
    ],
)
def test_what_is_broken_is_said(codes: Tensor, scales: Tensor, words: str) -> None:
    problem = Int8Weight(codes, scales, Int8Format(4)).problem()
    assert problem is not None and re.search(words, problem)


@pytest.mark.parametrize("block", [0, 24])
def test_products_against_a_float64_twin(block: int) -> None:
    """The twin holds the same dequantised weight: output and gradient by the input differ by float32's roundings."""
    weight = quantise(matrix(96, 72), Int8Format(block))
    twin = (weight.codes.double() * weight.scales.double().repeat_interleave(block or 72, 1)[:, :72]).requires_grad_()
    entering = torch.randn(40, 72, generator=generator(0, "input"))
    out_grad = torch.randn(40, 96, generator=generator(0, "grad"))
    ours = entering.clone().requires_grad_()
    out = torch.nn.functional.linear(ours, weight.values(torch.float32))
    out.backward(out_grad)
    theirs = entering.double().requires_grad_()
    expected = torch.nn.functional.linear(theirs, twin)
    expected.backward(out_grad.double())
    assert ours.grad is not None and theirs.grad is not None
    for one, other in ((out, expected), (ours.grad, theirs.grad)):
        error = float((one.detach().double() - other.detach()).norm() / other.detach().norm())
        assert error <= 5e-7  # sums of 72 and 96 products in float32; worst seen 1.5e-7


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800000, -0x800000], ids=hex)
def test_what_is_not_finite_shows_in_the_scale(bits: int) -> None:
    """Codes can't tell of it, and a NaN of all ones, to whose bits something is added, would look like zero."""
    values = matrix(2, 32)
    values.view(torch.int32)[1, 20] = bits
    weight = quantise(values, Int8Format(16))
    assert str(weight.problem()).startswith("holds scales that are not finite")
    assert torch.isfinite(weight.scales.float()).tolist() == [[True, True], [True, False]]
