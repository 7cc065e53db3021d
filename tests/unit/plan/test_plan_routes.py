"""Routes: every parameter has exactly one, of the right shape, for the right reason, at the right price."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sophia_galore.config.schema import RunConfig
from sophia_galore.model.find_parts import find_architecture
from sophia_galore.numerics.subspace import basis_shape
from sophia_galore.optim.recipes import DEFAULT_LEARNING_RATES
from sophia_galore.optim.states import ParamStates
from sophia_galore.plan.routes import Route, make_routes
from tiny import FAMILIES, tiny_model

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (320, 64),
    "q.weight": (64, 64),
    "up.weight": (96, 64),
    "down.weight": (64, 96),
    "k.weight": (8, 64),
    "k.bias": (8,),
    "norm.weight": (64,),
}


def make_config(optimizer: str = "galore", **galore: Any) -> RunConfig:
    return RunConfig.model_validate({"optimizer": {"type": optimizer, "galore": {"rank": 8, **galore}}})


def routes_by_name(config: RunConfig, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Route]:
    routes = make_routes(config, shapes)
    assert [route.spec.name for route in routes] == list(shapes), "one route a parameter, in the model's order"
    assert all(route.spec.shape == shapes[route.spec.name] for route in routes)
    return {route.spec.name: route for route in routes}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["galore", "adamw"])
def test_every_parameter_of_every_family_is_routed_once(family: str, optimizer: str, tied: bool) -> None:
    model = tiny_model(family, tied=tied)
    shapes = {name: tuple(shape) for name, shape in find_architecture(model).parameter_shapes().items()}
    routes = routes_by_name(make_config(optimizer), shapes)
    assert routes.keys() == {name for name, _ in model.named_parameters()}
    assert ("lm_head.weight" in routes) == (not tied), "a tied head is the embedding"
    assert sum(route.num_elements for route in routes.values()) == sum(p.numel() for p in model.parameters())
    for route in routes.values():
        is_matrix = len(route.spec.shape) == 2
        assert route.rule == ("galore" if optimizer == "galore" and is_matrix else "adamw")
        assert route.why


@pytest.mark.parametrize(
    ("name", "rule", "side", "why"),
    [
        ("embed.weight", "galore", "right", "projected"),
        ("q.weight", "galore", "right", "projected"),
        ("up.weight", "galore", "right", "projected"),
        ("down.weight", "galore", "left", "projected"),
        ("k.weight", "adamw", None, "side <= rank 8"),
        ("k.bias", "adamw", None, "norm or bias"),
        ("norm.weight", "adamw", None, "norm or bias"),
    ],
)
def test_the_reason_is_the_shape(name: str, rule: str, side: str | None, why: str) -> None:
    route = routes_by_name(make_config())[name]
    assert (route.rule, route.side) == (rule, side)
    assert why in route.why


def test_with_adamw_nothing_is_projected() -> None:
    for route in routes_by_name(make_config("adamw")).values():
        assert (route.rule, route.why, route.projection_bytes) == ("adamw", "optimizer.type is adamw", 0)
        assert route.state_bytes == 2 * 4 * route.num_elements


@pytest.mark.parametrize(("rank", "projected"), [(1, 5), (7, 5), (8, 4), (63, 4), (64, 0), (1000, 0)])
def test_a_side_no_longer_than_the_rank_is_trained_dense(rank: int, projected: int) -> None:
    routes = routes_by_name(make_config(rank=rank)).values()
    assert sum(route.rule == "galore" for route in routes) == projected
    assert all(route.spec.subspace is None or route.spec.subspace.rank == rank for route in routes)


@pytest.mark.parametrize("gap", [1, 2, 4, 10, 200])
def test_refreshes_are_spread_over_the_gap(gap: int) -> None:
    routes = routes_by_name(make_config(update_proj_gap=gap, subspace="svd")).values()
    subspaces = [route.spec.subspace for route in routes if route.spec.subspace]
    offsets = [subspace.offset for subspace in subspaces]
    assert len(offsets) == 4
    assert all(0 <= offset < gap for offset in offsets)
    assert all(subspace.gap == gap for subspace in subspaces)
    # In any window of `gap` steps each basis is made once, and no step makes more than its share.
    loads = [sum(subspace.refreshes_at(step) for subspace in subspaces) for step in range(2, 2 + gap)]
    assert sum(loads) == 4
    assert max(loads) <= -(-4 // gap)
    assert all(subspace.refreshes_at(1) for subspace in subspaces)


def test_early_refreshes_of_tracked_bases_are_spread_too() -> None:
    """One in each octave of steps below the gap, not all of them at the same step of it."""
    routes = routes_by_name(make_config(update_proj_gap=64)).values()
    subspaces = [route.spec.subspace for route in routes if route.spec.subspace]
    for octave in (2, 4, 8, 16, 32):
        loads = [sum(subspace.refreshes_early_at(step) for subspace in subspaces) for step in range(octave, 2 * octave)]
        assert sum(loads) == len(subspaces) and max(loads) <= -(-len(subspaces) // octave)
    assert not any(subspace.refreshes_early_at(step) for subspace in subspaces for step in range(64, 256))


def test_without_staggering_all_are_refreshed_together() -> None:
    routes = routes_by_name(make_config(stagger=False, update_proj_gap=10)).values()
    assert {route.spec.subspace.offset for route in routes if route.spec.subspace} == {0}


@pytest.mark.parametrize(
    ("given_rate", "given_dense", "projected", "dense"),
    [
        (None, None, DEFAULT_LEARNING_RATES["galore"], DEFAULT_LEARNING_RATES["galore"] * 0.25),
        (0.1, None, 0.1, 0.025),
        (0.1, 0.3, 0.1, 0.3),
    ],
)
def test_rates(given_rate: float | None, given_dense: float | None, projected: float, dense: float) -> None:
    config = RunConfig.model_validate(
        {
            "training": {"learning_rate": given_rate},
            "optimizer": {"galore": {"rank": 8, "scale": 0.25, "dense_learning_rate": given_dense}},
        }
    )
    for route in routes_by_name(config).values():
        assert route.spec.learning_rate == (projected if route.rule == "galore" else dense)


def test_adamw_has_one_rate_and_its_own_default() -> None:
    rates = {route.spec.learning_rate for route in routes_by_name(make_config("adamw", dense_learning_rate=9)).values()}
    assert rates == {DEFAULT_LEARNING_RATES["adamw"]}


def test_decay_is_for_matrices_only() -> None:
    config = RunConfig.model_validate({"training": {"weight_decay": 0.1}, "optimizer": {"galore": {"rank": 8}}})
    for name, route in routes_by_name(config).items():
        assert route.spec.weight_decay == (0.1 if len(SHAPES[name]) == 2 else 0.0)


def test_settings_reach_the_rule() -> None:
    config = RunConfig.model_validate({"optimizer": {"betas": (0.8, 0.95), "eps": 1e-6, "galore": {"rank": 8}}})
    for route in routes_by_name(config).values():
        assert (route.spec.hyper.beta1, route.spec.hyper.beta2, route.spec.hyper.eps) == (0.8, 0.95, 1e-6)
        assert route.format == "fp32"


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple), min_size=1, max_size=8),
    st.integers(1, 45),
    st.sampled_from(["galore", "adamw"]),
)
def test_the_price_is_what_the_optimizer_takes(drawn: list[tuple[int, ...]], rank: int, optimizer: str) -> None:
    shapes = {f"p{number}": shape for number, shape in enumerate(drawn)}
    routes = routes_by_name(make_config(optimizer, rank=rank), shapes)
    states = ParamStates({name: route.spec for name, route in routes.items()}, device=torch.device("cpu")).named()
    for name, route in routes.items():
        own = {key: tensor for key, tensor in states.items() if key.startswith(f"{name}/")}
        bases = {key: tensor for key, tensor in own.items() if "/basis" in key}
        assert route.projection_bytes == sum(tensor.nbytes for tensor in bases.values())
        assert route.state_bytes == sum(tensor.nbytes for tensor in own.values()) - route.projection_bytes
        if route.rule == "galore":
            (basis,) = bases.values()
            assert tuple(basis.shape) == basis_shape((shapes[name][0], shapes[name][1]), rank)


QWEN2_05B: dict[str, tuple[int, ...]] = {"embed": (151936, 896), "norm": (896,)}
for layer in range(24):
    QWEN2_05B |= {
        f"{layer}.{name}": shape
        for name, shape in {
            "q": (896, 896),
            "q.bias": (896,),
            "k": (128, 896),
            "k.bias": (128,),
            "v": (128, 896),
            "v.bias": (128,),
            "o": (896, 896),
            "gate": (4864, 896),
            "up": (4864, 896),
            "down": (896, 4864),
            "norm1": (896,),
            "norm2": (896,),
        }.items()
    }


@pytest.mark.parametrize(
    ("optimizer", "limit_bytes"),
    [
        ({"type": "galore", "state_bits": 8}, 0.20e9),
        ({"type": "galore", "state_bits": 8, "galore": {"projection_bits": 4}}, 0.165e9),
        ({"type": "apollo_mini", "state_bits": 8}, 0.0019e9),
        ({"type": "scale"}, 0.55e9),  # the head's momentum, in float32
    ],
)
def test_the_state_of_half_a_billion_parameters_is_small(optimizer: dict[str, Any], limit_bytes: float) -> None:
    """Qwen2-0.5B at rank 128, projections and embedding included; AdamW takes 3.95 GB."""

    def state_bytes(config: dict[str, Any]) -> int:
        routes = make_routes(RunConfig.model_validate({"optimizer": config}), QWEN2_05B, "embed")
        return sum(route.state_bytes + route.projection_bytes for route in routes)

    assert 0.9 * limit_bytes < state_bytes(optimizer) <= limit_bytes
    assert state_bytes({"type": "adamw"}) == 8 * 494_032_768


FROZEN_LAYERS = {"quantization": {"load_in_8bit": True, "backend": "bitsandbytes"}}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", ["galore", "adamw", "sophia", "apollo", "scale"])
def test_bitsandbytes_freezes_the_layers_matrices_and_adamw_trains_the_rest(optimizer: str, tied: bool) -> None:
    architecture = find_architecture(tiny_model("qwen2", tied=tied))
    shapes = {name: tuple(shape) for name, shape in architecture.parameter_shapes().items()}
    config = RunConfig.model_validate({**FROZEN_LAYERS, "optimizer": {"type": optimizer, "state_bits": 8}})
    for route in make_routes(config, shapes, architecture.head_name, architecture.linear_names()):
        frozen = ".layers." in route.name and len(route.shape) == 2
        assert (route.name, route.shape) in shapes.items()
        assert route.trained is not frozen
        if frozen:
            m, n = route.shape
            assert (route.rule, route.format, route.weight_bytes) == ("frozen", "bnb8", m * n + 4 * m)
            assert (route.spec, route.side, route.state_bytes, route.projection_bytes) == (None, None, 0, 0)
        else:
            assert route.spec is not None and route.spec.subspace is None
            assert (route.rule, route.format, route.spec.learning_rate) == ("adamw", "fp32", 2e-4)
            assert route.spec.state_bits == (8 if route.num_elements >= 4096 else 32)
        assert set(route.to_json()) == set(make_routes(RunConfig(), {"w": (4, 4)})[0].to_json())


def test_what_bitsandbytes_leaves_is_trained_at_the_rate_that_was_asked_for() -> None:
    config = RunConfig.model_validate({**FROZEN_LAYERS, "training": {"learning_rate": 0.01}})
    embed, _ = make_routes(config, {"embed": (320, 64), "q": (64, 64)}, "embed", ["q"])
    assert embed.spec is not None and embed.spec.learning_rate == 0.01
