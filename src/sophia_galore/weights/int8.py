"""Trainable weights in eight bits: symmetric codes, and a scale for each block of a row.

    w = code * scale        code an integer in [-127, 127], scale a bfloat16 >= 0

A code has 7 bits and a scale 8, so the product is exact in float32. So a weight that did not change is written back as
the same code, and only the rounding to codes loses precision. It is stochastic, E[code] = w / scale: at learning rates
of fine-tuning, a step changes most weights by a fraction of a code, which rounding to nearest would always lose. The
noise has fifteen bits, so a single expectation may be off by 2^-16 of a code; the mean over all fractions is not.

A write keeps a block's scale as long as the block fits and fills more than half of it, since a new scale rounds all
weights of the block again: in a random walk of 200 steps of 0.002 standard deviations of the weights, a new scale at
every write gives 1.9 times the error. For the same reason a new scale leaves some room above the largest weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise, piece_elements
from sophia_galore.numerics.row_blocks import first_few
from sophia_galore.weights.weight import Rows, Weight

LARGEST_CODE = 127
# Room above the largest weight of a block with a new scale: its code is 124 or 125.
_ROOM = 1 + 1 / 64
# Blocks with smaller scales (about 1e-33) count as zero: their quotients would overflow float32.
_SMALLEST_SCALE = 2.0**-110


@dataclass(frozen=True)
class Int8Format:
    """The eight-bit format of a weight matrix.

    Args:
        block: Number of neighbouring elements of a row that share a scale; 0: the whole row.
        stochastic: Whether a write rounds stochastically; else to nearest, which loses small steps.
    """

    block: int = 128
    stochastic: bool = True

    def num_scales(self, num_columns: int) -> int:
        """Return the number of scales of a row; its last block may be shorter."""
        return -(-num_columns // self.block) if self.block else 1

    def num_bytes(self, shape: tuple[int, int] | torch.Size) -> int:
        """Return the bytes of a matrix (m, n), its scales included."""
        return shape[0] * (shape[1] + 2 * self.num_scales(shape[1]))


@dataclass(frozen=True, eq=False)
class Int8Weight(Weight):
    """A matrix in eight bits.

    Args:
        codes: (m, n) int8, from -127 to 127.
        scales: (m, `form.num_scales(n)`) bfloat16, not negative.
        form: The format.
    """

    codes: Tensor
    scales: Tensor
    form: Int8Format

    @property
    def format(self) -> str:
        """int8."""
        return "int8"

    @property
    def int8_block(self) -> int:
        """See `Weight`."""
        return self.form.block

    def __getitem__(self, rows: Rows) -> Int8Weight:
        """See `Weight`."""
        return Int8Weight(self.codes[rows], self.scales[rows], self.form)

    @classmethod
    def copy_of(cls, other: Weight, form: Int8Format, device: torch.device) -> Int8Weight:
        """Return a copy of codes and scales on a device, in a format with the same blocks."""
        codes, scales = (tensor.to(device, copy=True) for tensor in other.tensors().values())
        return cls(codes, scales, form)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Int8Weight:
        """See `Weight`."""
        return Int8Weight(tensors[""], tensors[".scales"], self.form)

    def copied_to(self, device: torch.device) -> Int8Weight:
        """See `Weight`."""
        return Int8Weight.copy_of(self, self.form, device)

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return code * scale: exact in float32, rounded once in other dtypes; only float16 needs a temporary.

        Args:
            dtype: float32, bfloat16 or float16.

        Returns:
            (m, n), a new tensor.
        """
        if dtype == torch.float16:  # where a scale may be below the smallest number
            return self.values(torch.float32).to(dtype)
        decoded = self.codes.to(dtype)
        for block, which in _blocks(decoded, self.form):
            block.mul_(self.scales[:, which, None].to(dtype))
        return decoded

    @torch.no_grad()
    def write(self, values: Tensor, noise: Noise | None) -> None:
        """Store new values; a block gets a new scale if its values exceed the old one or shrink below half of it.

        Args:
            values: (m, n) float32; they are overwritten.
            noise: For stochastic rounding; None: round to nearest.
        """
        # The quotient by a scale s is a product with its inverse, 1/s (1 + e) with |e| <= 2^-24. For an exact code c it
        # is c (1 + e), and |c e| < 2^-17, or 2^-18 below 64, where float32 has steps of 2^-17 and 2^-18: rounded, it is
        # within 2^-17 of c. The noise is within 1/2 - 2^-16, so the sum is within 1/2 - 2^-17, a number that float32
        # has: the code does not change. For the same reason, no code exceeds 127 where a block fits its scale.
        for rows, drawn in _pieces(values, noise if self.form.stochastic else None):
            moved, held = values[rows], self.scales[rows]
            draws = _blocks(moved if drawn is None else drawn, self.form)
            for (block, which), (draw, _) in zip(_blocks(moved, self.form), draws, strict=True):
                scales = _kept_or_new(held[:, which].float(), torch.maximum(block.amax(2), block.amin(2).neg_()))
                held[:, which] = scales
                # If the scale is zero, all codes are.
                inverse = scales.reciprocal().masked_fill_(scales < _SMALLEST_SCALE, 0)
                block.mul_(inverse[..., None])
                if drawn is not None:
                    block.add_(draw, alpha=2.0**-16)
                block.round_()
            self.codes[rows] = moved

    def tensors(self) -> dict[str, Tensor]:
        """Return codes and scales."""
        return {"": self.codes, ".scales": self.scales}

    def problem(self) -> str | None:
        """See `Weight`."""
        if self.codes.dtype != torch.int8 or self.scales.dtype != torch.bfloat16:
            return f"holds {self.codes.dtype} codes and {self.scales.dtype} scales instead of int8 and bfloat16"
        if self.codes.ndim != 2 or not self.codes.numel():
            return f"holds codes of shape {tuple(self.codes.shape)}, which is no matrix"
        expected = (self.codes.shape[0], self.form.num_scales(self.codes.shape[1]))
        if tuple(self.scales.shape) != expected:
            return f"holds scales of shape {tuple(self.scales.shape)}, its codes want {expected}"
        if int(self.codes.amin()) < -LARGEST_CODE:
            return "holds the code -128, which no weight is written as"
        if not bool(torch.isfinite(self.scales).all()) or bool((self.scales < 0).any()):
            return "holds scales that are not finite, or negative"
        return None


