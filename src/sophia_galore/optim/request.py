"""In which form the optimizer wants a gradient; it says so before the gradient is computed."""

from __future__ import annotations

from collections.abc import Callable

from sophia_galore.numerics.subspace import LazyGradient, Projector

BasisFromGradient = Callable[[LazyGradient], Projector]
"""Makes a new basis from products of a gradient that is never formed, and says what it is wanted times then."""

GradientRequest = None | Projector | BasisFromGradient
"""None: the whole gradient. A projector: the product with its matrix. Else the basis comes first; who can't form the
products of a gradient gives the whole one."""

Wants = Callable[[str], GradientRequest]
"""For a parameter's name, its request; asked when backward reaches the parameter."""


def whole_gradients(name: str) -> GradientRequest:
    """Wants every gradient as it is."""
    return None
