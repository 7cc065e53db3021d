"""Routes: which parameter is trained by what, and why."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.config.schema import QuantizationConfig
from sophia_galore.errors import ConfigError
from sophia_galore.model.store import DTYPES
from sophia_galore.numerics.int8 import Int8Format
from sophia_galore.numerics.rules import BETAS, Hyper
from sophia_galore.numerics.subspace import Side
from sophia_galore.optim.spec import (
    ADAMW_LEARNING_RATE,
    ParamSpec,
    SubspaceSpec,
    apollo_scale,
    settled_bits,
    state_bytes,
)

# Peak rates where the user gives none; README, Measured, has what they reach.
DEFAULT_LEARNING_RATES: dict[str, float] = {
    "galore": 1.6e-3,
    "adamw": ADAMW_LEARNING_RATE,
    "sophia": 5e-5,
    "apollo": 2e-4,
    "apollo_mini": 2e-4,
    "scale": 1e-2,
}
# Where GaLore's rule is another than AdamW.
_GALORE_LEARNING_RATES: dict[str, float] = {
    "adamw": DEFAULT_LEARNING_RATES["galore"],
    "sophia": 4e-4,
    "adafactor": 1.6e-3,
    "sgd": 4.0,
    "muon": 1.6e-3,
}

_APOLLO_RANKS = {"apollo": 128, "apollo_mini": 1}


@dataclass(frozen=True)
class Route:
    """What happens to one parameter.

    Args:
        spec: How it is stepped.
        format: Format in which its weight is stored: "fp32", "bf16" or "int8".
        weight_bytes: Bytes of the stored weight.
        rule: What steps it, in words: the optimizer's name if the gradient is projected, else the rule's.
        why: The reason for this route, in words.
    """

    spec: ParamSpec
    format: str
    weight_bytes: int
    rule: str
    why: str

    @property
    def side(self) -> Side | None:
        """The side on which the gradient is projected, if it is."""
        return self.spec.side if self.spec.subspace else None

    @property
    def num_elements(self) -> int:
        """Elements of the parameter."""
        return math.prod(self.spec.shape)

    @property
    def projection_bytes(self) -> int:
        """Bytes of its basis."""
        tensors = self.spec.state_tensors()
        return state_bytes({name: tensor for name, tensor in tensors.items() if name.startswith("basis")})

    @property
    def state_bytes(self) -> int:
        """Bytes of its optimizer state, the basis not included."""
        return state_bytes(self.spec.state_tensors()) - self.projection_bytes

    def to_json(self) -> dict[str, Any]:
        """The route as plain data, for `plan.json`: everything that decides about numbers, and the bytes."""
        spec = self.spec
        return {
            "name": spec.name,
            "shape": list(spec.shape),
            "format": self.format,
            "weight_bytes": self.weight_bytes,
            "rule": self.rule,
            "direction": spec.rule,
            "side": self.side,
            "hyper": vars(spec.hyper),
            "rank": spec.subspace.rank if spec.subspace else None,
            "subspace": vars(spec.subspace) if spec.subspace else None,
            "learning_rate": spec.learning_rate,
            "weight_decay": spec.weight_decay,
            "state_bits": spec.state_bits,
            "state_bytes": self.state_bytes,
            "projection_bytes": self.projection_bytes,
            "trained": True,
            "why": self.why,
        }


def peak_learning_rate(config: RunConfig) -> float:
    """The peak rate that was asked for, or the optimizer's own default."""
    if config.training.learning_rate:
        return config.training.learning_rate
    if config.optimizer.type == "galore":
        return _GALORE_LEARNING_RATES[config.optimizer.galore.rule]
    return DEFAULT_LEARNING_RATES[config.optimizer.type]


def dense_learning_rate(config: RunConfig) -> float:
    """The peak rate of parameters that AdamW trains beside the optimizer that was asked for."""
    galore = config.optimizer.galore
    if config.optimizer.type == "galore":
        if galore.dense_learning_rate:
            return galore.dense_learning_rate
        # The length of SGD's step is the gradient's own: its rate says nothing about AdamW's.
        return DEFAULT_LEARNING_RATES["adamw"] if galore.rule == "sgd" else peak_learning_rate(config) * galore.scale
    return DEFAULT_LEARNING_RATES["adamw"] if config.optimizer.type == "scale" else peak_learning_rate(config)


def make_routes(config: RunConfig, shapes: Mapping[str, tuple[int, ...]], head_name: str = "") -> tuple[Route, ...]:
    """Route every parameter.

    Args:
        config: What was asked.
        shapes: Name and shape of each parameter, in the model's order.
        head_name: Which of them is the head's weight (the embedding's, if they are tied).

    Returns:
        One route a parameter, in the same order.

    Raises:
        ConfigError: A pattern of quantization.skip matches no weight.
    """
    for skip in config.quantization.skip if config.quantization.int8 else ():
        if not any(fnmatchcase(name, skip) for name in shapes):
            raise ConfigError(
                f"quantization.skip: {skip!r} matches no weight of this model.",
                f"Weights have names such as {next(iter(shapes))}; * stands for anything.",
            )
    projected = [name for name, shape in shapes.items() if _is_projected(config, tuple(shape))]
    places = {name: Fraction(index, len(projected)) for index, name in enumerate(projected)}
    return tuple(
        _projected_route(config, name, tuple(shape), places[name])
        if name in places
        else _dense_route(config, name, tuple(shape), is_head=name == head_name)
        for name, shape in shapes.items()
    )


