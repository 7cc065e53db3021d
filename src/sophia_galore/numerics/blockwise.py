"""Eight-bit formats for optimizer state: one byte per element, one float32 scale per block of 128.

A code is a small floating-point number relative to its block's absolute maximum, so that values down to 2^-16 of the
maximum keep their relative precision:

    unsigned, for second moments: 4 exponent bits, 4 mantissa bits; steps of 3% to 6%
    signed, for first moments: a sign, 4 exponent bits, 3 mantissa bits; steps of 6% to 13%

In both a code is the upper bits of the float32 x / scale * top, where top is the largest code's
value ((1 + 15/16)/2 or (1 + 7/8)/2), so that a block's maximum decodes to itself. Values below
2^-16 / top of the maximum become the smallest code where unsigned, because a second moment that
is zero where the first one isn't makes the step explode, and zero where signed.

Rounding is stochastic and, above that bound, unbiased. An exponential mean with beta 0.999 changes by about 0.1% per
step. Rounding to nearest would lose every change smaller than half of the 3% to 6% between two codes, so a second
moment would stop changing. The cost is a random deviation of the mean from its float32 value: 12% with beta 0.999 and
normal gradients, 6% in its square root.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.row_blocks import ROW_ALIGNMENT

BLOCK = ROW_ALIGNMENT
"""Elements that share a scale."""
# Blocks with a smaller maximum are stored as zeros. Above it no decoded value is subnormal; below it (gradients of
# 3e-17) only the optimizer's epsilon matters.
SMALLEST_SCALE = 2.0**-110

_FIRST_EXPONENT = 111 << 23  # the bits of 2^-16, which is code 0
_NOISE_BITS = 16


@dataclass(frozen=True)
class _Format:
    """The conversion of a float32 in [2^-16, top] to a code: bits below `cut` are rounded."""

    cut: int
    top_code: int
    top: float


_UNSIGNED = _Format(cut=19, top_code=255, top=(1 + 15 / 16) / 2)
_SIGNED = _Format(cut=20, top_code=127, top=(1 + 7 / 8) / 2)


def num_blocks(num_elements: int) -> int:
    """Return the number of scales of a tensor.

    Args:
        num_elements: Elements of the tensor, all dimensions together.

    Returns:
        The number of blocks of `BLOCK` elements, the last of which may be shorter.
    """
    return -(-num_elements // BLOCK)


def encode(values: Tensor, *, signed: bool, noise: Noise) -> tuple[Tensor, Tensor]:
    """Round to eight bits, up or down at random, so that the expectation is the value itself.

    Results of `decode` are encoded to the same codes and scales, whatever the noise is. Temporaries take 4 bytes per
    element, and a few MiB.

    Args:
        values: float32, any shape, finite: an infinity or a NaN spoils its block. Not negative
            where `signed` is false.
        signed: False for second moments, true for first ones.
        noise: Decides between up and down.

    Returns:
        Codes, uint8 in the shape of `values`, and scales, float32 (num_blocks,): the absolute
        maximum of each block of `BLOCK` consecutive elements of the flattened tensor, 0 where that
        is below `SMALLEST_SCALE`.
    """
    form = _SIGNED if signed else _UNSIGNED
    blocks = _in_blocks(values.reshape(-1))  # (num_blocks, BLOCK)
    scales = blocks.amax(1)
    if signed:
        scales = torch.maximum(scales, blocks.amin(1).neg_())
    scales.masked_fill_(scales < SMALLEST_SCALE, 0)
    # The bounds keep the quotient finite: zero blocks below, a division that overflows above.
    divisors = (scales / form.top).clamp_(SMALLEST_SCALE, torch.finfo(torch.float32).max)
    relative = blocks.div(divisors[:, None]).view(-1)
    if signed:
        relative.abs_()
    bits = relative.view(torch.int32)
    _add_noise(bits, form.cut, noise)
    bits.sub_(_FIRST_EXPONENT - (1 << (form.cut - 1))).bitwise_right_shift_(form.cut).clamp_(0, form.top_code)
    codes = bits[: values.numel()].to(torch.uint8).view(values.shape)
    if signed:
        codes.bitwise_or_(values.signbit().view(torch.uint8).mul_(128))
    return codes, scales


def decode(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """Decode the values from codes and scales.

    Args:
        codes: uint8, any shape, from `encode`.
        scales: float32 (num_blocks,), from the same call.
        signed: As in the call of `encode`.

    Returns:
        float32 in the shape of `codes`. Where a block's scale is not 0, its maximum is exactly the
        scale, and no unsigned value is zero.
    """
    blocks = _in_blocks(codes.reshape(-1))  # (num_blocks, BLOCK)
    if signed:
        form = _SIGNED
        # The shift of an int8 moves the sign to bit 31, with copies in bits 27 to 30, which are masked.
        bits = blocks.view(torch.int8).to(torch.int32).bitwise_left_shift_(form.cut)
        bits.bitwise_and_(-(1 << 31) | form.top_code << form.cut)
    else:
        form = _UNSIGNED
        bits = blocks.to(torch.int32).bitwise_left_shift_(form.cut)
    values = bits.add_(_FIRST_EXPONENT).view(torch.float32)
    # By 1 / top first: this product is exactly 1 for the top code, and the maximum exactly the scale.
    values.mul_(1 / form.top).mul_(scales[:, None])
    if signed:
        values.mul_(blocks.bitwise_and(form.top_code).clamp_(max=1))  # Code 0 is zero, not 2^-16.
    return values.view(-1)[: codes.numel()].view(codes.shape)


def _in_blocks(flat: Tensor) -> Tensor:
    """(n,) as (num_blocks, BLOCK): a view, or where the last block is short a copy filled up with zeros."""
    missing = -flat.numel() % BLOCK
    if missing:
        flat = torch.cat((flat, flat.new_zeros(missing)))
    return flat.view(-1, BLOCK)


def _add_noise(bits: Tensor, cut: int, noise: Noise) -> None:
    """Add a uniform integer between -2^(cut - 1) and 2^(cut - 1) to each element, in place.

    A carry into the exponent is right. The noise has fifteen bits, and stands in the middle of its step of
    2^(cut - 15). So a value within half such a step of a code, which is 7 units in the last place (signed: 15), goes
    there with certainty. A round trip through `decode` costs at most 3 below and 1 above (signed: 1 and 2), over all
    2^23 mantissas of a scale and every code's.
    What it adds to the expectation of other values is below 2^-19 of them.

    Args:
        bits: int32 (n,), the bits of positive float32 numbers; changed in place.
        cut: The lowest bit that is kept.
        noise: Where it comes from.
    """
    for part, drawn in noise.pieces(bits, torch.int32):
        bits[part].add_(drawn, alpha=1 << (cut - _NOISE_BITS))
