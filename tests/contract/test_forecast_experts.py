"""Of many experts a few are simulated: the forecast is that of all of them."""

from __future__ import annotations

from typing import Any

import pytest

from planning import asked, planner_of
from sophia_galore.memory import forecast
from sophia_galore.memory.simulation import ExpertCount, expert_counts, take_layers
from sophia_galore.model.few_experts import with_experts
from tiny import tiny_config

NUM_EXPERTS = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "galore": {},
    "one micro-batch": {"training.gradient_accumulation_steps": 1},
    "int8, states in eight bits": {"quantization.enabled": True, "optimizer.state_bits": 8},
    "adamw": {"optimizer.type": "adamw"},
    "full gradients apart": {"engine.full_gradients": "matrix"},
    "graphs kept": {"engine.keep_layers": 3},
}
# What each expert adds is counted to the byte. The peak of a phase may be at another moment with many experts.
TOLERANCE = 0.01


def config_of(family: str) -> Any:
    config = tiny_config(family)
    whole = getattr(config, "num_experts", None) or config.num_local_experts
    return with_experts(config, whole, NUM_EXPERTS)


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("qwen3_moe", "galore"),
        pytest.param("gpt_oss", "int8, states in eight bits", marks=pytest.mark.thorough),
        *(pytest.param("qwen3_moe", each, marks=pytest.mark.thorough) for each in list(SETTINGS)[1:]),
        *(pytest.param(each, "galore", marks=pytest.mark.thorough) for each in ("olmoe", "mixtral", "lfm2_moe")),
    ],
)
def test_a_few_experts_tell_of_all(family: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each expert has a token, and some have more.
    config = asked({"training.max_length": 24, **SETTINGS[setting]})
    kept = config.engine.keep_layers if isinstance(config.engine.keep_layers, int) else 0
    found = planner_of(config_of(family)).forecast(config, kept)
    seen: list[int] = []
    take = forecast.take_layers

    def taking(*given: Any) -> Any:
        few = take(*given)
        seen.extend(len(weights) for weights in few.architecture.expert_tensors.values())
        return few

    monkeypatch.setattr(forecast, "expert_counts", lambda architecture: None)
    monkeypatch.setattr(forecast, "take_layers", taking)
    expected = planner_of(config_of(family)).forecast(config, kept)
    assert set(seen) == {NUM_EXPERTS}
    assert found.peak_bytes == pytest.approx(expected.peak_bytes, rel=TOLERANCE)
    for phase, size in expected.phases.items():
        assert found.phases[phase] == pytest.approx(size, rel=TOLERANCE), phase


def test_so_many_are_simulated() -> None:
    planner = planner_of(config_of("qwen3_moe"))
    decided = planner.decide(asked())

    def take(experts: ExpertCount | None) -> Any:
        return take_layers(planner.model_config, decided.routes, planner.layer_names, (0, 1), experts)

    counts = expert_counts(take(None).architecture)
    assert counts == (ExpertCount(NUM_EXPERTS, 5), ExpertCount(NUM_EXPERTS, 8))
    few = take(counts[0])
    assert {len(weights) for weights in few.architecture.expert_tensors.values()} == {5}
    routers = [route for route in few.routes if route.name.endswith("gate.weight")]
    assert routers and all(route.shape[0] == 5 == route.spec.shape[0] for route in routers if route.spec)
    of_experts = {route.spec.subspace.offset for route in few.routes if route.spec and route.spec.rests}
    assert of_experts == {0}


def test_few_experts_are_all_simulated() -> None:
    planner = planner_of(tiny_config("qwen3_moe"))
    decided = planner.decide(asked())
    few = take_layers(planner.model_config, decided.routes, planner.layer_names, (0, 1))
    assert few is not None and expert_counts(few.architecture) is None
