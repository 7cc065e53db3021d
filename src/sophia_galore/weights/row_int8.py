"""Frozen weights in eight bits: codes and the largest magnitude of each row, as in bitsandbytes.

w = code * absmax / 127        code an integer in [-127, 127], absmax a float32 >= 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.errors import RunError
from sophia_galore.numerics.noise import Noise
from sophia_galore.weights.int8 import LARGEST_CODE
from sophia_galore.weights.weight import Rows, Weight

ABSMAX = ".scb"
"""Suffix of a weight's name for its scales in a file."""


@dataclass(frozen=True, eq=False)
class RowInt8Weight(Weight):
    """A matrix in eight bits with one scale per row.

    Args:
        codes: (m, n) int8, from -127 to 127.
        absmax: (m,) float32, not negative.
    """

    codes: Tensor
    absmax: Tensor

    @property
    def format(self) -> str:
        """bnb8."""
        return "bnb8"

    def __getitem__(self, rows: Rows) -> RowInt8Weight:
        """See `Weight`."""
        return RowInt8Weight(self.codes[rows], self.absmax[rows])

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> RowInt8Weight:
        """See `Weight`."""
        return RowInt8Weight(tensors[""], tensors[ABSMAX])

    def copied_to(self, device: torch.device) -> RowInt8Weight:
        """See `Weight`."""
        return RowInt8Weight(self.codes.to(device, copy=True), self.absmax.to(device, copy=True))

    def values(self, dtype: torch.dtype) -> Tensor:
        """Return code * (absmax / 127), by the same operations as in bitsandbytes, so the values are equal.

        Args:
            dtype: A float dtype.

        Returns:
            (m, n), a new tensor.
        """
        # The product of a half-precision and a float32 tensor is computed in float32 and rounded once.
        return self.codes.to(dtype).mul_(self.absmax.unsqueeze(1).mul(1.0 / LARGEST_CODE))

    def write(self, values: Tensor, noise: Noise | None) -> None:
        """Raise an error: weights of this format are frozen.

        Raises:
            RunError: Always.
        """
        raise RunError("A weight that bitsandbytes holds in eight bits is frozen and can't be written.")

    def tensors(self) -> dict[str, Tensor]:
        """Return codes and scales."""
        return {"": self.codes, ABSMAX: self.absmax}

    def problem(self) -> str | None:
        """See `Weight`."""
        if self.codes.dtype != torch.int8 or self.absmax.dtype != torch.float32:
            return f"holds {self.codes.dtype} codes and {self.absmax.dtype} scales instead of int8 and float32"
        if self.codes.ndim != 2 or self.absmax.shape != self.codes.shape[:1]:
            return f"holds codes of shape {tuple(self.codes.shape)} and scales of shape {tuple(self.absmax.shape)}"
        if self.codes.device != self.absmax.device:
            return f"holds its codes on {self.codes.device} and its scales on {self.absmax.device}"
        if not bool(torch.isfinite(self.absmax).all()) or bool((self.absmax < 0).any()):
            return "holds scales that are not finite, or negative"
        if self.numel() and int(self.codes.amin()) < -LARGEST_CODE:
            return "holds the code -128, which no weight is written as"
        return None
