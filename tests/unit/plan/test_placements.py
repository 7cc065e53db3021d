"""What streams: in which order, from where, how many layers stay, and what is left on the device to the byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from planning import asked, tiny_planner
from sophia_galore.memory.planner import Planner
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.plan.placements import Parts, Streamed, choose, device_bytes, lay_out
from sophia_galore.plan.routes import empty_weight, int8_format
from sophia_galore.streaming.open import open_streaming
from sophia_galore.weights.weight import Weight

CPU = torch.device("cpu")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYERS = tuple(f"model.layers.{number}" for number in range(4))
ANY_HOST: dict[str, Any] = {"host_bytes": None}


@pytest.fixture(scope="module")
def untied() -> Planner:
    return tiny_planner(num_layers=4, tied=False)


@pytest.fixture(scope="module")
def tied() -> Planner:
    return tiny_planner(num_layers=4, tied=True)


def chosen(
    planner: Planner,
    placement: str,
    fits: Callable[[Streamed], bool] | None,
    *,
    host_bytes: int | None = None,
    num_kept: int = 0,
    **more: Any,
) -> Streamed:
    config = asked({"memory.placement": placement, **{f"memory.{key}": value for key, value in more.items()}})
    return choose(planner.decide(config), planner.parts, fits=fits, host_bytes=host_bytes, num_kept=num_kept)


def at_least(count: int) -> Callable[[Streamed], bool]:
    """What fits as soon as so many units stream."""
    return lambda streamed: len(streamed.units) >= count


# ---- which units


def test_the_parts_are_the_layers_and_the_ends(untied: Planner, tied: Planner) -> None:
    assert untied.parts == Parts(LAYERS, EMBED, HEAD) and tied.parts == Parts(LAYERS, EMBED, EMBED)
    assert untied.parts.ends == (EMBED, HEAD) and tied.parts.ends == (EMBED,)
    assert untied.parts.order == (EMBED, *LAYERS, HEAD), "few rows of an embedding are needed, so it goes first"
    assert tied.parts.order == (*LAYERS, EMBED), "as the head, all of them are"


@pytest.mark.parametrize("count", range(1, 7))
def test_units_begin_to_stream_in_that_order(count: int, untied: Planner) -> None:
    found = chosen(untied, "host", at_least(count))
    assert [unit.name for unit in found.units] == list(untied.parts.order[:count])
    assert found.num_resident_layers == min(4, max(0, 5 - count))
    assert set(found.placements.values()) == {"host"}


def test_as_little_as_can_be_streams(untied: Planner) -> None:
    assert chosen(untied, "device", at_least(1)) == Streamed(untied.parts), "as asked, whether that fits or not"
    assert chosen(untied, "auto", None) == Streamed(untied.parts), "there is no limit"
    assert chosen(untied, "auto", at_least(0)) == Streamed(untied.parts)
    assert len(chosen(untied, "host", at_least(0)).units) == 1, "placement host streams something"
    for placement in ("auto", "host", "disk"):
        everything = chosen(untied, placement, lambda _: False)
        assert [unit.name for unit in everything.units] == list(untied.parts.order), "nothing fits: the least there is"


def test_without_a_limit_all_streams_that_may(untied: Planner) -> None:
    assert list(chosen(untied, "host", None).placements) == list(untied.parts.order)
    assert list(chosen(untied, "disk", None, num_kept=1).placements) == [EMBED, *LAYERS[:3], HEAD]


@pytest.mark.parametrize("resident", [0, 1, 3, 4, 99])
def test_so_many_of_the_last_layers_stay_as_is_asked(resident: int, untied: Planner) -> None:
    for fits in (None, at_least(0), lambda _: False):
        found = chosen(untied, "disk", fits, resident_layers=resident)
        staying = min(resident, 4)
        assert list(found.placements) == [EMBED, *LAYERS[: 4 - staying], HEAD]
        assert found.num_resident_layers == staying and set(found.placements.values()) == {"disk"}


def test_layers_whose_graphs_are_kept_stay(untied: Planner) -> None:
    found = chosen(untied, "host", lambda _: False, num_kept=3)
    assert list(found.placements) == [EMBED, LAYERS[0], HEAD] and found.num_resident_layers == 3
    assert list(chosen(untied, "host", None, num_kept=3, resident_layers=1).placements) == [EMBED, LAYERS[0], HEAD]
    assert list(chosen(untied, "auto", lambda _: False, num_kept=4).placements) == [EMBED, HEAD]


# ---- where they live


def test_what_the_host_has_no_room_for_lives_on_disk(untied: Planner) -> None:
    sizes = {unit.name: unit.host_bytes for unit in chosen(untied, "host", None).units}
    room = sizes[EMBED] + 2 * sizes[LAYERS[0]]
    for spare, layers_in_host in ((0, 2), (-1, 1), (sizes[LAYERS[0]] - 1, 2)):
        found = chosen(untied, "auto", at_least(5), host_bytes=room + spare)
        expected = dict.fromkeys((EMBED, *LAYERS), "disk") | dict.fromkeys((EMBED, *LAYERS[:layers_in_host]), "host")
        assert found.placements == expected
        assert found.bytes_in("host") <= room + spare < found.bytes_in("host") + sizes[LAYERS[0]]
        assert found.bytes_in("host") + found.bytes_in("disk") == sum(sizes[name] for name in (EMBED, *LAYERS))
    assert set(chosen(untied, "auto", at_least(3), host_bytes=0).placements.values()) == {"disk"}
    assert set(chosen(untied, "auto", at_least(3)).placements.values()) == {"host"}


def test_what_is_too_large_for_the_host_does_not_keep_the_next_ones_out(untied: Planner) -> None:
    sizes = {unit.name: unit.host_bytes for unit in chosen(untied, "host", None).units}
    assert sizes[EMBED] < sizes[LAYERS[0]]
    found = chosen(untied, "auto", at_least(6), host_bytes=sizes[HEAD] + sizes[EMBED])
    assert found.placements == {EMBED: "host", **dict.fromkeys(LAYERS, "disk"), HEAD: "host"}


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_a_place_that_was_asked_for_is_the_place_of_all(placement: str, untied: Planner) -> None:
    found = chosen(untied, placement, at_least(3), host_bytes=1)
    assert found.placements == dict.fromkeys((EMBED, *LAYERS[:2]), placement)


def test_the_choice_in_words(untied: Planner, tied: Planner) -> None:
    assert Streamed(untied.parts).sentence() == ""
    mixed = chosen(untied, "auto", at_least(3), host_bytes=chosen(untied, "host", at_least(1)).bytes_in("host"))
    words = mixed.sentence()
    assert words.startswith("With their optimizer states, 2 of 4 layers and the embedding live in host memory (")
    assert ") and files (" in words and words.endswith(" of buffers on the device")
    assert " 4 of 4 layers and the embedding and the head live in files (" in chosen(untied, "disk", None).sentence()
    assert " 4 of 4 layers and the embedding live in " in chosen(tied, "host", None).sentence()


# ---- what is left on the device

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"model.store": "bf16"},
    "int8 with late updates": {"quantization.enabled": True, "quantization.fold": "refresh"},
    "adamw with eight bits": {"optimizer.type": "adamw", "optimizer.state_bits": 8},
    "sophia": {"optimizer.type": "sophia"},
    "frozen in part": {"training.trainable": ("model.layers.2*", "model.norm*")},
}


def tensors_of(weight: Weight) -> list[torch.Tensor]:
    return list(weight.tensors().values())


@pytest.mark.parametrize(
    "which", [(), (EMBED,), (EMBED, *LAYERS[:3]), (*LAYERS, HEAD), (EMBED, *LAYERS, HEAD)], ids=len
)
@pytest.mark.parametrize("run", RUNS)
def test_the_bytes_on_the_device_are_those_of_real_tensors(
    run: str, which: tuple[str, ...], untied: Planner, tmp_path: Path
) -> None:
    decided = untied.decide(asked(RUNS[run]))
    found = lay_out(decided, untied.parts, dict.fromkeys(which, "disk"))
    resident = [route for route in decided.routes if route.name not in found.names]
    form = int8_format(decided.facts.config.quantization)
    weights = [tensor for route in resident for tensor in tensors_of(empty_weight(route, form, CPU))]
    specs = [route.spec for route in decided.routes if route.spec]
    optimizer = ParamOptimizer(specs, seed=0, device=CPU, elsewhere=found.names)
    states = [tensor for state in optimizer.states.tensors().values() for tensor in state.values()]
    streaming = open_streaming(
        found.units, found.parts.ends, folder=tmp_path, device=CPU, prefetches=False, most_rows=found.most_rows
    )
    buffers = sum(buffer.nbytes for buffer in streaming.buffers)
    streaming.streams.close()
    assert buffers == found.buffer_bytes
    expected = device_bytes(decided.routes, found)
    assert expected["weights"] == sum(tensor.nbytes for tensor in weights) + buffers
    in_memory = sum(tensor.nbytes for tensor in states if not tensor.is_meta)
    assert expected["optimizer state"] + expected["projections"] == in_memory


def test_a_unit_holds_all_of_its_parameters_once(untied: Planner) -> None:
    decided = untied.decide(asked(RUNS["int8 with late updates"]))
    everything = lay_out(decided, untied.parts, dict.fromkeys(untied.parts.order, "host"))
    names = [name for unit in everything.units for name in everything.inside[unit.name]]
    assert sorted(names) == sorted({route.name for route in decided.routes} - {"model.norm.weight"})
    assert everything.names == set(names)
    (layer,) = [unit for unit in everything.units if unit.name == LAYERS[0]]
    assert layer.early and all(key in layer.layouts["state"].spans for key in layer.early)
    assert {name for key in layer.early for name in [key.partition("/")[0]]} == {
        route.name for route in decided.routes if route.name.startswith(f"{LAYERS[0]}.") and route.side
    }, "a weight with a late update can't be read without it"
    plain = lay_out(untied.decide(asked()), untied.parts, {LAYERS[0]: "host"})
    assert not plain.units[0].early and plain.only({}) == Streamed(untied.parts, (), plain.inside, plain.most_rows)
