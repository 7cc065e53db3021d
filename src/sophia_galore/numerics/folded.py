"""An int8 matrix whose last updates are not in its codes yet, but beside them as a product of two thin factors.

    W = shrink * (code * scale) + left right        left (m, r), right (r, n), one of them the basis

Between two refreshes of a basis GaLore's updates all lie in one subspace, so that their sum is as small as a moment.
Kept in bfloat16 there, it is rounded into eight bits once per refresh instead of once per step. Decay of the weight
in the meantime is the factor `shrink`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.numerics.int8 import Int8Tensor, Packed

Factors = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class FoldedTensor(Packed):
    """A matrix in eight bits with a low-rank remainder.

    Args:
        base: The codes and scales.
        shrink: (1,) float32, a factor on them.
        factors: Gives (m, r) and (r, n), whose product is added; asked each time, since they change.
    """

    base: Int8Tensor
    shrink: Tensor
    factors: Factors

    @property
    def shape(self) -> torch.Size:
        """(m, n)."""
        return self.base.shape

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.base.device

    def numel(self) -> int:
        """m * n."""
        return self.base.numel()

    def __getitem__(self, rows: slice | Tensor) -> FoldedTensor:
        """Some rows: by a slice, a view of them; by a tensor of row numbers, a copy."""

        def factors() -> tuple[Tensor, Tensor]:
            left, right = self.factors()
            return left[rows], right

        return FoldedTensor(self.base[rows], self.shrink, factors)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The values, remainder included.

        Args:
            dtype: float32, bfloat16 or float16.

        Returns:
            (m, n), a new tensor.
        """
        left, right = self.factors()
        values = self.base.dequantise(dtype).mul_(self.shrink.to(dtype))
        return values.addmm_(left.to(dtype), right.to(dtype))

    def write(self, values: Tensor, rounding: torch.Generator) -> None:
        """Not possible: what the codes hold and what the factors hold can't be told apart in a value."""
        raise TypeError("a matrix with a remainder is changed by its factors, and by folding them in")

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales and the remainder, the factors in bfloat16."""
        left, right = (factor.to(torch.bfloat16).contiguous() for factor in self.factors())
        return {**self.base.tensors(), ".left": left, ".right": right, ".shrink": self.shrink}

    def problem(self) -> str | None:
        """What is wrong with codes, scales or remainder, in words that follow a name; None: nothing."""
        if problem := self.base.problem():
            return problem
        left, right = self.factors()
        shapes = (left.ndim, right.ndim, left.shape[:1], right.shape[1:], left.shape[1:])
        if shapes != (2, 2, self.shape[:1], self.shape[1:], right.shape[:1]) or self.shrink.shape != (1,):
            return f"holds a remainder of shapes {tuple(left.shape)} and {tuple(right.shape)}, which does not fit"
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (left, right, self.shrink)):
            return "holds a remainder that is not finite"
        return None
