"""The table of verdicts on parameters: a case for every row, and what holds for parameters of any shape."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sophia_galore.config.schema import RunConfig
from sophia_galore.engine.proof import Proof
from sophia_galore.errors import ConfigError
from sophia_galore.model.find_parts import find_architecture
from sophia_galore.optim.spec import state_bytes
from sophia_galore.plan.detect import parameter_facts
from sophia_galore.plan.facts import Facts, Param
from sophia_galore.plan.parameters import REMARKS, ROUTES, route_of
from sophia_galore.plan.routes import make_routes, route_all
from tiny import FAMILIES, tiny_model

BNB = {"load_in_8bit": True, "backend": "bitsandbytes"}
INT8 = {"load_in_8bit": True}

LINEAR = Param("layers.0.q", (64, 96), is_linear=True)
SMALL = Param("layers.0.k", (8, 96), is_linear=True)
NORM = Param("layers.0.norm", (64,))
EMBED = Param("embed", (320, 64), part="embed", padding_row=2)
TIED = Param("embed", (320, 64), part="embed", is_head=True)
HEAD = Param("head", (320, 64), part="head", is_head=True)
CONV = Param("layers.0.conv", (96, 1, 4))
ROUTER = Param("layers.0.gate", (16, 64), is_linear=True, is_router=True)
HELD = Param("layers.0.table", (64, 64), requires_grad=False)
IDLE = Param("layers.0.idle", (64, 96), inner="idle")
UNREACHED = Proof(unreached=("idle",))


def facts(
    kind: str = "galore",
    *,
    quantization: Mapping[str, Any] | None = None,
    bits: int = 32,
    trainable: tuple[str, ...] | None = None,
    proof: Proof | None = None,
) -> Facts:
    settings = {"type": kind, "state_bits": bits, "galore": {"rank": 8}, "apollo": {"rank": 8}}
    asked = {"optimizer": settings, "quantization": dict(quantization or {}), "training": {"trainable": trainable}}
    return Facts(RunConfig.model_validate(asked), proof=proof)


# Row -> (facts and parameter of which it speaks, what it says; the same, one step away, of which it does not).
CASES: dict[str, tuple[list[tuple[Facts, Param]], str, list[tuple[Facts, Param]]]] = {
    "frozen": (
        [(facts(quantization=BNB), LINEAR), (facts("adamw", quantization=BNB), SMALL)],
        "held in eight bits by bitsandbytes",
        [
            (facts(quantization=BNB), NORM),
            (facts(quantization=BNB), TIED),
            (facts(quantization=BNB), HEAD),
            (facts(quantization=INT8), LINEAR),
            (facts(), LINEAR),
        ],
    ),
    "fixed": (
        [(facts(), HELD), (facts("adamw"), HELD), (facts(proof=UNREACHED), IDLE), (facts(trainable=("*",)), HELD)],
        "the model keeps it as it is: it gets no gradient",
        [(facts(), IDLE), (facts(proof=Proof()), IDLE), (facts(proof=UNREACHED), LINEAR)],
    ),
    "not_trainable": (
        [
            (facts(trainable=("*norm",)), LINEAR),
            (facts("adamw", trainable=("head", "layers.1.*")), NORM),
            (facts(trainable=("layers.0.*",), quantization=INT8), TIED),
            (facts(trainable=("*norm",), quantization=BNB), HEAD),
        ],
        "frozen: not in training.trainable",
        [
            (facts(trainable=("layers.0.*",)), LINEAR),
            (facts(trainable=("lm_head.weight",)), TIED),  # its other name
            (facts(trainable=("head", "*.q")), LINEAR),
            (facts(trainable=("*norm",), quantization=BNB), LINEAR),  # held by bitsandbytes anyway
            (facts(), LINEAR),
        ],
    ),
    "instead": (
        [(facts(kind, quantization=BNB), param) for kind in ("galore", "sophia", "scale") for param in (NORM, HEAD)],
        "is for is frozen",
        [
            (facts("adamw", quantization=BNB), NORM),
            (facts(quantization=BNB), LINEAR),
            (facts(quantization=INT8), NORM),
        ],
    ),
    "adamw": (
        [(facts("adamw"), LINEAR), (facts("adamw"), NORM), (facts("adamw", quantization=BNB), EMBED)],
        "optimizer.type is adamw",
        [(facts(), NORM), (facts(quantization=BNB), NORM)],
    ),
    "sophia": (
        [(facts("sophia"), LINEAR), (facts("sophia"), NORM)],
        "optimizer.type is sophia",
        [(facts(), LINEAR), (facts("sophia", quantization=BNB), NORM)],
    ),
    "vector": (
        [(facts(kind), NORM) for kind in ("galore", "apollo", "scale")],
        "norm or bias",
        [(facts(), LINEAR), (facts("adamw"), NORM), (facts(), CONV)],
    ),
    "not_a_matrix": (
        [(facts(kind), CONV) for kind in ("galore", "apollo", "scale")],
        "no matrix",
        [(facts(), LINEAR), (facts(), NORM), (facts("adamw"), CONV)],
    ),
    "router": (
        [(facts(kind), ROUTER) for kind in ("galore", "apollo", "scale")],
        "chooses experts",
        [(facts(), LINEAR), (facts("adamw"), ROUTER)],
    ),
    "scale_head": (
        [(facts("scale"), HEAD), (facts("scale"), TIED)],
        "head, with momentum",
        [(facts("scale"), EMBED), (facts(), HEAD)],
    ),
    "scale_matrix": ([(facts("scale"), EMBED), (facts("scale"), SMALL)], "no state", [(facts("scale"), HEAD)]),
    "small_side": (
        [(facts(), SMALL), (facts("apollo"), SMALL), (facts(), Param("k", (96, 7)))],
        "a side <= rank 8",
        [(facts(), Param("k", (9, 96))), (facts("scale"), SMALL), (facts("adamw"), SMALL)],
    ),
    "projected": (
        [(facts(), LINEAR), (facts(), HEAD), (facts("apollo"), EMBED), (facts(), Param("k", (9, 96)))],
        "projected, rank 8",
        [(facts(), SMALL), (facts(), NORM), (facts("adamw"), LINEAR)],
    ),
    "tied_head": (
        [(facts(), TIED), (facts("adamw"), TIED), (facts(quantization=BNB), TIED)],
        "embedding and head in one: both gradients, one step",
        [(facts(), EMBED), (facts(), HEAD)],
    ),
    "padding_row": ([(facts(), EMBED)], "no gradient from look-ups of padding, row 2", [(facts(), TIED)]),
    "small_state": (
        [
            (facts(bits=8), NORM),
            (facts(bits=16), NORM),
            (facts("adamw", bits=8), Param("k", (4095,))),
            (facts(bits=8), Param("k", (63, 65))),
        ],
        "state in fp32: fewer than 4096 elements",
        [
            (facts(bits=32), NORM),
            (facts("adamw", bits=8), Param("k", (4096,))),
            (facts("scale", bits=8), Param("k", (63, 65))),  # has no state
            (facts(bits=8, quantization=BNB), SMALL),  # frozen
        ],
    ),
    "skipped": (
        [
            (facts(quantization={**INT8, "skip": ["*q"]}), LINEAR),
            (facts("adamw", quantization={**INT8, "skip": ["*q"]}), LINEAR),
        ],
        "not in eight bits: quantization.skip",
        [
            (facts(quantization={**INT8, "skip": ["*q"]}), SMALL),
            (facts(quantization={**INT8, "skip": ["*"]}), NORM),  # it never is
            (facts(quantization={"skip": ["*q"]}), LINEAR),
        ],
    ),
}


def pairs(place: int) -> list[Any]:
    return [
        pytest.param(key, known, param, id=f"{key}-{number}")
        for key, case in CASES.items()
        for number, (known, param) in enumerate(case[place])
    ]


def test_every_row_has_a_case() -> None:
    assert [row.key for row in (*ROUTES, *REMARKS)] == list(CASES)


@pytest.mark.parametrize(("key", "known", "param"), pairs(0))
def test_the_row_speaks(key: str, known: Facts, param: Param) -> None:
    routing = route_of(known, param)
    assert key in routing.keys and routing.keys[0] in {row.key for row in ROUTES}
    assert any(CASES[key][1] in text for text in (routing.reason, *routing.remarks))


@pytest.mark.parametrize(("key", "known", "param"), pairs(2))
def test_one_step_away_it_does_not(key: str, known: Facts, param: Param) -> None:
    assert key not in route_of(known, param).keys


def test_the_rows_say_what_trains_the_parameter() -> None:
    trains = {
        "frozen": "frozen",
        "fixed": "frozen",
        "not_trainable": "frozen",
        "instead": "adamw",
        "adamw": "adamw",
        "sophia": "sophia",
        "vector": "adamw",
        "not_a_matrix": "adamw",
        "router": "adamw",
        "scale_head": "scale_momentum",
        "scale_matrix": "scale",
        "small_side": "adamw",
        "projected": "projected",
    }
    assert {row.key: row.rule for row in ROUTES} == trains


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_is_in_a_part_and_may_have_a_gradient(family: str, tied: bool) -> None:
    architecture = find_architecture(tiny_model(family, tied=tied))
    params = parameter_facts(architecture)
    assert [param.name for param in params] == list(architecture.parameter_shapes())
    assert all(param.requires_grad for param in params)
    assert [param.part for param in params if param.is_head] == ["embed" if tied else "head"]
    assert {param.part for param in params} == {"embed", "layer", "norm"} | (set() if tied else {"head"})
    linears = [param for param in params if param.is_linear]
    assert linears == [param for param in params if param.part == "layer" and param.is_matrix]


@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=2).map(tuple), min_size=1, max_size=6),
    st.sampled_from(["galore", "adamw", "sophia", "apollo", "apollo_mini", "scale"]),
    st.sampled_from([32, 16, 8]),
    st.sampled_from([{}, INT8, {**INT8, "block_size": 32, "skip": ["p0"]}, BNB]),
    st.integers(1, 70),
)
def test_any_parameter_has_one_route_at_the_price_of_its_state(
    shapes: list[tuple[int, ...]], kind: str, bits: int, quantization: dict[str, Any], rank: int
) -> None:
    settings = {"type": kind, "state_bits": bits, "galore": {"rank": rank}, "apollo": {"rank": rank}}
    config = RunConfig.model_validate({"optimizer": settings, "quantization": quantization})
    params = tuple(Param(f"p{number}", shape, is_linear=len(shape) == 2) for number, shape in enumerate(shapes))
    routes = route_all(Facts(config, parameters=params))
    assert [(route.name, route.shape) for route in routes] == [(param.name, param.shape) for param in params]
    for route in routes:
        matrix = len(route.shape) == 2
        assert route.trained is (route.spec is not None) is not (quantization == BNB and matrix)
        size = state_bytes(route.spec.state_tensors()) if route.spec else 0
        assert route.state_bytes + route.projection_bytes == size
        assert route.spec is None or (route.spec.name, route.spec.shape) == (route.name, route.shape)
        if not route.trained:
            assert (route.format, route.rule, size) == ("bnb8", "frozen", 0)
            assert route.weight_bytes == route.shape[0] * (route.shape[1] + 4)
        elif quantization.get("load_in_8bit") and matrix and quantization != BNB:
            skipped = route.name in quantization.get("skip", ())
            block = quantization.get("block_size", 128)
            small = route.shape[0] * (route.shape[1] + 2 * -(-route.shape[1] // block)) if matrix else 0
            assert route.format == ("fp32" if skipped else "int8")
            assert route.weight_bytes == (4 * route.num_elements if skipped else small)
        else:
            assert (route.format, route.weight_bytes) == ("fp32", 4 * math.prod(route.shape))
        written = json.loads(json.dumps(route.to_json()))
        assert written["trained"] is route.trained and written["why"] == route.why
        assert written["because"] == list(route.because) and len(route.because) == 1 + len(route.remarks)


def test_a_pattern_that_matches_no_weight_is_refused() -> None:
    config = RunConfig.model_validate({"quantization": {**INT8, "skip": ["embed*", "heed*"]}})
    with pytest.raises(ConfigError, match=r"'heed\*' matches no weight") as caught:
        make_routes(config, {"embed.weight": (320, 64)})
    assert "embed.weight" in caught.value.remedy
