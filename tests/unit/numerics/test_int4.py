"""Four-bit blocks: two values a byte, half a step of error, and a basis that is still a basis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sophia_galore.numerics.int4 import BLOCK, pack, unpack
from sophia_galore.numerics.random import generator


def basis(seed: int) -> Tensor:
    """A random orthonormal basis, (896, 128)."""
    drawn: Tensor = torch.linalg.qr(torch.randn(896, 128, generator=generator(seed, "basis")))[0]
    return drawn


@given(
    num=st.integers(1, 200),
    exponent=st.integers(-118, 127),
    seed=st.integers(0, 1000),
)
def test_half_a_step_of_error_and_stable(num: int, exponent: int, seed: int) -> None:
    values = (torch.rand(num, generator=generator(seed, "int4")) * 2 - 1) * 2.0**exponent
    packed, scales = pack(values)
    assert packed.dtype == torch.uint8 and packed.shape == ((num + 1) // 2,)
    assert scales.dtype == torch.bfloat16 and scales.shape == (-(-num // BLOCK),)
    back = unpack(packed, scales, (num,))
    steps = scales.float().repeat_interleave(BLOCK)[:num]
    # The quotient's own rounding may carry a value over the middle: 7 x 2^-24 of a step.
    assert ((back - values).abs() <= steps * (0.5 + 1e-6)).all()
    again, same = pack(back)
    assert torch.equal(packed, again) and torch.equal(scales, same)


@given(st.floats(2.0**-140, 2.0**-110, width=32), st.integers(0, 1000))
def test_tiny_blocks_are_stable_too(largest: float, seed: int) -> None:
    """Around the smallest scale there is either the usual bound or a block of zeros."""
    values = torch.rand(BLOCK, generator=generator(seed, "int4")) * largest
    values[0] = largest
    packed, scales = pack(values)
    back = unpack(packed, scales, (BLOCK,))
    if scales == 0:
        assert not back.any() and largest < 7.1 * 2.0**-126
    else:
        assert float(back[0]) == pytest.approx(largest, rel=2.0**-8)
    again, same = pack(back)
    assert torch.equal(packed, again) and torch.equal(scales, same)


def test_every_code_with_every_scale() -> None:
    """Each positive normal bfloat16 up to the largest that 7 times is finite, and every code there is."""
    patterns = torch.arange(0x0080, 0x7F80 - 0x180, dtype=torch.int32).to(torch.int16)
    scales = patterns.view(torch.bfloat16)
    codes = torch.arange(BLOCK).remainder(15) - 7
    values = codes * scales.float()[:, None]
    packed, same = pack(values)
    assert torch.equal(same, scales)
    assert torch.equal(unpack(packed, same, values.shape), values)


def test_a_blocks_maximum_always_gets_the_outer_code() -> None:
    """What the round trip rests on: bfloat16's error in the scale can't move the maximum to code 6."""
    values = torch.zeros(100_000, BLOCK)
    values[:, 0] = torch.exp2(10 * torch.randn(100_000, generator=generator(0, "maximum")))
    values[::2, 0] *= -1
    packed, scales = pack(values)
    first = packed.view(-1, BLOCK // 2)[:, 0].bitwise_and(15)
    assert (first[::2] == 1).all() and (first[1::2] == 15).all()
    back = unpack(packed, scales, values.shape)[:, 0]
    assert ((back - values[:, 0]).abs() <= 2.0**-8 * values[:, 0].abs() * (1 + 1e-6)).all()


def test_the_earlier_element_lies_in_the_lower_bits() -> None:
    packed, scales = pack(torch.tensor([7.0, -7.0, 1.0, 0.0, -3.0]))
    assert packed.tolist() == [15 | 1 << 4, 9 | 8 << 4, 5 | 8 << 4]
    assert scales.tolist() == [1.0]


@pytest.mark.parametrize("shape", [(), (1,), (63,), (64,), (65,), (0,), (7, 9), (2, 3, 64), (0, 5)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=generator(0, "shape"))
    packed, scales = pack(values)
    back = unpack(packed, scales, shape)
    assert back.shape == values.shape and back.dtype == torch.float32
    assert packed.numel() == (values.numel() + 1) // 2
    assert torch.equal(unpack(*pack(values.flatten()), shape), back)


def test_zero_blocks_and_arguments() -> None:
    values = torch.cat((torch.zeros(BLOCK), torch.ones(BLOCK)))
    kept = values.clone()
    packed, scales = pack(values)
    before = packed.clone()
    back = unpack(packed, scales, values.shape)
    assert not back[:BLOCK].any() and scales[0] == 0
    assert back[BLOCK:].tolist() == pytest.approx([1.0] * BLOCK, rel=2**-8)
    assert torch.equal(values, kept) and torch.equal(packed, before)


def test_a_transposed_basis_is_taken_as_it_reads() -> None:
    drawn = basis(0)
    for one, other in zip(pack(drawn.t()), pack(drawn.t().contiguous()), strict=True):
        assert torch.equal(one, other)


def test_bytes() -> None:
    packed, scales = pack(basis(0))
    assert packed.nbytes + scales.nbytes == 896 * 128 * (1 / 2 + 2 / BLOCK)


@pytest.mark.parametrize("seed", range(3))
def test_a_basis_stays_nearly_orthonormal(seed: int) -> None:
    drawn = basis(seed)
    rounded = unpack(*pack(drawn), drawn.shape)
    assert float((rounded - drawn).norm() / drawn.norm()) < 0.12  # worst of 20 seen: 0.109
    gram = rounded.t() @ rounded - torch.eye(128)
    assert float(torch.linalg.matrix_norm(gram, 2)) < 0.16  # worst of 20 seen: 0.137
    assert float(gram.abs().max()) < 0.05  # worst of 20 seen: 0.035


@pytest.mark.parametrize("seed", range(3))
def test_the_energy_that_a_basis_captures(seed: int) -> None:
    drawn = basis(seed)
    rounded = unpack(*pack(drawn), drawn.shape)
    grad = drawn @ torch.randn(128, 300, generator=generator(seed, "grad"))
    # In the span of the rounded basis, worst of 20 seen: 0.990 of what lies in the span of the exact one.
    span = torch.linalg.qr(rounded)[0]
    assert float((span.t() @ grad).square().sum() / grad.square().sum()) > 0.985
    # As an optimizer sees it, without orthonormalising again: 1.000 to 1.004 times the energy.
    assert float((rounded.t() @ grad).square().sum() / grad.square().sum()) == pytest.approx(1, abs=0.01)
