"""What streaming moves and what that costs: numbers that were worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from planning import asked, tiny_planner
from sophia_galore.memory.planner import Planner
from sophia_galore.memory.transfers import USUAL, Machine, Transfers, measure, transfers_of
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec
from sophia_galore.plan.placements import Parts, Streamed, lay_out
from sophia_galore.plan.route import Route
from sophia_galore.streaming.units import Placement, Unit
from sophia_galore.weights.safetensors_layout import FileLayout

MACHINE = Machine(
    flops=1e6, host_bytes_per_s=1000.0, disk_read_bytes_per_s=500.0, disk_write_bytes_per_s=250.0, measured=True
)
PARTS = Parts(("layer",), "embed", "head")
INSIDE = {"layer": ("layer.q", "layer.norm"), "embed": ("embed",), "head": ("head",)}
NOTHING = {"weights": FileLayout.of({}), "state": FileLayout.of({})}


def route(name: str, shape: tuple[int, ...], weight_bytes: int, *, rank: int = 0, late: bool = False) -> Route:
    """A trained parameter with AdamW's two moments in float32, projected if there is a rank."""
    subspace = SubspaceSpec(rank, 10, folds_late=late) if rank else None
    spec = ParamSpec(name, shape, 1e-3, 0.0, Hyper(), subspace=subspace)
    return Route(name, shape, spec, "fp32", weight_bytes, "adamw", "a test")


def frozen(name: str, shape: tuple[int, ...], weight_bytes: int) -> Route:
    return Route(name, shape, None, "fp32", weight_bytes, "frozen", "a test")


# 32 x 4 bytes, with two moments as large; 8 x 4 bytes likewise; 64 and 48 elements in two bytes each.
ROUTES = (
    route("embed", (8, 8), 128),
    route("layer.q", (4, 8), 128),
    route("layer.norm", (8,), 32),
    route("head", (6, 8), 96),
)


def streamed(**placements: Placement) -> Streamed:
    units = tuple(Unit(name, place, NOTHING) for name, place in placements.items())
    return Streamed(PARTS, units, INSIDE)


def test_a_layer_is_read_twice_and_written_once() -> None:
    found = transfers_of(streamed(layer="host"), ROUTES, 10, MACHINE)
    # Weights of 160 bytes in forward and backward, moments of 2 x 160; both are written back.
    assert (found.read_bytes, found.written_bytes, found.disk_written_bytes) == (2 * 160 + 320, 480, 0)
    assert found.move_s == pytest.approx(640 / 1000 + 480 / 1000)
    # 152 parameters, 8 operations each, 10 tokens.
    assert found.compute_s == pytest.approx(8 * 152 * 10 / 1e6)
    # 1.12 s of copies, 0.001216 s a token: 921.05 tokens.
    assert found.hidden_from_tokens == 922


def test_an_embedding_is_read_once_and_a_head_three_times() -> None:
    embed = transfers_of(streamed(embed="host"), ROUTES, 1, MACHINE)
    assert (embed.read_bytes, embed.written_bytes) == (128 + 2 * 256, 128 + 512)
    head = transfers_of(streamed(head="host"), ROUTES, 1, MACHINE)
    assert (head.read_bytes, head.written_bytes) == (3 * 96 + 2 * 192, 96 + 384)
    tied = replace(streamed(embed="host"), parts=Parts(("layer",), "embed", "embed"))
    assert transfers_of(tied, ROUTES, 1, MACHINE).read_bytes == 3 * 128 + 2 * 256, "it is the head as well"


def test_each_place_has_its_own_speed() -> None:
    found = transfers_of(streamed(embed="host", layer="disk"), ROUTES, 1, MACHINE)
    assert found.read_bytes == 640 + 640 and found.written_bytes == 640 + 480
    assert found.disk_written_bytes == 480, "what wears a disk"
    assert found.move_s == pytest.approx(640 / 1000 + 640 / 1000 + 640 / 500 + 480 / 250)


