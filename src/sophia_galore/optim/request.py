"""The forms in which an optimizer can request a gradient, before the gradient is computed."""

from __future__ import annotations

from collections.abc import Callable

from sophia_galore.numerics.subspace import LazyGradient, Projector

BasisFromGradient = Callable[[LazyGradient], Projector]
"""Computes a new basis from products of a gradient that is never formed, and returns the projector to use."""

GradientRequest = None | Projector | BasisFromGradient
"""None: the full gradient. A projector: the product with its matrix. A function: first the basis, then the product;
code that can't compute products of a gradient returns the full one instead."""

Wants = Callable[[str], GradientRequest]
"""Returns the request for a parameter's name; called when backward reaches the parameter."""


def whole_gradients(name: str) -> GradientRequest:
    """Request the full gradient of every parameter."""
    return None
