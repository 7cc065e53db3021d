"""The ladder, and the way down it and back: over a planner whose peaks are arithmetic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sophia_galore.config.check import check
from sophia_galore.config.dump import changed, flatten
from sophia_galore.config.schema import RunConfig
from sophia_galore.errors import ConfigError
from sophia_galore.memory.budget import Budget
from sophia_galore.memory.fitting import Fit, advice, as_overrides, find_settings
from sophia_galore.memory.forecast import Forecast
from sophia_galore.memory.ladder import RUNGS, SHORTER, slowdown
from sophia_galore.plan.placements import Parts, Streamed
from sophia_galore.streaming.units import Unit
from sophia_galore.weights.safetensors_layout import FileLayout

NUM_LAYERS = 4
KEPT, PLACEMENT = "engine.keep_layers", "memory.placement"
PARTS = Parts(("layer",), "embed", "embed")
INPUTS = 20
"""Bytes of layer inputs in host memory."""


def standing(config: RunConfig) -> int:
    """Bytes of weights, states and bases."""
    form = 1 if config.quantization.int8 else {"fp32": 4, "bf16": 2}[config.model.store]
    galore = config.optimizer.galore
    state = galore.rank * config.optimizer.state_bits // 8
    bases = galore.rank * galore.projection_bits // 8
    return 10_000 * form + 2 * state + bases


def elsewhere(config: RunConfig) -> int:
    """The half of them that streams."""
    return standing(config) // 2 if config.memory.placement in ("host", "disk") else 0


def needed(config: RunConfig, keep_layers: int) -> int:
    """Bytes of a run on the device, each part of which one rung makes smaller."""
    tile = config.memory.logits_chunk_mib or 80
    rows, length = config.training.batch_size, config.training.max_length
    gradients = 0 if config.engine.full_gradients == "matrix" else 20
    inputs = 30 if config.memory.activations == "device" else 10
    stays = standing(config) - elsewhere(config)
    return stays + rows * length * (1 + keep_layers) + 10 * tile + gradients + inputs


class Arithmetic:
    """A planner whose forecasts take no time."""

    num_layers = NUM_LAYERS

    def __init__(
        self, limit: int | None = None, forbidden: tuple[str, Any] = ("", None), *, is_standing_known: bool = False
    ) -> None:
        self.limit, self.forbidden, self.is_standing_known = limit, forbidden, is_standing_known

    def streamed(self, config: RunConfig) -> Streamed:
        check(config)
        place = config.memory.placement
        if place not in ("host", "disk"):
            return Streamed(PARTS)
        weights = FileLayout.of({"weight": (torch.uint8, (elsewhere(config),))})
        return Streamed(PARTS, (Unit("layer", place, {"weights": weights, "state": FileLayout.of({})}),))

    def host_limit_bytes(self, config: RunConfig) -> int | None:
        return config.memory.host_limit

    def input_bytes(self, config: RunConfig) -> int:
        return 0 if config.memory.activations == "device" else INPUTS

    def forecast(self, config: RunConfig, keep_layers: int, streamed: Streamed) -> Forecast:
        key, value = self.forbidden
        if key and flatten(config)[key] == value:
            raise ConfigError("That is not possible.", "Do without.")
        return Forecast(needed(config, keep_layers), {}, {}, (), 1, keep_layers)

    def standing_bytes(self, config: RunConfig, streamed: Streamed) -> int:
        self.forecast(config, 0, streamed)  # forbids what that forbids
        return needed(changed(config, {"training.max_length": 0}), 0) if self.is_standing_known else 0

    def budget(self, config: RunConfig) -> Budget | None:
        return None if self.limit is None else Budget(self.limit)

    def keep_layers(self, config: RunConfig, streamed: Streamed) -> int:
        if not config.training.gradient_checkpointing:
            return NUM_LAYERS
        asked = config.engine.keep_layers
        if asked == "auto":
            return 0 if streamed.units else NUM_LAYERS
        return min(asked, NUM_LAYERS)

    def full_gradients(self, config: RunConfig) -> str:
        return config.engine.full_gradients.replace("auto", "layer")

    def most_kept_layers(self, config: RunConfig, budget: Budget) -> int:
        return next((n for n in range(NUM_LAYERS, 0, -1) if budget.fits(needed(config, n))), 0)


def config_of(**values: Any) -> RunConfig:
    """Return a configuration; all stays on the device, unless something else is said."""
    asked = {
        PLACEMENT: "device",
        "training.batch_size": 4,
        "training.gradient_accumulation_steps": 1,
        KEPT: 2,
        **values,
    }
    if not asked.get("training.gradient_checkpointing", True):
        asked.pop(KEPT)  # the two contradict
    return changed(RunConfig(), asked)


def fit(config: RunConfig, limit: int, *, may_shorten: bool = False, **more: Any) -> Fit:
    planner: Any = Arithmetic(**more)
    return find_settings(planner, config, Budget(limit), may_shorten=may_shorten)


def peak(**values: Any) -> int:
    config = config_of(**values)
    return needed(config, int(config.engine.keep_layers))


# ---- the ladder


def test_the_rungs_are_in_the_documented_order() -> None:
    names = "kept layers, micro-batch, logits, full gradients, host memory, layer inputs, weight format, state bits"
    assert [rung.name for rung in RUNGS] == [*names.split(", "), "projection bits", "disk", "rank"]
    assert SHORTER.name == "max_length"


STEPS: dict[str, list[dict[str, Any]]] = {
    "kept layers": [{KEPT: 0, "training.gradient_checkpointing": True}],
    "micro-batch": [
        {"training.batch_size": 2, "training.gradient_accumulation_steps": 2},
        {"training.batch_size": 1, "training.gradient_accumulation_steps": 4},
    ],
    "logits": [{"memory.logits_chunk_mib": 16}, {"memory.logits_chunk_mib": 4}],
    "full gradients": [{"engine.full_gradients": "matrix"}],
    "host memory": [{PLACEMENT: "host"}],
    "layer inputs": [{"memory.activations": "host"}],
    "weight format": [{"model.store": "bf16"}, {"quantization.enabled": True}],
    "state bits": [{"optimizer.state_bits": 16}, {"optimizer.state_bits": 8}],
    "projection bits": [{"optimizer.galore.projection_bits": 4}],
    "disk": [{PLACEMENT: "disk"}],
    "rank": [{"optimizer.galore.rank": rank} for rank in (64, 32, 16, 8)],
}


@pytest.mark.parametrize("rung", RUNGS, ids=[rung.name for rung in RUNGS])
def test_a_rung_offers_step_after_step_and_then_nothing(rung: Any) -> None:
    config, offered = config_of(**{"optimizer.galore.rank": 128, PLACEMENT: "auto"}), []
    while (changes := rung.step(config)) is not None:
        offered.append(changes)
        config = changed(config, changes)
    assert offered == STEPS[rung.name]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("micro-batch", {"training.batch_size": 9}, {"training.batch_size": 3}),  # the smallest factor
        ("micro-batch", {"training.batch_size": 7}, {"training.batch_size": 1}),
        ("logits", {"memory.logits_chunk_mib": 8}, {"memory.logits_chunk_mib": 4}),
        ("logits", {"memory.logits_chunk_mib": 2}, None),
        ("kept layers", {KEPT: "auto"}, {KEPT: 0}),
        ("kept layers", {KEPT: 0, "training.gradient_checkpointing": False}, {KEPT: 0}),
        ("full gradients", {"optimizer.type": "adamw"}, None),
        ("full gradients", {"optimizer.galore.residual": "fira"}, None),
        ("full gradients", {"engine.full_gradients": "layer"}, {"engine.full_gradients": "matrix"}),
        ("projection bits", {"optimizer.type": "adamw"}, None),
        ("projection bits", {"optimizer.galore.subspace": "random"}, None),
        ("rank", {"optimizer.type": "adamw"}, None),
        ("rank", {"optimizer.type": "apollo"}, {"optimizer.apollo.rank": 64}),
        ("rank", {"optimizer.galore.rank": 15}, None),
        ("weight format", {"quantization.load_in_8bit": True}, None),
        ("host memory", {PLACEMENT: "device"}, None),  # that was asked for
        ("host memory", {PLACEMENT: "disk"}, None),
        ("disk", {PLACEMENT: "device"}, None),
        ("disk", {PLACEMENT: "host"}, {PLACEMENT: "disk"}),
        ("disk", {PLACEMENT: "disk"}, None),
    ],
)
def test_what_a_rung_looks_at(name: str, values: dict[str, Any], expected: dict[str, Any] | None) -> None:
    (rung,) = [rung for rung in RUNGS if rung.name == name]
    changes = rung.step(config_of(**values))
    assert (changes is None) if expected is None else (changes is not None and changes | expected == changes)


@pytest.mark.parametrize(
    ("values", "costs"),
    [
        ({}, False),
        ({"training.max_grad_norm": 1.0}, True),
        ({"optimizer.galore.fast_path": "never"}, True),
        ({"training.max_grad_norm": 1.0, "optimizer.galore.residual": "fira"}, False),
        ({"training.max_grad_norm": 1.0, "optimizer.type": "adamw"}, False),
    ],
)
def test_full_gradients_apart_take_time_where_every_step_forms_them(values: dict[str, Any], costs: bool) -> None:
    together, apart = (config_of(**values, **{"engine.full_gradients": each}) for each in ("layer", "matrix"))
    assert (slowdown(together, apart, NUM_LAYERS) > 1.0) == costs


# ---- down and back up


def test_what_fits_is_left_alone_but_for_layers_that_may_keep_their_graphs() -> None:
    config = config_of(**{KEPT: NUM_LAYERS})
    found = fit(config, peak(**{KEPT: NUM_LAYERS}))
    assert found.config == config and found.changes == {} and [each.name for each in found.tries] == ["as asked"]
    assert found.tries[0].fits and found.tries[0].slowdown == 1.0
    more = fit(config_of(), 10**9)
    assert more.changes == {KEPT: NUM_LAYERS}
    assert [each.name for each in more.tries] == ["as asked", "kept layers (rest)"]


def test_it_stops_as_soon_as_it_fits() -> None:
    found = fit(config_of(), peak(**{KEPT: 0}))
    assert found.changes == {KEPT: 0}
    names = [each.name for each in found.tries]
    assert names == ["as asked", "kept layers"] and [each.fits for each in found.tries] == [False, True]


def test_down_the_ladder_rung_after_rung() -> None:
    lightest = {
        **{key: value for steps in STEPS.values() for changes in steps for key, value in changes.items()},
        "optimizer.galore.rank": 8,
    }
    limit = peak(**lightest)
    # The host's memory is too small for what streams, however small that becomes.
    asked = {"optimizer.galore.rank": 128, PLACEMENT: "auto", "memory.host_limit": 3000}
    found = fit(config_of(**asked), limit)
    order = [each.name for each in found.tries[1:] if "back" not in each.name]
    expected = [name for name, steps in STEPS.items() for _ in steps]
    assert order == expected, "each for as long as it has something to offer"
    excesses = [each.need.excess_bytes for each in found.tries[: 1 + len(expected)]]
    assert excesses == sorted(excesses, reverse=True) and excesses[-1] == 0
    assert found.config is not None and found.changes.items() >= {"optimizer.galore.rank": 8, KEPT: 0}.items()


def test_what_was_not_needed_is_given_back() -> None:
    # Smaller pieces and tiles do not help enough; half of the weights does, and leaves room for whole micro-batches.
    limit = peak(**{"model.store": "bf16", KEPT: 0})
    found = fit(config_of(**{KEPT: 0}), limit)
    assert found.changes == {"model.store": "bf16"}
    names = [each.name for each in found.tries]
    assert "micro-batch" in names and "micro-batch (back)" in names and "logits (back)" in names
    assert found.forecast.peak_bytes <= limit


def test_room_that_is_left_goes_to_kept_layers() -> None:
    found = fit(config_of(**{KEPT: "auto"}), peak(**{KEPT: 1}) + 5)
    assert found.config is not None and found.config.engine.keep_layers == 1
    assert found.tries[-1].name == "kept layers (rest)" and found.tries[-1].fits


@pytest.mark.parametrize("may_shorten", [False, True])
def test_examples_are_made_shorter_only_if_that_is_allowed(may_shorten: bool) -> None:
    found = fit(config_of(), 10_300, may_shorten=may_shorten)
    shortened = any(each.name == "max_length" for each in found.tries)
    assert shortened == may_shorten == (found.config is not None)
    if found.config is None:
        assert found.forecast.peak_bytes > 10_300 and found.changes["optimizer.galore.rank"] == 8


def test_where_nothing_fits_there_are_no_settings() -> None:
    found = fit(config_of(), 10, may_shorten=True)
    assert found.config is None and not any(each.fits for each in found.tries)
    assert found.forecast.peak_bytes == min(each.need.peak_bytes for each in found.tries)


def test_what_other_settings_forbid_is_passed_over() -> None:
    found = fit(config_of(), 20_900, forbidden=("quantization.enabled", True))
    assert found.changes.get("model.store") == "bf16" and "quantization.enabled" not in found.changes


def test_what_stays_may_be_too_much_already_and_then_nothing_is_simulated() -> None:
    limit = peak(**{"model.store": "bf16", KEPT: 0})
    known = fit(config_of(**{KEPT: 0}), limit, is_standing_known=True)
    assert [each.need.is_known for each in known.tries if each.name in ("as asked", "micro-batch", "logits")] == [
        False
    ] * 5
    assert known.tries[0].need.peak_bytes < needed(config_of(**{KEPT: 0}), 0), "at least so much"
    simulated = fit(config_of(**{KEPT: 0}), limit)
    assert known.changes == simulated.changes and known.forecast == simulated.forecast


# ---- two memories


def room(**values: Any) -> int:
    """Bytes of host memory that the streaming half of a configuration takes."""
    return Arithmetic().streamed(config_of(**values)).bytes_in("host")


def test_layers_go_to_host_memory_before_weights_become_coarser() -> None:
    asked: dict[str, Any] = {KEPT: 0, PLACEMENT: "auto", "memory.logits_chunk_mib": 4, "training.batch_size": 1}
    asked["engine.full_gradients"] = "matrix"
    limit = peak(**{**asked, PLACEMENT: "host"})
    found = fit(config_of(**asked), limit)
    assert found.changes == {PLACEMENT: "host"}
    last = found.tries[-1]
    assert (last.name, last.need.peak_bytes, last.need.excess_bytes) == ("host memory", limit, 0)
    assert last.need.host_bytes == room(**{**asked, PLACEMENT: "host"}) > 0 and last.fits
    assert found.estimate.streamed.placements == {"layer": "host"} and found.estimate.fits


def test_without_memory_of_the_host_layers_go_to_disk_and_only_after_coarser_weights() -> None:
    asked = {KEPT: 0, PLACEMENT: "auto", "memory.host_limit": 0}
    found = fit(config_of(**asked), 9_000)
    names = [each.name for each in found.tries]
    assert "host memory" not in names and names.index("disk") > names.index("weight format")
    assert found.config is not None and found.config.memory.placement == "disk"
    assert found.tries[-1].need.host_bytes == 0 and found.config.quantization.enabled


def test_what_is_beyond_the_hosts_memory_counts_as_what_is_beyond_the_devices() -> None:
    asked = {KEPT: 0, PLACEMENT: "host"}
    there = room(**asked)
    for spare in (0, -1, -500):
        found = fit(config_of(**asked, **{"memory.host_limit": there + spare}), 10**6)
        first = found.tries[0]
        assert (first.need.host_bytes, first.need.excess_bytes, first.fits) == (there, -spare, spare == 0)
        assert found.config is not None, "coarser weights take less there too"
        assert found.estimate.host_excess_bytes == 0 and found.estimate.streamed.bytes_in("host") <= there + spare
    both = fit(config_of(**asked, **{"memory.host_limit": there - 7}), peak(**asked) - 11)
    assert both.tries[0].need.excess_bytes == 18


def test_nothing_is_given_back_that_the_host_has_no_room_for() -> None:
    smaller = {PLACEMENT: "host", "model.store": "bf16", "optimizer.state_bits": 8}
    asked = {KEPT: 0, PLACEMENT: "auto", "optimizer.galore.rank": 4096}
    host_limit = room(**{**asked, **smaller}) + INPUTS  # which are there until they are given back
    found = fit(
        config_of(**asked, **{"memory.host_limit": host_limit}), 36_000, forbidden=("quantization.enabled", True)
    )
    assert found.changes == smaller, "smaller pieces, tiles and gradients were not needed in the end"
    names = [each.name for each in found.tries]
    assert "micro-batch (back)" in names and "weight format (back)" not in names
    finer = changed(found.config or RunConfig(), {"model.store": "fp32"})
    assert needed(finer, 0) <= 36_000 and Arithmetic().streamed(finer).bytes_in("host") > host_limit


def test_on_disk_no_finer_format_comes_back() -> None:
    # The rank is lowered after the layers went to disk, so less than int8 would have been enough on the device.
    asked = {KEPT: 0, PLACEMENT: "auto", "memory.host_limit": 0, "optimizer.galore.rank": 4096}
    lightest = {"quantization.enabled": True, "optimizer.state_bits": 8, "optimizer.galore.projection_bits": 4}
    limit = peak(**{**asked, **lightest, PLACEMENT: "disk", "optimizer.galore.rank": 2048})
    found = fit(config_of(**asked), limit)
    names = [each.name for each in found.tries]
    assert found.config is not None and found.config.memory.placement == "disk" and "rank" in names
    assert not {"weight format (back)", "state bits (back)", "projection bits (back)"} & set(names)
    finer = changed(found.config, {"optimizer.galore.projection_bits": 32})
    assert needed(finer, 0) <= 10**6, "only the bytes that each step would move speak against it"


def test_layers_that_stream_keep_no_graphs_of_their_own() -> None:
    asked = {KEPT: "auto", PLACEMENT: "host"}
    found = fit(config_of(**asked), 10**9)
    assert found.changes == {} and [each.name for each in found.tries] == ["as asked"]
    assert found.forecast.keep_layers == 0


def test_what_contradicts_layers_that_stream_does_not_come_back() -> None:
    # Layers whose graphs are kept can't stream, so activation checkpointing stays on once layers are in host memory.
    asked = {"training.gradient_checkpointing": False, PLACEMENT: "auto", "training.batch_size": 1}
    found = fit(config_of(**asked), 22_000)
    assert found.config is not None and found.config.memory.placement == "host"
    assert found.config.training.gradient_checkpointing and found.tries[-1].fits


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 16),
    length=st.integers(8, 2048),
    kept=st.integers(0, 6) | st.just("auto"),
    rank=st.integers(1, 512),
    limit=st.integers(0, 100_000),
    may_shorten=st.booleans(),
    placement=st.sampled_from(["device", "auto", "host", "disk"]),
    host_limit=st.none() | st.integers(0, 30_000),
    checkpointing=st.booleans(),
)
def test_a_result_fits_and_its_changes_lead_to_it(
    rows: int,
    length: int,
    kept: Any,
    rank: int,
    limit: int,
    may_shorten: bool,
    placement: str,
    host_limit: int | None,
    checkpointing: bool,
) -> None:
    values = {"training.batch_size": rows, "training.max_length": length, KEPT: kept, "optimizer.galore.rank": rank}
    values |= {PLACEMENT: placement, "memory.host_limit": host_limit}
    values["training.gradient_checkpointing"] = checkpointing or placement in ("host", "disk")
    config = config_of(**values)
    found = fit(config, limit, may_shorten=may_shorten)
    if found.config is None:
        assert found.forecast.peak_bytes > limit or found.estimate.host_excess_bytes
        return
    assert found.estimate.fits and found.estimate.streamed.bytes_in("host") <= (host_limit or 10**6)
    assert found.config.memory.placement == placement or placement in ("auto", "host")
    assert changed(config, found.changes) == found.config
    assert found.forecast.peak_bytes <= limit and found.tries[-1].fits
    streams = found.config.memory.placement in ("host", "disk")
    if kept == "auto" and not streams and found.config.training.gradient_checkpointing:
        assert found.config.engine.keep_layers != "auto"
    layers = found.config.engine.keep_layers
    layers = layers if found.config.training.gradient_checkpointing else NUM_LAYERS
    assert needed(found.config, 0 if layers == "auto" else min(layers, NUM_LAYERS)) <= limit
    size, asked = found.config.training, config.training
    assert size.batch_size * size.gradient_accumulation_steps == asked.batch_size, "the same effective batch"
    assert may_shorten or size.max_length == length
    assert all(math.isfinite(each.slowdown) and each.slowdown > 0 for each in found.tries)


# ---- in words


def words(config: RunConfig, limit: int | None) -> str:
    planner: Any = Arithmetic(limit)
    return advice(planner, config)


def test_settings_that_fit_are_said_as_the_command_line_takes_them() -> None:
    limit = peak(**{"model.store": "bf16", KEPT: 0})
    told = words(config_of(**{KEPT: 0, "memory.logits_chunk_mib": 4}), limit - 760)
    assert told == "These settings are expected to fit, with 23 KiB: model.store=bf16."


def test_where_none_fit_it_is_said_what_would() -> None:
    told = words(config_of(), 10)
    assert told.startswith("No settings fit into memory.limit: with ") and "Raise memory.limit to " in told


def test_where_all_should_fit_something_else_takes_memory() -> None:
    told = words(config_of(**{KEPT: NUM_LAYERS}), 10**6)
    assert told.startswith("By the plan ") and "set memory.reserve, or lower " in told


def test_without_a_limit_there_is_the_usual_advice() -> None:
    assert words(config_of(), None).startswith("Lower ")


def test_values_are_written_as_yaml() -> None:
    changes = {"a.b": 3, "c": True, "d": None, "e": "bf16", "f": 0.5}
    assert as_overrides(changes) == "a.b=3 c=true d=null e=bf16 f=0.5"
