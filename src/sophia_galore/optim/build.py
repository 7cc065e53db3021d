"""Makes specs from settings, for a run's configuration and for the `torch.optim` classes."""

from __future__ import annotations

import math
from fractions import Fraction

from sophia_galore.optim.recipes import ApolloSettings, GaLoreSettings, StateBits
from sophia_galore.optim.spec import SubspaceSpec

# A smaller state saves nothing worth its rounding (bitsandbytes draws the line at the same size).
_SMALLEST_ROUNDED_STATE = 4096


def settled_bits(shape: tuple[int, ...], asked: StateBits) -> StateBits:
    """The format of a parameter's state: what was asked for, or fp32 where the parameter is small.

    Args:
        shape: The parameter's.
        asked: `state_bits` of the run.
    """
    return asked if math.prod(shape) >= _SMALLEST_ROUNDED_STATE else 32


def settled_decay(shape: tuple[int, ...], asked: float) -> float:
    """A parameter's weight decay: what was asked for, or none for vectors and scalars.

    Args:
        shape: The parameter's.
        asked: `weight_decay` of the run.
    """
    return asked if len(shape) > 1 else 0.0


def galore_subspace(settings: GaLoreSettings, place: float | Fraction) -> SubspaceSpec:
    """How GaLore projects a matrix.

    Args:
        settings: GaLore's.
        place: In [0, 1); spreads refreshes over the gap, if they are staggered.
    """
    return SubspaceSpec(
        rank=settings.rank,
        gap=settings.update_proj_gap,
        offset=int(place * settings.update_proj_gap) if settings.stagger else 0,
        scale=settings.scale,
        kind=settings.subspace,
        adaptive=settings.adaptive_gap,
        transport=settings.moment_transport,
        projection_bits=settings.projection_bits,
        residual=settings.residual,
    )


def apollo_subspace(settings: ApolloSettings, shape: tuple[int, ...], place: float | Fraction) -> SubspaceSpec:
    """How APOLLO projects a matrix.

    Args:
        settings: APOLLO's.
        shape: (m, n) of the matrix.
        place: In [0, 1); spreads new projections over the gap.
    """
    return SubspaceSpec(
        rank=settings.rank,
        gap=settings.update_proj_gap,
        offset=int(place * settings.update_proj_gap),
        scale=settings.scale or apollo_scale(shape, settings.rank),
        kind="gaussian",
        residual="tensor" if settings.mini else "channel",
    )


def apollo_scale(shape: tuple[int, ...], rank: int) -> float:
    """The factor with which APOLLO's update is as long as AdamW's.

    A channel's factor is |N| / |R| with sqrt(r) entries of about 1 in |N|, where AdamW's step has sqrt(n).

    Args:
        shape: (m, n) of the matrix.
        rank: r.

    Returns:
        sqrt(min(m, n) / r).
    """
    return math.sqrt(min(shape) / rank)
