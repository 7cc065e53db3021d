"""Stochastic rounding of float32 to bfloat16.

A bfloat16 is the upper half of a float32. Adding a uniform 16-bit integer to the bits of the float32 and dropping the
lower half rounds up with the probability that makes the result unbiased: E[round(x)] = x, exactly. Rounding to nearest
would lose every update smaller than half a bfloat16 step (2^-9 relative), which at learning rates of fine-tuning are
most updates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise


def stochastic_round_bf16(values: Tensor, noise: Noise) -> Tensor:
    """Round to bfloat16, up or down at random, so that the expectation is the value itself.

    Args:
        values: float32, any shape; infinities and NaNs stay unchanged.
        noise: Decides between up and down.

    Returns:
        bfloat16 tensor of the same shape. Values that bfloat16 represents exactly are unchanged.
    """
    # The noise must not make a finite value in the last half step below infinity infinite or NaN.
    largest = torch.finfo(torch.bfloat16).max
    made = torch.empty_like(values, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
    flat, rounded = values.reshape(-1), made.view(-1)
    bits = flat.view(torch.int32)
    for part, drawn in noise.pieces(values, torch.int32, odd=False):
        moved = drawn.add_(1 << 15).add_(bits[part]).bitwise_and_(-(1 << 16)).view(torch.float32)
        rounded[part] = torch.where(flat[part].isfinite(), moved.clamp_(-largest, largest), flat[part])
    return made


def write_rounded(stored: Tensor, values: Tensor, noise: Noise | None) -> None:
    """Write values into a stored weight, rounded to its dtype.

    Args:
        stored: float32, float64 (plain copy) or bfloat16 (stochastic rounding), changed in place.
        values: float32 (float64 for a float64 weight), of the shape of `stored`.
        noise: For stochastic rounding; None: round to nearest.

    Raises:
        TypeError: The stored dtype has no rounding rule.
    """
    if stored.dtype in (torch.float32, torch.float64):
        stored.copy_(values)
    elif stored.dtype == torch.bfloat16:
        stored.copy_(values if noise is None else stochastic_round_bf16(values, noise))
    else:
        raise TypeError(f"no rounding rule for {stored.dtype}")
