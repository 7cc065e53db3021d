"""What a planner says: what is needed, what there is, how many layers run without activation checkpointing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from planning import asked, tiny_planner
from sophia_galore.config import load_config
from sophia_galore.errors import ConfigError
from sophia_galore.memory import planner as planner_module
from sophia_galore.memory.budget import Budget
from sophia_galore.memory.forecast import ModelTrace
from sophia_galore.memory.planner import Planner
from sophia_galore.plan.facts import DeviceFacts, MemoryFacts

MIB = 2**20


@pytest.fixture(scope="module")
def planner() -> Planner:
    """Of a model of seven layers; what it found out serves all tests."""
    return tiny_planner(num_layers=7)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 0),
        (["engine.keep_layers=2"], 2),
        (["engine.keep_layers=99"], 7),
        (["gradient_checkpointing=false"], 7),
        (["gradient_checkpointing=true"], 0),
    ],
)
def test_how_many_layers_run_without_checkpointing(words: list[str], expected: int, planner: Planner) -> None:
    assert planner.keep_layers(load_config(None, words)) == expected


def test_as_many_as_there_is_room_for_takes_a_limit(planner: Planner) -> None:
    with pytest.raises(ConfigError, match=r"memory\.limit leaves room for, but there is no limit") as caught:
        planner.keep_layers(load_config(None, ["engine.keep_layers=auto"]))
    assert "Set memory.limit" in caught.value.remedy


def test_as_many_as_there_is_room_for(planner: Planner) -> None:
    peaks = [planner.forecast(asked(), count).peak_bytes for count in range(8)]
    # The last layer is computed again at once in any case, so without checkpointing it needs no more.
    assert peaks == sorted(peaks) and peaks[1] < peaks[2] < peaks[7]
    for count in (1, 3, 7):
        values = {"engine.keep_layers": "auto", "memory.limit": with_margin(peaks[count])}
        assert planner.keep_layers(asked(values)) == count
        assert planner.keep_layers(asked({**values, "memory.limit": peaks[count]})) == count - 1 or count == 1
    assert planner.keep_layers(asked({"engine.keep_layers": "auto", "memory.limit": peaks[0] - 1})) == 0
    room = with_margin(peaks[7])
    assert planner.most_kept_layers(asked(), Budget(room + MIB, outside_bytes=MIB)) == 7
    assert planner.most_kept_layers(asked(), Budget(peaks[7], outside_bytes=1)) == 6


def with_margin(peak_bytes: int) -> int:
    """What has to be there for layers without checkpointing, which save time only: 1 % more than they need."""
    return math.ceil(peak_bytes / 0.99) + 1


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each model that was traced, whether layers without checkpointing were simulated too."""
    calls: list[bool] = []

    def counting(*given: Any, keep_layers: int, **more: Any) -> ModelTrace:
        calls.append(keep_layers > 0)
        return trace_model(*given, keep_layers=keep_layers, **more)

    trace_model = planner_module.trace_model
    monkeypatch.setattr(planner_module, "trace_model", counting)
    return calls


def test_one_simulation_serves_for_many_limits(counted: list[bool]) -> None:
    planner = tiny_planner(num_layers=2)
    for limit in (1, 2, 3, 4):
        config = asked({"memory.limit": limit * MIB, "memory.reserve": limit, "engine.keep_layers": limit % 2})
        assert planner.forecast(config, 0).peak_bytes > 0
    assert counted == [False]
    for config in (asked({"engine.keep_layers": "auto", "memory.limit": 2 * MIB}), asked()):
        assert planner.most_kept_layers(config, Budget(64 * MIB)) == 2
    assert counted == [False, True]
    planner.forecast(asked({"model.store": "bf16"}), 0)
    assert len(counted) == 3, "another format is another question"


def test_the_estimate_is_what_rules_look_at(planner: Planner) -> None:
    free = planner.estimate(asked())
    assert free is not None and free.fits is None and free.budget is None
    routes = planner.decide(asked()).routes
    assert free.facts(routes) == MemoryFacts(free.forecast.peak_bytes)
    peak = free.forecast.peak_bytes
    estimate = planner.estimate(asked({"memory.limit": peak + 100, "memory.reserve": 100}))
    assert estimate is not None and estimate.fits is True
    assert estimate.facts(routes) == MemoryFacts(peak, peak + 100, 100)
    values = {"memory.limit": peak + 100, "memory.reserve": 101}
    less = planner.estimate(asked(values))  # full gradients one matrix after the other
    assert less is not None and less.forecast.peak_bytes < peak
    assert planner.full_gradients(asked(values)) == less.full_gradients == less.facts(routes).full_gradients == "matrix"
    tight = planner.estimate(asked({**values, "engine.full_gradients": "layer", "memory.placement": "device"}))
    assert tight is not None and tight.fits is False and not tight.streamed.units
    spilled = planner.estimate(asked({**values, "engine.full_gradients": "layer"}))  # a CPU has no other memory
    assert spilled is not None and spilled.fits is True
    assert set(spilled.streamed.placements.values()) == {"disk"} and spilled.facts(routes).disk_written_bytes > 0


@pytest.mark.parametrize(("spare", "excess"), [(0, 0), (-1, 1)])
def test_the_hosts_memory_has_a_limit_of_its_own(spare: int, excess: int, planner: Planner) -> None:
    values = {"memory.placement": "host", "memory.resident_layers": 2}
    config = asked(values)
    there = planner.streamed(config)
    assert there.num_resident_layers == 2 and set(there.placements.values()) == {"host"}
    peak = planner.forecast(config, 0, there).peak_bytes
    host = there.bytes_in("host")
    found = planner.estimate(asked({**values, "memory.limit": peak, "memory.host_limit": host + spare}))
    assert found is not None and found.host_excess_bytes == excess and found.fits is (excess == 0)
    assert found.facts(planner.decide(config).routes).host_excess_bytes == excess


def test_of_frozen_layers_nothing_is_known(planner: Planner) -> None:
    words = {"quantization.enabled": True, "quantization.backend": "bitsandbytes", "optimizer.type": "adamw"}
    assert planner.estimate(asked(words)) is None


def test_without_a_limit_the_cards_size_is_one() -> None:
    planner = tiny_planner(num_layers=1)
    card = replace(planner.facts, device=DeviceFacts("cuda:0", "a card", (8, 0), real_bf16=True, total_bytes=2**33))
    known = replace(planner, facts=card).budget(asked({"memory.reserve": 2**30}))
    assert known == Budget(2**33, 2**30)
    assert planner.budget(asked()) is None


def test_a_forecast_adds_up(planner: Planner) -> None:
    forecast = planner.forecast(asked(), 0)
    assert sum(forecast.categories.values()) == forecast.peak_bytes == max(forecast.phases.values())
    assert forecast.segments[0].phase == "forward" and forecast.segments[-1].phase == "step"
    assert max(segment.peak.total() for segment in forecast.segments) <= forecast.peak_bytes
    assert (
        forecast.phases["load"]
        == sum(forecast.categories[name] for name in ("weights", "optimizer state"))
        + (forecast.categories["projections"])
    )
    # Each layer's forward once, the head twice (and with the embedding's), each backward with its step.
    assert [segment.phase for segment in forecast.segments].count("forward") == 1 + 7
