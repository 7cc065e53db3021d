"""Routes: which parameter is trained by what, and why."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from fractions import Fraction

from sophia_galore.config import RunConfig
from sophia_galore.config.schema import OptimizerName, QuantizationConfig
from sophia_galore.errors import ConfigError
from sophia_galore.model.store import DTYPES
from sophia_galore.numerics.int8 import Int8Format
from sophia_galore.numerics.rules import BETAS, Hyper
from sophia_galore.optim.spec import (
    ADAMW_LEARNING_RATE,
    ParamSpec,
    SubspaceSpec,
    apollo_scale,
    settled_bits,
)
from sophia_galore.plan.route import FROZEN, Format, Route

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


def freezes_layers(config: RunConfig) -> bool:
    """Whether the matrices of the layers are held in bitsandbytes' eight bits, which can't be written to."""
    return config.quantization.int8 and config.quantization.backend == "bitsandbytes"


def settled_optimizer(config: RunConfig) -> OptimizerName:
    """The optimizer that was asked for, or AdamW where the matrices that others are for are frozen."""
    return "adamw" if freezes_layers(config) else config.optimizer.type


def peak_learning_rate(config: RunConfig) -> float:
    """The peak rate that was asked for, or the optimizer's own default."""
    if config.training.learning_rate:
        return config.training.learning_rate
    kind = settled_optimizer(config)
    return _GALORE_LEARNING_RATES[config.optimizer.galore.rule] if kind == "galore" else DEFAULT_LEARNING_RATES[kind]


def dense_learning_rate(config: RunConfig) -> float:
    """The peak rate of parameters that AdamW trains beside the optimizer that was asked for."""
    galore, kind = config.optimizer.galore, settled_optimizer(config)
    if kind == "galore":
        if galore.dense_learning_rate:
            return galore.dense_learning_rate
        # The length of SGD's step is the gradient's own: its rate says nothing about AdamW's.
        return DEFAULT_LEARNING_RATES["adamw"] if galore.rule == "sgd" else peak_learning_rate(config) * galore.scale
    return DEFAULT_LEARNING_RATES["adamw"] if kind == "scale" else peak_learning_rate(config)


def make_routes(
    config: RunConfig,
    shapes: Mapping[str, tuple[int, ...]],
    head_name: str = "",
    linears: Collection[str] = (),
) -> tuple[Route, ...]:
    """Route every parameter.

    Args:
        config: What was asked.
        shapes: Name and shape of each parameter, in the model's order.
        head_name: Which of them is the head's weight (the embedding's, if they are tied).
        linears: Which of them are the weights of the layers' linear maps.

    Returns:
        One route a parameter, in the same order.

    Raises:
        ConfigError: A pattern of quantization.skip matches no weight.
    """
    frozen = linears if freezes_layers(config) else ()
    for skip in config.quantization.skip if config.quantization.int8 else ():
        if not any(fnmatchcase(name, skip) for name in shapes):
            raise ConfigError(
                f"quantization.skip: {skip!r} matches no weight of this model.",
                f"Weights have names such as {next(iter(shapes))}; * stands for anything.",
            )
    projected = [name for name, shape in shapes.items() if _is_projected(config, tuple(shape))]
    places = {name: Fraction(index, len(projected)) for index, name in enumerate(projected)}
    return tuple(
        _frozen_route(name, tuple(shape))
        if name in frozen
        else _projected_route(config, name, tuple(shape), places[name])
        if name in places
        else _dense_route(config, name, tuple(shape), is_head=name == head_name)
        for name, shape in shapes.items()
    )


def int8_format(config: QuantizationConfig) -> Int8Format:
    """How weights that are held in eight bits are held."""
    return Int8Format(config.block_size, config.rounding == "stochastic")


def _held(config: RunConfig, name: str, shape: tuple[int, ...]) -> tuple[Format, int]:
    """The format of a stored weight, and its bytes."""
    quantization = config.quantization
    native = quantization.int8 and quantization.backend == "native"
    if native and len(shape) == 2 and not any(fnmatchcase(name, skip) for skip in quantization.skip):
        return "int8", int8_format(quantization).num_bytes((shape[0], shape[1]))
    return config.model.store, math.prod(shape) * DTYPES[config.model.store].itemsize


def _frozen_route(name: str, shape: tuple[int, ...]) -> Route:
    """The route of a matrix (m, n) that bitsandbytes holds: a byte a weight, and a float32 scale a row."""
    num_bytes = math.prod(shape) + 4 * shape[0]
    return Route(name, shape, None, "bnb8", num_bytes, FROZEN, "held in eight bits by bitsandbytes")


def _projected_route(config: RunConfig, name: str, shape: tuple[int, ...], place: Fraction) -> Route:
    """The route of a matrix whose gradient is projected; `place` in [0, 1) spreads the refreshes over the gap."""
    kind, rule = settled_optimizer(config), "adamw"
    if kind == "galore":
        rule = config.optimizer.galore.rule
        subspace = _galore_subspace(config, shape, place)
    else:
        subspace = _apollo_subspace(config, shape, place)
    spec = _spec(config, name, shape, rule, peak_learning_rate(config), subspace)
    return Route(name, shape, spec, *_held(config, name, shape), kind, f"projected, rank {subspace.rank}")


def _dense_route(config: RunConfig, name: str, shape: tuple[int, ...], *, is_head: bool) -> Route:
    """The route of a parameter whose rule sees the full gradient."""
    kind = settled_optimizer(config)
    if kind == "scale" and len(shape) == 2:
        rule, why = ("scale_momentum", "head, with momentum") if is_head else ("scale", "no state")
        spec = _spec(config, name, shape, rule, peak_learning_rate(config))
        return Route(name, shape, spec, *_held(config, name, shape), rule, why)
    rule = "sophia" if kind == "sophia" else "adamw"
    if kind != config.optimizer.type:
        why = f"what {config.optimizer.type} would project is frozen"
    elif kind in ("adamw", "sophia"):
        why = f"optimizer.type is {kind}"
    elif len(shape) != 2:
        why = "norm or bias"
    else:
        why = f"a side <= rank {_rank(config)}"
    spec = _spec(config, name, shape, rule, dense_learning_rate(config))
    return Route(name, shape, spec, *_held(config, name, shape), rule, why)


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


def _galore_subspace(config: RunConfig, shape: tuple[int, ...], place: Fraction) -> SubspaceSpec:
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
    return settled_optimizer(config) in ("galore", *_APOLLO_RANKS) and len(shape) == 2 and min(shape) > _rank(config)
