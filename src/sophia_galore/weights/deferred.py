"""An int8 matrix with updates that are not in its codes yet, stored as a low-rank product.

    W = decay * (code * scale) + left right        left (m, r), right (r, n), one of them the basis

Between two refreshes of the basis, all updates of GaLore are in one subspace, so their sum is as small as a moment. It
is kept in bfloat16 and rounded into the codes once per refresh instead of once per step. The factor `decay` is the
weight decay since then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.weights.int8 import Int8Format, Int8Weight
from sophia_galore.weights.weight import Rows, Weight

Factors = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class DeferredWeight(Weight):
    """A matrix in eight bits with a low-rank update that is not rounded into its codes yet.

    Args:
        base: The codes and scales, in eight bits.
        decay: (1,) float32, a factor on `base`.
        factors: Returns (m, r) and (r, n), whose product is added; called each time, since they change.
    """

    base: Weight
    decay: Tensor
    factors: Factors

    @property
    def format(self) -> str:
        """Format of its codes."""
        return self.base.format

    @property
    def int8_block(self) -> int | None:
        """See `Weight`."""
        return self.base.int8_block

    @property
    def first(self) -> Tensor:
        """The codes."""
        return self.base.first

    @property
    def settled(self) -> Weight:
        """See `Weight`."""
        return self.base

    def __getitem__(self, rows: Rows) -> DeferredWeight:
        """See `Weight`."""

        def factors() -> tuple[Tensor, Tensor]:
            left, right = self.factors()
            return left[rows], right

        return DeferredWeight(self.base[rows], self.decay, factors)

    def values(self, dtype: torch.dtype) -> Tensor:
        """See `Weight`; the update is included."""
        left, right = self.factors()
        values = self.base.values(dtype).mul_(self.decay.to(dtype))
        return values.addmm_(left.to(dtype), right.to(dtype))

    def write(self, values: Tensor, noise: Noise | None) -> None:
        """Raise an error: new values can't be divided between the codes and the factors."""
        raise TypeError("a weight with a deferred update can't be written; change its factors")

    def tensors(self) -> dict[str, Tensor]:
        """Return codes, scales and the update, with factors in bfloat16."""
        return {**self.base.tensors(), **self.update_tensors()}

    def update_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the update alone, as `tensors` does."""
        left, right = (factor.to(torch.bfloat16).contiguous() for factor in self.factors())
        return {".left": left, ".right": right, ".shrink": self.decay}

    def parts(self, *, change: bool = False) -> Iterator[Mapping[str, Tensor]]:
        """See `Weight`; the update, which can't be changed here, comes last."""
        yield from self.base.parts(change=change)
        if not change:
            yield self.update_tensors()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> DeferredWeight:
        """See `Weight`; the update stays."""
        return DeferredWeight(self.base.with_tensors(tensors), self.decay, self.factors)

    def copied_to(self, device: torch.device) -> DeferredWeight:
        """See `Weight`."""
        left, right = (factor.to(device, copy=True) for factor in self.factors())
        return DeferredWeight(self.base.copied_to(device), self.decay.to(device, copy=True), lambda: (left, right))

    def copy_(self, other: Weight) -> None:
        """Raise an error: the factors belong to the optimizer's state."""
        raise TypeError("a weight with a deferred update can't be copied into; copy the codes of `settled`")

    def rounded_in(self, form: Int8Format, device: torch.device, rows: slice) -> Int8Weight:
        """Return a copy with the update in its codes. It is rounded stochastically: most of it is smaller than a code.

        Args:
            form: The format of the copy, with the same blocks.
            device: Device of the copy.
            rows: The rows that are copied, from `row_blocks`.
        """
        part = self[rows]
        made = Int8Weight.copy_of(part.base, form, device)
        noise = Noise.of(0, "remainder", *self.shape).rows(rows, self.shape[1])
        made.write(part.values(torch.float32).to(device), noise)
        return made

    def is_finite(self) -> bool:
        """See `Weight`."""
        return self.base.is_finite() and all(bool(torch.isfinite(part).all()) for part in (*self.factors(), self.decay))

    def problem(self) -> str | None:
        """See `Weight`."""
        if problem := self.base.problem():
            return problem
        left, right = self.factors()
        shapes = (left.ndim, right.ndim, left.shape[:1], right.shape[1:], left.shape[1:])
        if shapes != (2, 2, self.shape[:1], self.shape[1:], right.shape[:1]) or self.decay.shape != (1,):
            return f"holds a remainder of shapes {tuple(left.shape)} and {tuple(right.shape)}, which does not fit"
        if not all(bool(torch.isfinite(part).all()) for part in (left, right, self.decay)):
            return "holds a remainder that is not finite"
        return None


def deferring(weight: Weight, decay: Tensor, factors: Factors) -> Weight:
    """Add a deferred low-rank update to an int8 weight; other formats are returned without one.

    Args:
        weight: The stored weight; a deferred update that it has already is replaced.
        decay: (1,) float32, a factor on the stored weight.
        factors: Returns (m, r) and (r, n), whose product is added.
    """
    base = weight.settled
    return base if base.int8_block is None else DeferredWeight(base, decay, factors)


def deferred_of(weight: Weight) -> DeferredWeight | None:
    """Return the weight if it has a deferred update, else None."""
    return weight if isinstance(weight, DeferredWeight) else None
