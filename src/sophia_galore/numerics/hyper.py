"""Hyper-parameters of the rules, with their usual values; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters; a rule reads those that its formula has.

    Args:
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment (Sophia: of the curvature), in [0, 1).
        eps: Smallest denominator, or what is added to it.
        rho: Sophia's factor on the curvature (gamma in the paper); smaller: more entries are clipped.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    rho: float = 0.04
