"""What can be asked of an optimizer, and what holds where nothing is asked: names, defaults, limits and rates.

The configuration and the `torch.optim` classes both take these from here. This file is data and needs no torch.
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
"""Limits of numbers, of counts and of `eps`: beyond them a step leaves float32, or an index its type."""

NUM_SEEDS = 2**63
"""Seeds are whole numbers below this."""

STATE_BITS: StateBits = 32
CURVATURE_EVERY = 10
"""Steps between two estimates of Sophia's curvature."""

# Peak rates where the user gives none; README, Measured, has what they reach.
DEFAULT_LEARNING_RATES: dict[OptimizerName, float] = {
    "galore": 1.6e-3,
    "adamw": 2e-4,
    "sophia": 5e-5,
    "apollo": 2e-4,
    "apollo_mini": 2e-4,
    "scale": 1e-2,
}
# Where GaLore's rule needs another.
_GALORE_LEARNING_RATES: dict[RuleName, float] = {"sophia": 4e-4, "sgd": 4.0}


@dataclass(frozen=True)
class GaLoreSettings:
    """What GaLore does with a matrix; the configuration and `GaLore` say what each setting means."""

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
    """What APOLLO does with a matrix; the configuration and `Apollo` say what each setting means."""

    rank: int
    update_proj_gap: int = 200
    scale: float | None = None
    mini: bool = False


T = TypeVar("T", GaLoreSettings, ApolloSettings)


def settings_among(kind: type[T], values: Mapping[str, Any]) -> T:
    """Those of many settings, by name, that are of one kind."""
    return kind(**{field.name: values[field.name] for field in fields(kind)})


def default_rate(optimizer: OptimizerName, rule: RuleName) -> float:
    """Peak rate of an optimizer where none is asked for; `rule` is GaLore's."""
    rate = DEFAULT_LEARNING_RATES[optimizer]
    return _GALORE_LEARNING_RATES.get(rule, rate) if optimizer == "galore" else rate


def apollo_rank(rank: int | None, *, mini: bool) -> int:
    """Return the rank of APOLLO's projection; None means the default."""
    return (1 if mini else 128) if rank is None else rank


def fixed_dense_rate(rule: str, asked: float | None) -> float | None:
    """GaLore's rate of what is not projected; None: it is `scale` times the rate of what is."""
    # The length of SGD's step is the gradient's own: its rate says nothing about AdamW's.
    return DEFAULT_LEARNING_RATES["adamw"] if asked is None and rule == "sgd" else asked
