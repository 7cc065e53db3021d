"""Noise by counting: what it depends on, and that it looks like noise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sophia_galore.numerics.noise import ColumnNoise, Noise, piece_elements
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
    """As float64 of mean 0 and variance 1, up to 2^-30."""
    return noise.integers(torch.empty(num)).double() * (2.0**-16 * 12**0.5)


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
    whole = noise.integers(like)
    starts = sorted({0, num_rows, *(cut * ROW_ALIGNMENT for cut in cuts if cut * ROW_ALIGNMENT < num_rows)})
    parts = [slice(start, stop) for start, stop in pairwise(starts)]
    for rows in reversed(parts):
        part = noise.rows(rows, columns)
        assert torch.equal(part.integers(like[rows]), whole[rows])


@pytest.mark.parametrize("columns", [1, 100, 128, 4864, 151_937])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float32], ids=str)
def test_the_pieces_are_the_whole(columns: int, dtype: torch.dtype) -> None:
    """Several pieces, the last of which is short, and which begin anywhere in the digits of the hash."""
    num = columns * (2 * piece_elements(columns) // columns + 3) if columns < 10_000 else columns * 129
    like, noise = torch.empty(num), Noise.of(0, "w").rows(slice(3 * ROW_ALIGNMENT, None), columns)
    whole, stop = noise.integers(like), 0
    for part, drawn in noise.pieces(like, dtype, columns):
        assert part.start == stop and part.start % columns == part.stop % columns == 0
        assert drawn.dtype == dtype and torch.equal(drawn.to(torch.int16), whole[part])
        stop = part.stop
    assert stop == num


def test_all_sixteen_bits_are_the_odd_numbers_and_their_neighbours_below() -> None:
    like, noise = torch.empty(NUM), Noise.of(0, "rounding", "w", 1)
    every = torch.cat([drawn.clone() for _, drawn in noise.pieces(like, torch.int16, odd=False)])
    assert torch.equal(every | 1, noise.integers(like))
    # Of a fair bit's mean over a million the standard error is 1/2 / sqrt(NUM): five of them.
    assert abs(float((every & 1).double().mean()) - 0.5) <= 5 * 0.5 / NUM**0.5


@given(start=st.integers(0, 9), more=st.integers(0, 9), columns=st.integers(1, 5))
def test_rows_of_rows(start: int, more: int, columns: int) -> None:
    noise, num_rows = Noise.of(0, "w"), 3
    first, second = (slice(blocks * ROW_ALIGNMENT, None) for blocks in (start, more))
    both = noise.rows(slice((start + more) * ROW_ALIGNMENT, None), columns)
    like = torch.empty(num_rows, columns)
    assert torch.equal(noise.rows(first, columns).rows(second, columns).integers(like), both.integers(like))
    assert torch.equal(noise.rows(slice(None), columns).integers(like), noise.integers(like))


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize(
    ("rows", "width", "start", "columns"), [(5, 12, 3, 4), (300, 4099, 0, 7), (128, 9, 8, 1), (3, 4, 4, 0)]
)
def test_columns_have_the_noise_that_they_have_in_the_whole(
    dtype: torch.dtype, rows: int, width: int, start: int, columns: int
) -> None:
    whole = torch.empty(2 * ROW_ALIGNMENT + rows, width)
    wanted = Noise(1, ("x",)).integers(whole)[:, start : start + columns]
    noise = ColumnNoise(1, ("x",), start=start, width=width)
    for block in (slice(0, 2 * ROW_ALIGNMENT), slice(2 * ROW_ALIGNMENT, len(whole))):
        own = torch.empty(block.stop - block.start, columns)
        made = torch.empty(own.numel(), dtype=dtype)
        for part, drawn in noise.rows(block, columns).pieces(own, dtype):
            made[part] = drawn
        assert torch.equal(made.view(own.shape), wanted[block].to(dtype))


def test_rows_that_begin_elsewhere_are_refused() -> None:
    with pytest.raises(AssertionError, match="ROW_ALIGNMENT"):
        Noise.of(0, "w").rows(slice(1, None), 3).integers(torch.empty(4, 3))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (127,), (128,), (129,), (3, 43), (2, 3, 64), (0, 5), (300_000,)])
def test_the_shape_is_that_of_the_tensor_and_its_dtype_does_not_matter(shape: tuple[int, ...]) -> None:
    """And it is the beginning of the noise of anything that is longer."""
    noise = Noise.of(3, "w")
    long = noise.integers(torch.empty(300_001))
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int32):
        made = noise.integers(torch.empty(shape, dtype=dtype))
        assert made.shape == shape and made.dtype == torch.int16
        assert torch.equal(made.flatten(), long[: made.numel()])


def hashed(number: int, key_: int) -> int:
    number = (number * 0x9E3779B97F4A7C15 + key_) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        number = (number ^ number >> shift) * factor % 2**64
    return number


def plainly(seed: int, purpose: tuple[str | int, ...], place: int) -> int:
    """The number of one element, by Python's own integers."""
    drawn = key(seed, *purpose)
    group, lane = place // 128, place % 128 // 4
    lower = hashed(group % 64 * 32 + lane, drawn)
    upper = hashed(64 * 32 + group // 64 * 32 + lane, drawn)
    word = (lower ^ upper) * 0xD6E8FEB86659FD93 % 2**64
    number = (word >> 16 * (place % 4)) % 2**16 | 1
    return number - 2**16 if number >= 2**15 else number


@given(seed=st.integers(0, 2**40), step=st.integers(0, 10**6), first=st.integers(0, 2**22))
def test_it_is_whole_numbers_alone(seed: int, step: int, first: int) -> None:
    """So that every device gives the same; also where numbers of elements take 30 bits, and keys have a sign."""
    made = Noise.of(seed, "w", step).rows(slice(first * ROW_ALIGNMENT, None), 3).integers(torch.empty(200))
    expected = [plainly(seed, ("w", step), 3 * first * ROW_ALIGNMENT + place) for place in range(200)]
    assert made.tolist() == expected


def test_numbers_that_are_written_down() -> None:
    """A checkpoint's run goes on with these, whatever torch it is resumed with."""
    made = Noise.of(0, "rounding", "model.norm.weight", 7).rows(slice(256, None), 3).integers(torch.empty(300, 3))
    written = [15935, 22881, -31589, -16665, 23689, 14307, -7569, -30239]
    assert made.view(-1)[[0, 1, 63, 64, 65, 127, 128, 899]].tolist() == written


def test_other_keys_other_noise() -> None:
    every = {name: noise.integers(torch.empty(NUM)) for name, noise in STREAMS.items()}
    names = list(every)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            # Two draws are the same once in 2^15: 32 of a million on average, five of Poisson's spread of 5.7 more.
            assert int((every[one] == every[other]).sum()) <= 32 + 5 * 5.7, (one, other)
    assert len({tuple(made[:64].tolist()) for made in every.values()}) == len(every)


@pytest.mark.parametrize("name", STREAMS)
def test_all_numbers_come_equally_often(name: str) -> None:
    """Upper eight bits and the next seven, over all four draws of a word together and each by itself."""
    made = STREAMS[name].integers(torch.empty(NUM)).int() + 2**15
    assert 0 < int(made.amin()) <= 2**16 // 1000 and 2**16 - 2**16 // 1000 <= int(made.amax()) < 2**16
    assert (made & 1).all()
    for some in (made, *made.view(-1, 4).unbind(1)):
        # Pearson's sum has 255 or 127 degrees of freedom, and is above these bounds once in a million.
        for part, values, bound in ((some >> 8, 256, 377), ((some & 255) >> 1, 128, 217)):
            expected = some.numel() / values
            counts = part.flatten().bincount(minlength=values).double()
            assert float(((counts - expected) ** 2 / expected).sum()) <= bound


@pytest.mark.parametrize("name", STREAMS)
def test_the_mean_is_zero_and_the_ends_are_kept_away_from(name: str) -> None:
    made = STREAMS[name].integers(torch.empty(NUM)).double() * 2.0**-16
    assert float(made.abs().amax()) <= 1 / 2 - 2.0**-16
    # Standard errors of the mean of a million of variance 1/12, and of the mean of their squares, 1/180: five of them.
    assert abs(float(made.mean())) <= 5 * (1 / 12) ** 0.5 / NUM**0.5
    assert abs(float(made.square().mean()) - 1 / 12) <= 5 * (1 / 180) ** 0.5 / NUM**0.5


def test_streams_are_not_correlated() -> None:
    every = {name: draws(noise) for name, noise in STREAMS.items()}
    names = list(every)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            assert_uncorrelated(every[one], every[other])


# Neighbours, the draws of a word, rows of usual widths, and where either digit of the hash stays the same.
@pytest.mark.parametrize(
    "lag", [1, 2, 3, 63, 64, 65, 127, 128, 129, 896, 1000, 4864, 1 << 13, 1 << 14, 3 << 13, 1 << 18]
)
@pytest.mark.parametrize("name", ["first", "part", "later rows"])
def test_elements_are_not_correlated(name: str, lag: int) -> None:
    made = draws(STREAMS[name])
    assert_uncorrelated(made[lag:], made[:-lag])
    # Nor are sizes: of the squares, whose variance is 4/5.
    squares = (made.square() - 1) / 0.8**0.5
    assert_uncorrelated(squares[lag:], squares[:-lag])


@pytest.mark.parametrize("lane", range(4))
def test_words_with_a_digit_in_common_are_not_correlated(lane: int) -> None:
    """Each draw of a word by itself: the lowest sixteen bits of a product depend on the fewest."""
    words = draws(STREAMS["first"]).view(-1, 64, 32, 4)[..., lane]  # upper digit, lower digit, word
    for shift in range(1, 9):
        assert_uncorrelated(words[shift:], words[:-shift])
        assert_uncorrelated(words[:, shift:], words[:, :-shift])
    # The corners of a rectangle, whose product of four would have the mean 1.44 if they cancelled.
    for shift in range(1, 9):
        inner = words[shift:, shift:] * words[:-shift, :-shift]
        assert_uncorrelated(inner, words[shift:, :-shift] * words[:-shift, shift:])


def test_the_draws_of_a_word_are_not_correlated_bit_by_bit() -> None:
    made = STREAMS["first"].integers(torch.empty(NUM)).view(-1, 4).int()
    every = [(draw >> bit & 1).double().mul_(2).sub_(1) for draw in made.unbind(1) for bit in range(1, 16)]
    for place, one in enumerate(every):
        # Each bit is +-1: the mean of N has the standard error 1 / sqrt(N), and so has that of products.
        assert abs(float(one.mean())) <= 5 / one.numel() ** 0.5
        for other in every[place + 1 :]:
            assert_uncorrelated(one, other)


def test_neither_torchs_state_nor_its_default_precision_matters() -> None:
    like = torch.empty(1000, dtype=torch.float32)
    expected = Noise.of(0, "w").integers(like)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(Noise.of(0, "w").integers(like), expected)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(), (0,), (129,), (1024, 4864)])
def test_planning_sees_the_shapes_alone(shape: tuple[int, ...]) -> None:
    """Also where the third block and all later ones are left out."""
    with FakeTensorMode(), two_blocks_of_each():
        like = torch.empty(shape, dtype=torch.bfloat16)
        made = Noise.of(0, "w").integers(like)
        assert made.shape == shape and made.dtype == torch.int16
