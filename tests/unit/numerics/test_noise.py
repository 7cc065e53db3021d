"""Noise by counting: what it depends on, and that it looks like noise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.random import key
from sophia_galore.numerics.row_blocks import ROW_ALIGNMENT, two_blocks_of_each

NUM = 1 << 20
# Of one million draws: those of a step, of the next one, of another parameter, of a part, and of later rows.
STREAMS = {
    "first": Noise.of(0, "rounding", "w", 1),
    "next step": Noise.of(0, "rounding", "w", 2),
    "another seed": Noise.of(1, "rounding", "w", 1),
    "another parameter": Noise.of(0, "rounding", "v", 1),
    "another purpose": Noise.of(0, "state rounding", "w", 1),
    "part": Noise.of(0, "rounding", "w", 1).part("exp_avg"),
    "another part": Noise.of(0, "rounding", "w", 1).part("exp_avg_sq"),
    "later rows": Noise.of(0, "rounding", "w", 1).rows(slice(NUM // 256, None), 256),
}


def draws(noise: Noise, num: int = NUM) -> Tensor:
    """As float64 of mean 0 and variance 1, up to 2^-32."""
    return (noise.uniform(torch.empty(num)).double() - 0.5) * 12**0.5


def assert_uncorrelated(one: Tensor, other: Tensor) -> None:
    """The mean of N products of independent draws of variance 1 has the standard error 1 / sqrt(N): five of them."""
    assert abs(float((one * other).mean())) <= 5 / one.numel() ** 0.5


@given(
    sizes=st.tuples(st.integers(0, 700), st.integers(1, 9)),
    cuts=st.sets(st.integers(1, 5)),
    seed=st.integers(0, 2**40),
)
def test_every_cut_into_rows_gives_the_same(sizes: tuple[int, int], cuts: set[int], seed: int) -> None:
    """Worked on in any order; a row may hold less than a block of noise, or end within one."""
    num_rows, columns = sizes
    like, noise = torch.empty(num_rows, columns), Noise.of(seed, "w", 1)
    whole, uniform = noise.integers(like), noise.uniform(like)
    starts = sorted({0, num_rows, *(cut * ROW_ALIGNMENT for cut in cuts if cut * ROW_ALIGNMENT < num_rows)})
    parts = [slice(start, stop) for start, stop in pairwise(starts)]
    for rows in reversed(parts):
        part = noise.rows(rows, columns)
        assert torch.equal(part.integers(like[rows]), whole[rows])
        assert torch.equal(part.uniform(like[rows]), uniform[rows])


@given(start=st.integers(0, 9), more=st.integers(0, 9), columns=st.integers(1, 5))
def test_rows_of_rows(start: int, more: int, columns: int) -> None:
    noise, num_rows = Noise.of(0, "w"), 3
    first, second = (slice(blocks * ROW_ALIGNMENT, None) for blocks in (start, more))
    both = noise.rows(slice((start + more) * ROW_ALIGNMENT, None), columns)
    like = torch.empty(num_rows, columns)
    assert torch.equal(noise.rows(first, columns).rows(second, columns).integers(like), both.integers(like))
    assert torch.equal(noise.rows(slice(None), columns).integers(like), noise.integers(like))


def test_rows_that_begin_elsewhere_are_refused() -> None:
    with pytest.raises(AssertionError, match="ROW_ALIGNMENT"):
        Noise.of(0, "w").rows(slice(1, None), 3).integers(torch.empty(4, 3))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (127,), (128,), (129,), (3, 43), (2, 3, 64), (0, 5), (300_000,)])
def test_the_shape_is_that_of_the_tensor_and_its_dtype_does_not_matter(shape: tuple[int, ...]) -> None:
    """And it is the beginning of the noise of anything that is longer."""
    noise = Noise.of(3, "w")
    long = noise.integers(torch.empty(300_001))
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int32):
        made, uniform = noise.integers(torch.empty(shape, dtype=dtype)), noise.uniform(torch.empty(shape, dtype=dtype))
        assert made.shape == uniform.shape == shape
        assert made.dtype == torch.int32 and uniform.dtype == torch.float32
        assert torch.equal(made.flatten(), long[: made.numel()])
        # The middles of 2^16 equal parts, which float32 holds exactly.
        assert torch.equal(uniform, (made.double() + 0.5).div(2**16).float())


def plainly(seed: int, purpose: tuple[str | int, ...], place: int) -> int:
    """The number of one element, by Python's own integers."""
    drawn = key(seed, *purpose)
    block, inside = divmod(place, 128)
    word = block * 64 + inside % 64
    for part in (drawn, drawn >> 31):
        word = (word ^ part) & 0xFFFFFFFF
        word ^= word >> 16
        word = word * 0x7FEB352D & 0xFFFFFFFF
        word ^= word >> 15
        word = word * 0x846CA68B & 0xFFFFFFFF
        word ^= word >> 16
    return word & 0xFFFF if inside < 64 else word >> 16


@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), first=st.integers(0, 2**22))
def test_it_is_whole_numbers_alone(seed: int, step: int, first: int) -> None:
    """So that every device gives the same; also where numbers of elements take 30 bits, and keys have a sign."""
    made = Noise.of(seed, "w", step).rows(slice(first * ROW_ALIGNMENT, None), 3).integers(torch.empty(200))
    expected = [plainly(seed, ("w", step), 3 * first * ROW_ALIGNMENT + place) for place in range(200)]
    assert made.tolist() == expected