def quantise(values: Tensor, form: Int8Format, device: torch.device | None = None) -> Int8Weight:
    """Return a matrix in eight bits, rounded to nearest.

    Args:
        values: (m, n), any float dtype, finite.
        form: The format.
        device: Device of the result; None: that of the values.

    Returns:
        The matrix; the largest code of a block is 124 or 125.
    """
    rows, columns = values.shape
    place = device or values.device
    made = Int8Weight(
        torch.zeros(rows, columns, dtype=torch.int8, device=place),
        torch.zeros(rows, form.num_scales(columns), dtype=torch.bfloat16, device=place),
        form,
    )
    # In parts, to avoid a float32 copy of the whole matrix.
    size = max(1, (1 << 22) // columns)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        made[part].write(values[part].to(place, torch.float32, copy=True), None)
    return made


def _pieces(values: Tensor, noise: Noise | None) -> Iterator[tuple[slice, Tensor | None]]:
    """Yield rows, few enough for the processor's cache, each with its noise (k, n) as float32."""
    num_rows, columns = values.shape
    if noise is not None:
        for part, drawn in noise.pieces(values, torch.float32, columns):
            yield slice(part.start // columns, part.stop // columns), drawn.view(-1, columns)
        return
    size = piece_elements(columns) // columns
    for start in first_few(range(0, num_rows, size)):
        yield slice(start, start + size), None


def _kept_or_new(old: Tensor, extent: Tensor) -> Tensor:
    """Return the scales of blocks, float32: the old ones, unless a block exceeds or hardly uses its scale.

    Args:
        old: The scales until now, float32.
        extent: The largest magnitude of each block.
    """
    largest, filled = LARGEST_CODE * old, extent / old
    # A block that did not change has an integer as its largest code, which may be below one half of 127.
    keeps = (extent <= largest) & ((2 * extent >= largest) | (filled == filled.round()))
    return torch.where(keeps, old, _scales(extent))


def _scales(extent: Tensor) -> Tensor:
    """Return scales for blocks by their largest magnitude: rounded up to bfloat16, as float32."""
    wanted = extent * (_ROOM / LARGEST_CODE)
    low = (1 << 16) - 1
    rounded = wanted.view(torch.int32).add(low).bitwise_and_(~low).view(torch.float32)
    # Rounding up must not give infinity; then there is no room above the largest weight.
    rounded = rounded.clamp_(max=torch.finfo(torch.bfloat16).max)
    rounded = rounded.masked_fill_(rounded < _SMALLEST_SCALE, 0)
    # Values that are not finite give a NaN scale, since codes can't show them (adding to a NaN's bits may give 0).
    return rounded.masked_fill_(~extent.isfinite(), torch.nan)


def _blocks(matrix: Tensor, form: Int8Format) -> Iterator[tuple[Tensor, slice]]:
    """Yield views of the full blocks (m, k, block) and of the last ones (m, 1, rest), each with the slice of scales."""
    columns = matrix.shape[-1]
    size = form.block or columns
    whole = columns // size
    if whole:
        yield matrix[:, : whole * size].unflatten(1, (whole, size)), slice(0, whole)
    if whole * size < columns:
        yield matrix[:, whole * size :].unsqueeze(1), slice(whole, whole + 1)
