"""Build specs from settings, for a run's configuration and for the `torch.optim` classes."""

from __future__ import annotations

import math
from fractions import Fraction

from sophia_galore.optim.recipes import ApolloSettings, GaLoreSettings, StateBits
from sophia_galore.optim.spec import SubspaceSpec

# In elements. For smaller states, the saved memory is not worth the rounding (bitsandbytes has the same limit).
_SMALLEST_ROUNDED_STATE = 4096


def settled_bits(shape: tuple[int, ...], asked: StateBits) -> StateBits:
    """Return the bits of a parameter's state: the requested ones, or 32 if the parameter is small.

    Args:
        shape: The parameter's shape.
        asked: The requested `state_bits`.
    """
    return asked if math.prod(shape) >= _SMALLEST_ROUNDED_STATE else 32


def settled_decay(shape: tuple[int, ...], asked: float) -> float:
    """Return a parameter's weight decay: the requested one, or 0 for vectors and scalars.

    Args:
        shape: The parameter's shape.
        asked: The requested `weight_decay`.
    """
    return asked if len(shape) > 1 else 0.0


def galore_subspace(settings: GaLoreSettings, place: float | Fraction) -> SubspaceSpec:
    """Return how GaLore projects a matrix.

    Args:
        settings: GaLore's settings.
        place: The matrix's relative position among all projected ones, in [0, 1); it spreads refreshes over the gap,
            if they are staggered.
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
    """Return how APOLLO projects a matrix.

    Args:
        settings: APOLLO's settings.
        shape: (m, n) of the matrix.
        place: The matrix's relative position among all projected ones, in [0, 1); it spreads new projections over the
            gap.
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
    """Return the factor that makes APOLLO's update about as long as AdamW's.

    A channel's factor is |N| / |R|. |N| is about sqrt(r), from r entries of about 1; AdamW's step has n of them, so its
    norm is about sqrt(n).

    Args:
        shape: (m, n) of the matrix.
        rank: r.

    Returns:
        sqrt(min(m, n) / r).
    """
    return math.sqrt(min(shape) / rank)
