"""Makes the routes: how each parameter is trained, and why."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from fractions import Fraction

import torch

from sophia_galore.config import RunConfig
from sophia_galore.config.schema import QuantizationConfig
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.numerics.rules import RULES as NUMERIC_RULES
from sophia_galore.optim import recipes
from sophia_galore.optim.build import apollo_subspace, galore_subspace, settled_bits, settled_decay
from sophia_galore.optim.recipes import ApolloSettings, GaLoreSettings, settings_among
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec
from sophia_galore.plan.facts import Facts, Param
from sophia_galore.plan.parameters import PROJECTED, Routing, is_held_frozen, is_skipped, rank, route_of
from sophia_galore.plan.route import FROZEN, Format, Route
from sophia_galore.plan.rules import RULES, optimizer
from sophia_galore.plan.verdicts import decide
from sophia_galore.weights.int8 import Int8Format, Int8Weight
from sophia_galore.weights.plain import DTYPES, PlainWeight
from sophia_galore.weights.weight import Weight

_META = torch.device("meta")


def peak_learning_rate(config: RunConfig) -> float:
    """Return the peak learning rate that was asked for, or the optimizer's default."""
    return config.training.learning_rate or recipes.default_rate(optimizer(Facts(config)), config.optimizer.galore.rule)


def dense_learning_rate(config: RunConfig) -> float:
    """Return the peak learning rate of parameters that AdamW trains besides the chosen optimizer."""
    galore, kind = config.optimizer.galore, optimizer(Facts(config))
    if kind == "galore":
        fixed = recipes.fixed_dense_rate(galore.rule, galore.dense_learning_rate)
        return peak_learning_rate(config) * galore.scale if fixed is None else fixed
    return recipes.DEFAULT_LEARNING_RATES["adamw"] if kind == "scale" else peak_learning_rate(config)


def make_routes(
    config: RunConfig,
    shapes: Mapping[str, tuple[int, ...]],
    head_name: str = "",
    linears: Collection[str] = (),
) -> tuple[Route, ...]:
    """Make routes from names and shapes alone.

    Args:
        config: What was asked.
        shapes: Name and shape of each parameter, in the model's order.
        head_name: Name of the head's weight (the embedding's, if they are tied).
        linears: Names of the weights of the layers' linear maps.

    Returns:
        One route for each parameter, in the same order.

    Raises:
        ConfigError: A pattern of quantization.skip matches no weight.
    """
    params = tuple(
        Param(name, tuple(shape), is_head=name == head_name, is_linear=name in linears)
        for name, shape in shapes.items()
    )
    facts = Facts(config, parameters=params)
    decide(RULES, facts)
    return route_all(facts)


def route_all(facts: Facts) -> tuple[Route, ...]:
    """Make the routes of all parameters, by the tables of `parameters.py`.

    Args:
        facts: The facts of the run, with its parameters.

    Returns:
        One route for each parameter, in the same order.
    """
    routings = [route_of(facts, param) for param in facts.parameters]
    num_projected = sum(routing.rule == PROJECTED for routing in routings)
    routes: list[Route] = []
    place = 0
    for param, routing in zip(facts.parameters, routings, strict=True):
        routes.append(_route(facts, param, routing, Fraction(place, max(1, num_projected))))
        place += routing.rule == PROJECTED
    return tuple(routes)


def int8_format(config: QuantizationConfig) -> Int8Format:
    """Return the int8 format of a configuration."""
    return Int8Format(config.block_size, config.rounding == "stochastic")


def empty_weight(route: Route, form: Int8Format, device: torch.device = _META) -> Weight:
    """Return a weight without values, in the format of a route that is not held by bitsandbytes.

    Args:
        route: The route.
        form: The format of eight-bit weights.
        device: Its device.
    """
    if route.format != "int8":
        return PlainWeight(torch.empty(route.shape, dtype=DTYPES[route.format], device=device))
    rows, columns = route.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=device)
    scales = torch.empty(rows, form.num_scales(columns), dtype=torch.bfloat16, device=device)
    return Int8Weight(codes, scales, form)


def _route(facts: Facts, param: Param, routing: Routing, place: Fraction) -> Route:
    """Make the route of a parameter; `place` in [0, 1) spreads basis refreshes over the gap."""
    config, kind = facts.config, optimizer(facts)
    form, num_bytes = _held(facts, param)
    spec: ParamSpec | None
    if routing.rule == FROZEN:
        spec, rule = None, FROZEN
    elif routing.rule == PROJECTED:
        subspace = _subspace(config, kind, param.shape, place, rank(facts))
        if form == "int8" and config.quantization.fold == "refresh":
            subspace = replace(subspace, folds_late=True)
        inner = config.optimizer.galore.rule if kind == "galore" else "adamw"
        spec, rule = _spec(config, param, inner, peak_learning_rate(config), subspace), kind
    else:
        # SCALE's own rules step with its rate; AdamW and Sophia, where they are all there is, with theirs.
        rate = peak_learning_rate(config) if routing.rule.startswith("scale") else dense_learning_rate(config)
        spec, rule = _spec(config, param, routing.rule, rate), routing.rule
    return Route(param.name, param.shape, spec, form, num_bytes, rule, routing.reason, routing.remarks, routing.keys)


def _held(facts: Facts, param: Param) -> tuple[Format, int]:
    """Return format and bytes of a stored weight."""
    if is_held_frozen(facts, param):
        # One byte for each weight and a float32 scale for each row.
        return "bnb8", param.num_elements + 4 * param.shape[0]
    if facts.has_native_int8 and param.is_matrix and not param.is_router and not is_skipped(facts, param):
        return "int8", int8_format(facts.config.quantization).num_bytes((param.shape[0], param.shape[1]))
    store = facts.config.model.store
    return store, param.num_elements * DTYPES[store].itemsize


def _spec(
    config: RunConfig, param: Param, rule: str, learning_rate: float, subspace: SubspaceSpec | None = None
) -> ParamSpec:
    settings = config.optimizer
    return ParamSpec(
        name=param.name,
        shape=param.shape,
        learning_rate=learning_rate,
        weight_decay=settled_decay(param.shape, config.training.weight_decay),
        hyper=Hyper(*(settings.betas or NUMERIC_RULES[rule].betas), settings.eps, settings.sophia.rho),
        rule=rule,
        state_bits=settled_bits(param.shape, settings.state_bits),
        subspace=subspace,
        rests=param.is_expert,
    )


def _subspace(config: RunConfig, kind: str, shape: tuple[int, ...], place: Fraction, rank: int) -> SubspaceSpec:
    apollo, galore = config.optimizer.apollo, config.optimizer.galore
    if kind != "galore":
        settings = ApolloSettings(rank, apollo.update_proj_gap, apollo.scale, mini=kind == "apollo_mini")
        return apollo_subspace(settings, shape, place)
    # The projected gradient is formed directly only if that costs less than the full gradient. Clipping needs
    # the exact norm, so it needs the full gradient.
    fast = rank * sum(shape) < math.prod(shape) and not config.training.max_grad_norm
    fast = fast and galore.fast_path != "never" and galore.residual == "none"
    return replace(galore_subspace(settings_among(GaLoreSettings, dict(galore)), place), fast=fast)
