"""Weights stored as ordinary tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.rounding import write_rounded
from sophia_galore.weights.weight import Rows, Weight

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Names of the plain formats and their dtypes."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class PlainWeight(Weight):
    """A weight stored as a tensor.

    Args:
        tensor: The values, any shape; float64 for the `torch.optim` classes only.
    """

    tensor: Tensor

    @property
    def format(self) -> str:
        """fp32, bf16 or fp16; the name of the dtype for others."""
        return _NAMES.get(self.dtype, str(self.dtype).removeprefix("torch."))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor, which holds its values exactly."""
        return self.tensor.dtype

    @property
    def is_packed(self) -> bool:
        """False: its values need no decoding."""
        return False

    def __getitem__(self, rows: Rows) -> PlainWeight:
        """See `Weight`."""
        return PlainWeight(self.tensor[rows])

    def values(self, dtype: torch.dtype) -> Tensor:
        """See `Weight`."""
        return self.tensor.to(dtype)

    def write(self, values: Tensor, noise: Noise | None) -> None:
        """See `Weight`; only bfloat16 needs rounding."""
        if values is not self.tensor:
            write_rounded(self.tensor, values, noise)

    def tensors(self) -> dict[str, Tensor]:
        """See `Weight`."""
        return {"": self.tensor}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> PlainWeight:
        """See `Weight`."""
        return PlainWeight(tensors[""])

    def copied_to(self, device: torch.device) -> PlainWeight:
        """See `Weight`."""
        return PlainWeight(self.tensor.to(device, copy=True))

    def problem(self) -> str | None:
        """See `Weight`."""
        return None if self.is_finite() else "holds values that are not finite"


def as_weight(weight: Weight | Tensor) -> Weight:
    """Wrap a tensor as a weight; return a weight unchanged."""
    return PlainWeight(weight) if isinstance(weight, Tensor) else weight
