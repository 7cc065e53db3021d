"""Hyper-parameters of the rules, with their usual values; torch is not imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters; each rule reads only those of its formula.

    Args:
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment (Sophia: of the curvature), in [0, 1).
        eps: Minimum of the denominator, or added to it.
        rho: Sophia's factor on the curvature (gamma in the paper); a smaller value clips more entries.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    rho: float = 0.04
