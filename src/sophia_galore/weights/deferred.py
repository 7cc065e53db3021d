"""An int8 matrix whose last updates are not in its codes yet, but beside them as a product of two thin factors.

    W = decay * (code * scale) + left right        left (m, r), right (r, n), one of them the basis

Between two refreshes of a basis GaLore's updates all lie in one subspace, so their sum is as small as a moment.
Kept in bfloat16 there, it is rounded into eight bits once per refresh instead of once per step. Weight decay in the
meantime is the factor `decay`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.weights.int8 import Int8Format, Int8Weight
from sophia_galore.weights.weight import Rows, Weight

Factors = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class DeferredWeight(Weight):
    """A matrix in eight bits with an update of low rank that is still to be rounded into its codes.

    Args:
        base: The codes and scales.
        decay: (1,) float32, a factor on them.
        factors: Gives (m, r) and (r, n), whose product is added; asked each time, since they change.
    """

    base: Int8Weight
    decay: Tensor
    factors: Factors

    @property
    def format(self) -> str:
        """That of its codes."""
        return self.base.format

    @property
    def first(self) -> Tensor:
        """The codes."""
        return self.base.first

    @property
    def settled(self) -> Int8Weight:
        """See `Weight`."""
        return self.base

    def __getitem__(self, rows: Rows) -> DeferredWeight:
        """See `Weight`."""

        def factors() -> tuple[Tensor, Tensor]:
            left, right = self.factors()
            return left[rows], right

        return DeferredWeight(self.base[rows], self.decay, factors)

    def values(self, dtype: torch.dtype) -> Tensor:
        """See `Weight`; the update included."""
        left, right = self.factors()
        values = self.base.values(dtype).mul_(self.decay.to(dtype))
        return values.addmm_(left.to(dtype), right.to(dtype))

    def write(self, values: Tensor, noise: Noise | None) -> None:
        """Not possible: what the codes hold and what the factors hold can't be told apart in a value."""
        raise TypeError("a weight with a deferred update is changed by its factors, and by rounding them in")

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales and the update, the factors in bfloat16."""
        left, right = (factor.to(torch.bfloat16).contiguous() for factor in self.factors())
        return {**self.base.tensors(), ".left": left, ".right": right, ".shrink": self.decay}

    def copied_to(self, device: torch.device) -> DeferredWeight:
        """See `Weight`."""
        left, right = (factor.to(device, copy=True) for factor in self.factors())
        return DeferredWeight(self.base.copied_to(device), self.decay.to(device, copy=True), lambda: (left, right))

    def copy_(self, other: Weight) -> None:
        """Not possible: the factors belong to an optimizer's state, and what `factors` gives may be a copy of them."""
        raise TypeError(
            "of a weight with a deferred update the codes are taken over, by `settled`; its state has the rest"
        )

    def rounded_in(self, form: Int8Format, device: torch.device) -> Int8Weight:
        """Return a copy in codes alone. They are rounded without bias, since most of an update is smaller than a code.

        Args:
            form: The format of the copy, in blocks as these.
            device: Where it lives.
        """
        made = Int8Weight.copy_of(self.base, form, device)
        noise = Noise.of(0, "remainder", *self.shape)
        made.write(self.values(torch.float32).to(device), noise)
        return made

    def problem(self) -> str | None:
        """See `Weight`."""
        if problem := self.base.problem():
            return problem
        left, right = self.factors()
        shapes = (left.ndim, right.ndim, left.shape[:1], right.shape[1:], left.shape[1:])
        if shapes != (2, 2, self.shape[:1], self.shape[1:], right.shape[:1]) or self.decay.shape != (1,):
            return f"holds a remainder of shapes {tuple(left.shape)} and {tuple(right.shape)}, which does not fit"
        if not all(bool(torch.isfinite(tensor).all()) for tensor in (left, right, self.decay)):
            return "holds a remainder that is not finite"
        return None


def deferring(weight: Weight, decay: Tensor, factors: Factors) -> Weight:
    """Return a weight with an update of low rank that is not written yet; in other formats than int8 each is, at once.

    Args:
        weight: The stored weight; of one that has a deferred update already, the codes alone are taken over.
        decay: (1,) float32, a factor on what is stored.
        factors: Gives (m, r) and (r, n), whose product is added.
    """
    base = weight.settled
    return DeferredWeight(base, decay, factors) if isinstance(base, Int8Weight) else base


def deferred_of(weight: Weight) -> DeferredWeight | None:
    """Return the weight with its deferred update, where it has one."""
    return weight if isinstance(weight, DeferredWeight) else None
