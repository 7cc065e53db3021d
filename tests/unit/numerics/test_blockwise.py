"""Eight-bit blocks: exact where they can be, unbiased elsewhere, and a slow mean doesn't freeze in them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sophia_galore.numerics.blockwise import BLOCK, SMALLEST_SCALE, decode, encode, num_blocks
from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.random import generator

BOTH = pytest.mark.parametrize("signed", [False, True])
# From the smallest scale that is kept to the largest whose quotient by `top` is finite.
SCALES = st.floats(2.0**-110, 2.0**127, width=32)


def ladder(signed: bool) -> Tensor:
    """What the codes from 0 up stand for at scale 1, in float64, built from exponent and mantissa."""
    steps = 8 if signed else 16
    every = [2.0 ** (octave - 16) * (1 + step / steps) for octave in range(16) for step in range(steps)]
    relative = torch.tensor(every, dtype=torch.float64) / every[-1]
    if signed:
        relative[0] = 0
    return relative


def sample(num: int, signed: bool) -> Tensor:
    """Values over some twenty octaves."""
    drawn = torch.randn(num, 2, generator=generator(0, "sample"))
    size = drawn[:, 0] * torch.exp2(3 * drawn[:, 1])
    return size if signed else size.square()


@BOTH
def test_decodes_to_the_ladder(signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    values = decode(codes, torch.ones(2), signed=signed).double()
    relative = ladder(signed)
    expected = torch.cat((relative, -relative)) if signed else relative
    # Two roundings of float32, 2^-24 each.
    assert torch.allclose(values, expected, rtol=2.0**-23, atol=0)


@BOTH
@given(scale=SCALES, seed=st.integers(0, 1000))
def test_every_code_survives(signed: bool, scale: float, seed: int) -> None:
    """All 256, twenty times each with other noise, and the scales to the bit."""
    codes = torch.full((3, BLOCK), 255, dtype=torch.uint8)  # 127 codes a block, and the maximum that makes its scale
    codes[:, 1:] = torch.arange(3 * 127, dtype=torch.int32).clamp(max=255).to(torch.uint8).view(3, 127)
    codes = codes.repeat(20, 1)
    scales = torch.full((60,), scale)
    values = decode(codes, scales, signed=signed)
    again, same = encode(values, signed=signed, noise=Noise.of(seed, "codes"))
    assert torch.equal(codes, again) and torch.equal(scales, same)


@BOTH
def test_what_was_decoded_stays_to_the_bit(signed: bool) -> None:
    """A million real values: the second time nothing is random any more."""
    values = sample(1_000_000, signed)
    codes, scales = encode(values, signed=signed, noise=Noise.of(0, "first"))
    again, same = encode(decode(codes, scales, signed=signed), signed=signed, noise=Noise.of(0, "second"))
    assert torch.equal(codes, again) and torch.equal(scales, same)


@BOTH
@given(numerator=st.floats(0, 1, width=32), scale=SCALES, seed=st.integers(0, 1000))
def test_goes_to_one_of_the_two_neighbours(signed: bool, numerator: float, scale: float, seed: int) -> None:
    values = torch.full((BLOCK,), numerator) * scale
    values[0] = scale
    if signed:
        values[1::2] *= -1
    decoded = decode(*encode(values, signed=signed, noise=Noise.of(seed, "near")), signed=signed).double()
    exact = (values.double() / scale).abs()
    relative = ladder(signed)
    # Four roundings of float32 lie between what the ladder says and what comes back.
    below = relative[(torch.searchsorted(relative, exact * (1 + 2.0**-22), right=True) - 1).clamp(min=0)]
    above = relative[torch.searchsorted(relative, exact * (1 - 2.0**-22)).clamp(max=len(relative) - 1)]
    found = (decoded / scale).abs()
    near = torch.isclose(found, below, rtol=2.0**-22, atol=0) | torch.isclose(found, above, rtol=2.0**-22, atol=0)
    assert near.all()
    assert not (decoded * values < 0).any()


@BOTH
@pytest.mark.parametrize("value", [0.9876, 0.51, 0.3333, 0.1, 1.5e-3, 1.23e-4, 2.01e-5])
def test_is_unbiased(signed: bool, value: float) -> None:
    draws = 100_000
    for sign in (1, -1) if signed else (1,):
        values = torch.full((draws,), sign * value)
        values[::BLOCK] = 1.0
        decoded = decode(*encode(values, signed=signed, noise=Noise.of(1, "unbiased")), signed=signed)
        drawn = (values != 1.0).nonzero()
        # The distance of two neighbours is at most an eighth (a sixteenth) of the lower one. The standard
        # error of a two-point draw is at most half of that / sqrt(draws); five of them.
        bound = 5 * value * (2**-3 if signed else 2**-4) / 2 / len(drawn) ** 0.5
        assert abs(float(decoded[drawn].double().mean()) - float(values[1])) <= bound


@BOTH
def test_all_four_draws_of_a_word_are_uniform_and_independent(signed: bool) -> None:
    """One 64-bit draw serves four elements; a value halfway between two codes goes up half of the times."""
    num = 4 * 25 * BLOCK * 10
    relative = ladder(signed)
    middle = float((relative[100] + relative[101]) / 2)
    values = torch.full((num,), middle)
    values[::BLOCK] = 1.0
    codes, _ = encode(values, signed=signed, noise=Noise.of(3, "words"))
    up = (codes == 101).double()
    up[::BLOCK] = 0.5
    centred = up - 0.5
    # Element i and i + num / 2 share a word, and elements 2 i and 2 i + 1 a draw.
    pairs = {
        "halves": centred[: num // 2] * centred[num // 2 :],
        "even and odd": centred[::2] * centred[1::2],
        "across": centred[: num // 2 : 2] * centred[num // 2 + 1 :: 2],
    }
    for name, product in pairs.items():
        # Each product is +-1/4: five standard errors of its mean.
        assert abs(float(product.mean())) <= 5 * 0.25 / len(product) ** 0.5, name
    for part in (
        centred[: num // 2 : 2],
        centred[1 : num // 2 : 2],
        centred[num // 2 :: 2],
        centred[num // 2 + 1 :: 2],
    ):
        assert abs(float(part.mean())) <= 5 * 0.5 / len(part) ** 0.5


@BOTH
def test_a_blocks_maximum_is_exact(signed: bool) -> None:
    values = sample(1000 * BLOCK, signed).view(1000, BLOCK)
    codes, scales = encode(values, signed=signed, noise=Noise.of(0, "maximum"))
    decoded = decode(codes, scales, signed=signed)
    largest = values.abs().argmax(1, keepdim=True)
    assert torch.equal(decoded.gather(1, largest), values.gather(1, largest))
    assert torch.equal(scales, values.abs().amax(1)) and torch.equal(decoded.abs().amax(1), scales)


@BOTH
def test_zero_blocks_stay_zero(signed: bool) -> None:
    values = torch.zeros(3 * BLOCK)
    values[BLOCK : 2 * BLOCK] = 1.0
    values[2 * BLOCK :] = SMALLEST_SCALE / 2
    codes, scales = encode(values, signed=signed, noise=Noise.of(0, "zero"))
    assert scales.tolist() == [0.0, 1.0, 0.0]
    decoded = decode(codes, scales, signed=signed)
    assert not decoded[:BLOCK].any() and not decoded[2 * BLOCK :].any() and (decoded[BLOCK : 2 * BLOCK] == 1).all()


@given(SCALES)
def test_what_is_far_below_the_maximum(scale: float) -> None:
    """Unsigned to the smallest code and never to zero; signed to zero, as the step then just waits."""
    values = torch.tensor([1.0, 2.0**-17, 2.0**-30, 0.0]) * scale
    second = decode(*encode(values, signed=False, noise=Noise.of(0, "far")), signed=False)
    smallest = 2.0**-16 / 0.96875
    assert torch.allclose(second.double() / scale, torch.tensor([1.0] + [smallest] * 3, dtype=torch.float64), rtol=1e-6)
    assert (second >= torch.finfo(torch.float32).tiny).all()
    values[2] *= -1
    first = decode(*encode(values, signed=True, noise=Noise.of(0, "far")), signed=True)
    assert first.tolist() == [values[0].item(), 0.0, 0.0, 0.0]


@BOTH
def test_infinity_is_not_reached_at_the_upper_end(signed: bool) -> None:
    largest = torch.finfo(torch.float32).max
    values = torch.full((BLOCK,), largest)
    decoded = decode(*encode(values, signed=signed, noise=Noise.of(0, "end")), signed=signed)
    assert torch.equal(decoded, values)


@BOTH
@pytest.mark.parametrize("shape", [(), (1,), (127,), (128,), (129,), (0,), (3, 43), (2, 3, 64), (0, 5)])
def test_any_shape(signed: bool, shape: tuple[int, ...]) -> None:
    values = torch.rand(shape, generator=generator(0, "shape")) + 0.5
    codes, scales = encode(values, signed=signed, noise=Noise.of(0, "codes"))
    decoded = decode(codes, scales, signed=signed)
    assert codes.shape == decoded.shape == values.shape and codes.dtype == torch.uint8
    assert scales.shape == (num_blocks(values.numel()),) and scales.dtype == decoded.dtype == torch.float32
    assert torch.allclose(values, decoded, rtol=2**-3 if signed else 2**-4)


@BOTH
def test_a_transposed_tensor_is_taken_as_it_reads(signed: bool) -> None:
    values = sample(96 * 40, signed).view(96, 40)
    plain = encode(values.t().contiguous(), signed=signed, noise=Noise.of(0, "t"))
    view = encode(values.t(), signed=signed, noise=Noise.of(0, "t"))
    assert all(torch.equal(one, other) for one, other in zip(plain, view, strict=True))
    assert torch.equal(decode(*view, signed=signed), decode(view[0].t().contiguous().t(), view[1], signed=signed))


@BOTH
def test_the_arguments_stay_as_they_were(signed: bool) -> None:
    values = sample(300, signed)
    kept = values.clone()
    codes, scales = encode(values, signed=signed, noise=Noise.of(0, "kept"))
    before = codes.clone(), scales.clone()
    decode(codes, scales, signed=signed)
    assert torch.equal(values, kept) and torch.equal(codes, before[0]) and torch.equal(scales, before[1])


@BOTH
def test_same_key_same_codes(signed: bool) -> None:
    values = sample(1000, signed)
    one, other, another = (encode(values, signed=signed, noise=Noise.of(0, "v", step))[0] for step in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, another)


@BOTH
def test_bytes_per_element(signed: bool) -> None:
    codes, scales = encode(sample(1024, signed), signed=signed, noise=Noise.of(0, "bytes"))
    assert (codes.nbytes + scales.nbytes) / 1024 == 1 + 4 / 128


def nearest(values: Tensor) -> Tensor:
    """Unsigned codes and back with rounding to nearest, through float32's own bits."""
    scales = values.view(-1, BLOCK).amax(1, keepdim=True)
    bits = (values.view(-1, BLOCK) / scales * 0.96875).clamp(min=2.0**-16).view(torch.int32)
    cut = ((bits + (1 << 18)) & -(1 << 19)).view(torch.float32).clamp(max=0.96875)
    return (cut / 0.96875 * scales).view(values.shape)


def test_a_slow_mean_does_not_freeze() -> None:
    """A thousand steps of beta 0.999 from 1 towards gradients of a quarter of that."""
    num = 64 * BLOCK
    exact, plain = torch.ones(num), torch.ones(num)
    codes, scales = encode(exact, signed=False, noise=Noise.of(0, "v", 0))
    for step in range(1, 1001):
        square = (torch.randn(num, generator=generator(0, "grad", step)) / 2).square()
        exact = 0.999 * exact + 0.001 * square
        kept = 0.999 * decode(codes, scales, signed=False) + 0.001 * square
        codes, scales = encode(kept, signed=False, noise=Noise.of(0, "v", step))
        plain = nearest(0.999 * plain + 0.001 * square)
    ratio = decode(codes, scales, signed=False).double() / exact.double()
    # Worst of ten keys: mean off by 0.24%, spread 12.4%, which in the root that a step divides by is 6%.
    assert float(ratio.mean()) == pytest.approx(1, abs=0.01) and float(ratio.std()) < 0.15
    # Frozen at 1 where the mean of the squares has come down to 0.53, and single elements further.
    assert float((plain / exact).mean()) > 1.5
