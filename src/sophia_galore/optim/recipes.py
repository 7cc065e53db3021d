"""The settings of the optimizers: names, default values, limits and learning rates.

The configuration and the `torch.optim` classes share them. This file does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

OptimizerName = Literal["galore", "adamw", "sophia", "apollo", "apollo_mini", "scale"]
RuleName = Literal["adamw", "sophia", "adafactor", "sgd", "muon"]
SubspaceName = Literal["tracked", "svd", "randomized", "random"]
ResidualName = Literal["none", "fira"]
StateBits = Literal[32, 16, 8]
ProjectionBits = Literal[32, 16, 4]

PROJECTING: tuple[OptimizerName, ...] = ("galore", "apollo", "apollo_mini")
"""Optimizers that project the gradients of large matrices."""

STORED_BASES: tuple[SubspaceName, ...] = ("svd", "randomized", "tracked")
"""Bases that are made from gradients and so must be stored; the others are functions of the seed."""

LARGEST, MOST, SMALLEST_EPS = 1e9, 10**9, 1e-30
"""Limits of numbers, of counts and of `eps`: beyond them a step overflows float32, or an index its integer type."""

NUM_SEEDS = 2**63
"""Seeds are whole numbers below this."""

STATE_BITS: StateBits = 32
CURVATURE_EVERY = 10
"""Steps between two estimates of Sophia's curvature."""

# Default peak learning rates; README, Measured, shows their results.
DEFAULT_LEARNING_RATES: dict[OptimizerName, float] = {
    "galore": 1.6e-3,
    "adamw": 2e-4,
    "sophia": 5e-5,
    "apollo": 2e-4,
    "apollo_mini": 2e-4,
    "scale": 1e-2,
}
# GaLore's rules that need another default rate.
_GALORE_LEARNING_RATES: dict[RuleName, float] = {"sophia": 4e-4, "sgd": 4.0}


@dataclass(frozen=True)
class GaLoreSettings:
    """GaLore's settings for a matrix; the configuration and `GaLore` describe each of them."""

    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    rule: RuleName = "adamw"
    subspace: SubspaceName = "tracked"
    residual: ResidualName = "none"
    moment_transport: bool = True
    stagger: bool = True
    adaptive_gap: bool = False
    projection_bits: ProjectionBits = 16


@dataclass(frozen=True)
class ApolloSettings:
    """APOLLO's settings for a matrix; the configuration and `Apollo` describe each of them."""

    rank: int
    update_proj_gap: int = 200
    scale: float | None = None
    mini: bool = False


T = TypeVar("T", GaLoreSettings, ApolloSettings)


def settings_among(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build settings of one kind from a mapping that may hold others too."""
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def default_rate(optimizer: OptimizerName, rule: RuleName) -> float:
    """Return the default peak learning rate of an optimizer; `rule` is GaLore's rule."""
    rate = DEFAULT_LEARNING_RATES[optimizer]
    return _GALORE_LEARNING_RATES.get(rule, rate) if optimizer == "galore" else rate


def apollo_rank(rank: int | None, *, mini: bool) -> int:
    """Return the rank of APOLLO's projection; None means the default."""
    return (1 if mini else 128) if rank is None else rank


def fixed_dense_rate(rule: str, asked: float | None) -> float | None:
    """Return GaLore's learning rate for parameters that are not projected; None: `scale` times the main rate."""
    # The length of SGD's step depends on the gradient's norm, so its rate is no guide to AdamW's.
    return DEFAULT_LEARNING_RATES["adamw"] if asked is None and rule == "sgd" else asked