def int8_format(config: QuantizationConfig) -> Int8Format:
    """How weights that are held in eight bits are held."""
    return Int8Format(config.block_size, config.rounding == "stochastic")


def _held(config: RunConfig, name: str, shape: tuple[int, ...]) -> tuple[str, int]:
    """The format of a stored weight, and its bytes."""
    quantization = config.quantization
    if quantization.int8 and len(shape) == 2 and not any(fnmatchcase(name, skip) for skip in quantization.skip):
        return "int8", int8_format(quantization).num_bytes((shape[0], shape[1]))
    return config.model.store, math.prod(shape) * DTYPES[config.model.store].itemsize


def _projected_route(config: RunConfig, name: str, shape: tuple[int, ...], place: Fraction) -> Route:
    """The route of a matrix whose gradient is projected; `place` in [0, 1) spreads the refreshes over the gap."""
    kind, rule = config.optimizer.type, "adamw"
    if kind == "galore":
        rule = config.optimizer.galore.rule
        subspace = _galore_subspace(config, shape, place, _held(config, name, shape)[0])
    else:
        subspace = _apollo_subspace(config, shape, place)
    spec = _spec(config, name, shape, rule, peak_learning_rate(config), subspace)
    return Route(spec, *_held(config, name, shape), kind, f"projected, rank {subspace.rank}")


def _dense_route(config: RunConfig, name: str, shape: tuple[int, ...], *, is_head: bool) -> Route:
    """The route of a parameter whose rule sees the full gradient."""
    kind = config.optimizer.type
    if kind == "scale" and len(shape) == 2:
        rule, why = ("scale_momentum", "head, with momentum") if is_head else ("scale", "no state")
        spec = _spec(config, name, shape, rule, peak_learning_rate(config))
        return Route(spec, *_held(config, name, shape), rule, why)
    rule = "sophia" if kind == "sophia" else "adamw"
    if kind in ("adamw", "sophia"):
        why = f"optimizer.type is {kind}"
    elif len(shape) != 2:
        why = "norm or bias"
    else:
        why = f"a side <= rank {_rank(config)}"
    return Route(_spec(config, name, shape, rule, dense_learning_rate(config)), *_held(config, name, shape), rule, why)


def _spec(
    config: RunConfig,
    name: str,
    shape: tuple[int, ...],
    rule: str,
    learning_rate: float,
    subspace: SubspaceSpec | None = None,
) -> ParamSpec:
    settings = config.optimizer
    return ParamSpec(
        name=name,
        shape=shape,
        learning_rate=learning_rate,
        weight_decay=config.training.weight_decay if len(shape) > 1 else 0.0,
        hyper=Hyper(*(settings.betas or BETAS[rule]), settings.eps, settings.sophia.rho),
        rule=rule,
        state_bits=settled_bits(shape, settings.state_bits),
        subspace=subspace,
    )


def _galore_subspace(config: RunConfig, shape: tuple[int, ...], place: Fraction, held: str) -> SubspaceSpec:
    galore = config.optimizer.galore
    # A product with the basis is worth it only where it is less work than the gradient. And clipping wants
    # the exact norm, which only the gradient has.
    fast = galore.rank * sum(shape) < math.prod(shape) and not config.training.max_grad_norm
    return SubspaceSpec(
        rank=galore.rank,
        gap=galore.update_proj_gap,
        offset=int(place * galore.update_proj_gap) if galore.stagger else 0,
        scale=galore.scale,
        kind=galore.subspace,
        adaptive=galore.adaptive_gap,
        transport=galore.moment_transport,
        projection_bits=galore.projection_bits,
        residual=galore.residual,
        fast=fast and galore.fast_path != "never" and galore.residual == "none",
        folds_late=held == "int8" and config.quantization.fold == "refresh",
    )


def _apollo_subspace(config: RunConfig, shape: tuple[int, ...], place: Fraction) -> SubspaceSpec:
    apollo, rank = config.optimizer.apollo, _rank(config)
    return SubspaceSpec(
        rank=rank,
        gap=apollo.update_proj_gap,
        offset=int(place * apollo.update_proj_gap),
        scale=apollo.scale or apollo_scale(shape, rank),
        kind="gaussian",
        residual="channel" if config.optimizer.type == "apollo" else "tensor",
    )


def _rank(config: RunConfig) -> int:
    kind = config.optimizer.type
    if kind == "galore":
        return config.optimizer.galore.rank
    return config.optimizer.apollo.rank or _APOLLO_RANKS[kind]


def _is_projected(config: RunConfig, shape: tuple[int, ...]) -> bool:
    return config.optimizer.type in ("galore", *_APOLLO_RANKS) and len(shape) == 2 and min(shape) > _rank(config)
