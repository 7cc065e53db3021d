"""What every format of a stored weight can do. A new format is one class."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise

Rows = slice | Tensor
"""Some rows of a weight: a slice, or (k,) int64 row numbers."""


class Weight(ABC):
    """A weight as it is between uses. Arithmetic sees `values`, an optimizer changes it by `write`."""

    @property
    @abstractmethod
    def format(self) -> str:
        """Name of the format, such as "bf16" or "int8"."""

    @abstractmethod
    def __getitem__(self, rows: Rows) -> Weight:
        """Return some rows: by a slice, a view of them; by row numbers, a copy."""

    @abstractmethod
    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the values in some precision.

        Args:
            dtype: A float dtype.

        Returns:
            Read only where the weight is stored in that precision: then it is the stored tensor itself.
        """

    @abstractmethod
    def write(self, values: Tensor, noise: Noise | None) -> None:
        """Store new values, rounded into the format.

        Args:
            values: float32 (float64 for a float64 weight), of the weight's shape; used up.
            noise: For rounding without bias; None: to nearest.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What it consists of, by what a file puts behind its name; the first has the name itself."""

    @abstractmethod
    def copied_to(self, device: torch.device) -> Weight:
        """Return a copy in the same format, which shares nothing with this one."""

    @abstractmethod
    def problem(self) -> str | None:
        """What is wrong with it, in words that follow a name; None: nothing."""

    @property
    def first(self) -> Tensor:
        """The tensor that has the weight's shape: its values, or their codes."""
        return next(iter(self.tensors().values()))

    @property
    def shape(self) -> torch.Size:
        """Its shape, as the model has it."""
        return self.first.shape

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.first.device

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest precision in which its values lose nothing."""
        return torch.float32

    @property
    def num_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors().values())

    @property
    def is_packed(self) -> bool:
        """Whether it must be decoded before it is computed with."""
        return True

    @property
    def settled(self) -> Weight:
        """The weight without a deferred update."""
        return self

    @property
    def held_by_module(self) -> bool:
        """Whether a module holds it and computes with it by itself."""
        return False

    def numel(self) -> int:
        """Return the number of its elements."""
        return self.shape.numel()

    def is_ready(self, dtype: torch.dtype) -> bool:
        """Return whether it is stored as it is computed with, so that `values` costs nothing."""
        return not self.is_packed and self.dtype == dtype

    def is_finite(self) -> bool:
        """Return whether all that it stands for is finite."""
        # The extremes are NaN if any entry is. Codes always are finite; their scales may not be.
        floats = [tensor for tensor in self.tensors().values() if tensor.is_floating_point()]
        return all(math.isfinite(extreme) for tensor in floats for extreme in torch.aminmax(tensor))

    def copy_(self, other: Weight) -> None:
        """Take over another weight of the same format exactly."""
        for own, theirs in zip(self.tensors().values(), other.tensors().values(), strict=True):
            own.copy_(theirs)
