"""The interface of a stored weight. Each format is a class that implements it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise

Rows = slice | Tensor
"""Some rows of a weight: a slice, or (k,) int64 row numbers."""


class Weight(ABC):
    """A stored weight. Computations read it with `values`; an optimizer changes it with `write`."""

    @property
    @abstractmethod
    def format(self) -> str:
        """Name of the format, such as "bf16" or "int8"."""

    @abstractmethod
    def __getitem__(self, rows: Rows) -> Weight:
        """Return some rows: a view for a slice, a copy for row numbers."""

    @abstractmethod
    def values(self, dtype: torch.dtype) -> Tensor:
        """Return the values in a given precision.

        Args:
            dtype: A float dtype.

        Returns:
            The values, to be read only: if the weight is stored in that precision, it is the stored tensor itself.
        """

    @abstractmethod
    def write(self, values: Tensor, noise: Noise | None) -> None:
        """Store new values, rounded into the format.

        Args:
            values: float32 (float64 for a float64 weight), of the weight's shape; they may be overwritten.
            noise: For stochastic rounding; None: round to nearest.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by the suffix of their name in a file; the first has the suffix ""."""

    def parts(self, *, change: bool = False) -> Iterator[Mapping[str, Tensor]]:
        """Yield its tensors; of a weight that comes by rows, those of one block of rows after the other.

        Args:
            change: Whether they are changed in place, before the next ones are asked for.
        """
        yield self.tensors()

    @abstractmethod
    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Weight:
        """Return a weight of the same format that consists of other tensors.

        Args:
            tensors: By suffix, as `tensors` of the settled weight returns them; not copied.
        """

    @abstractmethod
    def copied_to(self, device: torch.device) -> Weight:
        """Return a copy in the same format, which shares no memory with this one."""

    @abstractmethod
    def problem(self) -> str | None:
        """Return what is wrong with it, as text to follow its name; None: nothing is wrong."""

    @property
    def first(self) -> Tensor:
        """The tensor that has the weight's shape: its values, or their codes."""
        return next(iter(self.tensors().values()))

    @property
    def shape(self) -> torch.Size:
        """Its shape in the model."""
        return self.first.shape

    @property
    def device(self) -> torch.device:
        """Its device."""
        return self.first.device

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype that represents its values exactly."""
        return torch.float32

    @property
    def num_bytes(self) -> int:
        """Size of all its tensors in bytes."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors().values())

    @property
    def is_packed(self) -> bool:
        """Whether it must be decoded before use in computations."""
        return True

    @property
    def int8_block(self) -> int | None:
        """Number of neighbouring elements of a row that share a scale, in trainable eight bits; else None."""
        return None

    @property
    def settled(self) -> Weight:
        """The weight without a deferred update."""
        return self

    @property
    def held_by_module(self) -> bool:
        """Whether the module itself holds the weight and decodes it."""
        return False

    def numel(self) -> int:
        """Return the number of its elements."""
        return self.shape.numel()

    def is_ready(self, dtype: torch.dtype) -> bool:
        """Return whether it is stored in this precision, so that `values` returns the stored tensor."""
        return not self.is_packed and self.dtype == dtype

    def is_finite(self) -> bool:
        """Return whether all values are finite."""
        # The minimum and maximum are NaN if any entry is. Codes are always finite; their scales may not be.
        floats = [tensor for tensor in self.tensors().values() if tensor.is_floating_point()]
        return all(math.isfinite(extreme) for tensor in floats for extreme in torch.aminmax(tensor))

    def copy_(self, other: Weight) -> None:
        """Copy another weight of the same format exactly, in place."""
        for own, theirs in zip(self.tensors().values(), other.tensors().values(), strict=True):
            own.copy_(theirs)
