"""The forms in which an optimizer can request a gradient, before the gradient is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sophia_galore.numerics.subspace import LazyGradient, ProjectedGradient, Projector

BasisFromGradient = Callable[[LazyGradient], Projector]
"""Computes a new basis from products of a gradient that is never formed, and returns the projector to use."""

Reduction = Callable[[Tensor], ProjectedGradient]
"""Takes a full gradient, float32, and returns all that a step needs of it; the full gradient can then be freed."""


@dataclass(frozen=True, eq=False)
class FromGradient:
    """The request for a product with a basis that is known only once the gradient is.

    Code that forms full gradients may ignore it and return the full gradient; the numbers are the same to the bit.

    Args:
        reduce: Makes the product from the full gradient.
        basis: Computes the basis from products alone; None: that is impossible, or costs more than the full gradient.
    """

    reduce: Reduction
    basis: BasisFromGradient | None


GradientRequest = None | Projector | FromGradient
"""None: the full gradient. A projector: the product with its matrix. `FromGradient`: first the basis, then the
product."""

Wants = Callable[[str], GradientRequest]
"""Returns the request for a parameter's name; called when backward reaches the parameter."""


def whole_gradients(name: str) -> GradientRequest:
    """Request the full gradient of every parameter."""
    return None