def test_numbers_that_are_written_down() -> None:
    """A checkpoint's run goes on with these, whatever torch it is resumed with."""
    made = Noise.of(0, "rounding", "model.norm.weight", 7).rows(slice(256, None), 3).integers(torch.empty(300, 3))
    written = [18448, 53552, 22507, 19790, 16117, 53266, 54925, 37067]
    assert made.view(-1)[[0, 1, 63, 64, 65, 127, 128, 899]].tolist() == written


def test_other_keys_other_noise() -> None:
    every = {name: noise.integers(torch.empty(NUM)) for name, noise in STREAMS.items()}
    names = list(every)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            # Two draws are the same once in 2^16: 16 of a million on average, and Poisson's spread of 4; five of them.
            assert int((every[one] == every[other]).sum()) <= 16 + 5 * 4, (one, other)
    assert len({tuple(made[:64].tolist()) for made in every.values()}) == len(every)


@pytest.mark.parametrize("name", STREAMS)
def test_all_numbers_come_equally_often(name: str) -> None:
    """Upper and lower eight bits, over both draws of a word together and each by itself."""
    made = STREAMS[name].integers(torch.empty(NUM))
    assert 0 <= int(made.amin()) <= 2**16 // 1000 and 2**16 - 2**16 // 1000 <= int(made.amax()) < 2**16
    for some in (made, *made.view(-1, 2, ROW_ALIGNMENT // 2).unbind(1)):
        for byte in (some >> 8, some & 255):
            expected = some.numel() / 256
            counts = byte.flatten().bincount(minlength=256).double()
            # Pearson's sum has 255 degrees of freedom: 255 on average, spread 22.6; above 377 once in a million.
            assert float(((counts - expected) ** 2 / expected).sum()) <= 377


@pytest.mark.parametrize("name", STREAMS)
def test_the_mean_is_one_half_and_the_ends_are_kept_away_from(name: str) -> None:
    made = STREAMS[name].uniform(torch.empty(NUM))
    assert float(made.amin()) >= 2.0**-17 and float(made.amax()) <= 1 - 2.0**-17
    # Standard errors of the mean of a million of variance 1/12, and of the mean of their squares, 4/45: five of them.
    assert abs(float(made.double().mean()) - 1 / 2) <= 5 * (1 / 12) ** 0.5 / NUM**0.5
    assert abs(float(made.double().square().mean()) - 1 / 3) <= 5 * (4 / 45) ** 0.5 / NUM**0.5
    # Over all numbers that there are the mean is exact.
    assert float((torch.arange(2**16, dtype=torch.float64) + 0.5).mul_(2.0**-16).mean()) == 0.5


def test_streams_are_not_correlated() -> None:
    every = {name: draws(noise) for name, noise in STREAMS.items()}
    names = list(every)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            assert_uncorrelated(every[one], every[other])


# The two draws of a word are half a block apart; the rest are neighbours, rows of usual widths, powers of two.
@pytest.mark.parametrize("lag", [1, 2, 3, 63, 64, 65, 127, 128, 129, 896, 1000, 4864, 1 << 14, 1 << 18])
@pytest.mark.parametrize("name", ["first", "part", "later rows"])
def test_elements_are_not_correlated(name: str, lag: int) -> None:
    made = draws(STREAMS[name])
    assert_uncorrelated(made[lag:], made[:-lag])
    # Nor are sizes: of the squares, whose variance is 4/5.
    squares = (made.square() - 1) / 0.8**0.5
    assert_uncorrelated(squares[lag:], squares[:-lag])


def test_the_two_draws_of_a_word_are_not_correlated_bit_by_bit() -> None:
    lower, upper = STREAMS["first"].integers(torch.empty(NUM)).view(-1, 2, ROW_ALIGNMENT // 2).unbind(1)
    bits = [[(half >> bit & 1).double().mul_(2).sub_(1) for bit in range(16)] for half in (lower, upper)]
    every = [*bits[0], *bits[1]]
    for place, one in enumerate(every):
        # Each bit is +-1: the mean of N has the standard error 1 / sqrt(N), and so has that of products.
        assert abs(float(one.mean())) <= 5 / one.numel() ** 0.5
        for other in every[place + 1 :]:
            assert_uncorrelated(one, other)


def test_neither_torchs_state_nor_its_default_precision_matters() -> None:
    like = torch.empty(1000, dtype=torch.float32)
    expected = Noise.of(0, "w").uniform(like)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Noise.of(0, "w").uniform(like), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(), (0,), (129,), (1024, 4864)])
def test_planning_sees_the_shapes_alone(shape: tuple[int, ...]) -> None:
    """Also where the third block and all later ones are left out."""
    with FakeTensorMode(), two_blocks_of_each():
        like = torch.empty(shape, dtype=torch.bfloat16)
        made, uniform = Noise.of(0, "w").integers(like), Noise.of(0, "w").uniform(like)
        assert made.shape == uniform.shape == shape
        assert made.dtype == torch.int32 and uniform.dtype == torch.float32