def test_a_basis_is_read_and_not_written_back_and_a_frozen_weight_neither() -> None:
    # Rank 2 of (4, 8): moments of (2, 8) twice, a basis of (4, 2), in float32.
    (projected,) = routes = (route("layer.q", (4, 8), 128, rank=2),)
    counters = projected.state_bytes - 2 * 64
    assert projected.projection_bytes == 32 and 0 <= counters <= 16
    only = replace(streamed(layer="host"), inside={"layer": ("layer.q",)})
    found = transfers_of(only, routes, 1, MACHINE)
    assert found.read_bytes == 2 * 128 + 128 + counters + 32
    assert found.written_bytes == 128 + 128 + counters
    still = transfers_of(only, (frozen("layer.q", (4, 8), 128),), 1, MACHINE)
    assert (still.read_bytes, still.written_bytes) == (2 * 128, 0)


def test_a_weight_with_a_late_update_is_not_written_in_each_step() -> None:
    only = replace(streamed(layer="disk"), inside={"layer": ("layer.q",)})
    routes = {late: (route("layer.q", (4, 8), 32, rank=2, late=late),) for late in (True, False)}
    late, now = (transfers_of(only, routes[late], 1, MACHINE) for late in (True, False))
    assert late.written_bytes == late.disk_written_bytes == routes[True][0].state_bytes
    assert now.written_bytes == routes[False][0].state_bytes + 32


def test_where_nothing_streams_nothing_moves() -> None:
    assert transfers_of(Streamed(PARTS), ROUTES, 3, MACHINE) == Transfers(
        0, 0, 0, 0.0, pytest.approx(8 * 152 * 3 / 1e6), 0
    )


@pytest.fixture(scope="module")
def planner() -> Planner:
    return tiny_planner(num_layers=2)


def test_state_without_which_a_weight_can_not_be_read_is_read_as_often(planner: Planner) -> None:
    decided = planner.decide(asked({"quantization.enabled": True, "quantization.fold": "refresh"}))
    name = planner.parts.layers[0]
    found = lay_out(decided, planner.parts, {name: "host"})
    (unit,) = found.units
    early = sum(unit.layouts["state"].spans[key].num_bytes for key in unit.early)
    assert early > 0
    read = transfers_of(found, decided.routes, 1, MACHINE).read_bytes
    inside = [one for one in decided.routes if one.name.startswith(f"{name}.")]
    once = sum(one.weight_bytes + one.state_bytes + one.projection_bytes for one in inside)
    assert read == once + sum(one.weight_bytes for one in inside) + early


@pytest.mark.parametrize("values", [{}, {"model.store": "bf16"}, {"optimizer.type": "adamw"}], ids=str)
def test_from_the_number_of_tokens_on_that_is_said_copies_are_hidden(values: dict[str, Any], planner: Planner) -> None:
    decided = planner.decide(asked(values))
    everything = lay_out(decided, planner.parts, dict.fromkeys(planner.parts.order, "host"))
    tokens = transfers_of(everything, decided.routes, 1, USUAL).hidden_from_tokens
    hidden, not_yet = (transfers_of(everything, decided.routes, count, USUAL) for count in (tokens, tokens - 1))
    assert hidden.compute_s >= hidden.move_s and not_yet.compute_s <= not_yet.move_s
    assert hidden.move_s == not_yet.move_s


def test_a_machine_is_measured_and_leaves_nothing_behind(tmp_path: Path) -> None:
    found = measure(torch.device("cpu"), torch.float32, tmp_path)
    assert found.measured and not USUAL.measured and list(tmp_path.iterdir()) == []
    rates = (found.flops, found.host_bytes_per_s, found.disk_read_bytes_per_s, found.disk_write_bytes_per_s)
    assert all(rate > 1e6 for rate in rates)
    with pytest.raises(FileNotFoundError):
        measure(torch.device("cpu"), torch.float32, tmp_path / "not here")
