"""Lending units: what a borrower sees and changes is what is at home, with and without the thread, in few buffers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from sophia_galore.errors import EnvironmentProblem, RunError
from sophia_galore.numerics.noise import Noise
from sophia_galore.streaming.homes import DiskHome, Home, HostHome
from sophia_galore.streaming.lanes import CpuLane, Jobs
from sophia_galore.streaming.rows import RowBuffers, RowStream, StreamedRows, row_bytes
from sophia_galore.streaming.streams import Streams, group_bytes
from sophia_galore.streaming.units import Key, Piece, Placement, Unit
from sophia_galore.weights.int8 import Int8Format, quantise
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.safetensors_layout import FileLayout, bytes_of

CPU = torch.device("cpu")
LAYOUTS = {
    "weights": FileLayout.of({"w": (torch.int8, (5, 7)), "w.scales": (torch.bfloat16, (5, 1))}),
    "state": FileLayout.of({"w/basis": (torch.bfloat16, (3, 2)), "w/exp_avg": (torch.float32, (5, 2))}),
}
PLACEMENTS: tuple[Placement, Placement] = ("host", "disk")


def home_of(unit: Unit, folder: Path, number: int = 0) -> Home:
    lane = CpuLane()
    if unit.placement == "host":
        return HostHome(unit, lane.host_buffer(unit.host_bytes))
    return DiskHome(unit, folder, number)


@contextmanager
def streams(folder: Path, placement: Placement, *, prefetches: bool = True, count: int = 4) -> Iterator[Streams]:
    units = [Unit(f"layer.{number}", placement, LAYOUTS, frozenset({"w/basis"})) for number in range(count)]
    homes = [home_of(unit, folder, number) for number, unit in enumerate(units)]
    lane = CpuLane()
    made = Streams(homes, lane, Jobs(lane, in_background=prefetches), [([unit.name for unit in units], 2)], CPU)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("prefetches", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_steps_over_all_units_add_up(placement: Placement, prefetches: bool, tmp_path: Path) -> None:
    """Forward reads, backward adds to every tensor: after n steps each holds n, though only two units fit."""
    with streams(tmp_path, placement, prefetches=prefetches) as made:
        names = list(made.units)
        for step in range(3):
            for name, then in zip(names, [*names[1:], None], strict=True):
                with made.lend(name) as tensors:
                    if then:
                        made.prefetch(then)
                    assert {key.name for key in tensors} >= {"w", "w.scales", "w/basis"}
                    assert all(bool((tensors[Key("weights", key)] == step).all()) for key in ("w", "w.scales"))
            for name, then in zip(reversed(names), [*reversed(names[:-1]), None], strict=True):
                with made.lend(name, trains=True) as tensors:
                    if then:
                        made.prefetch(then, trains=True)
                    assert len(tensors) == 4
                    for tensor in tensors.values():
                        tensor += 1
        made.settle()
        for name in names:
            with made.lend(name, trains=True) as tensors:
                assert all(bool((tensor == 3).all()) for tensor in tensors.values())
    assert len(made.buffers()) == 2 and made.take_waited_s() > 0


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_only_what_changed_is_written(placement: Placement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    kind = HostHome if placement == "host" else DiskHome
    before = kind.write

    def noted(self: Home, piece: Piece, content: memoryview) -> None:
        written.append(piece.key.name)
        before(self, piece, content)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "write", noted)
    with streams(tmp_path, placement) as made:
        with made.lend("layer.0", trains=True) as tensors:
            tensors[Key("state", "w/exp_avg")][1:3].add_(1)
        with made.lend("layer.0"):
            pass
        made.settle()
    assert written == ["w/exp_avg"]


def test_a_borrowed_unit_can_be_borrowed_again_inside(tmp_path: Path) -> None:
    with streams(tmp_path, "disk") as made, made.lend("layer.1", trains=True) as outer:
        with made.lend("layer.1") as inner:
            assert inner[Key("weights", "w")] is outer[Key("weights", "w")]
        outer[Key("weights", "w")].fill_(4)


def test_damage_stops_the_borrower_and_everything_after(tmp_path: Path) -> None:
    with streams(tmp_path, "disk") as made:
        home = made.homes["layer.2"]
        assert isinstance(home, DiskHome)
        home.files["weights"].path.unlink()
        with made.lend("layer.1"):
            made.prefetch("layer.2")
            pass
        with pytest.raises(RunError, match="it is gone"), made.lend("layer.2"):
            pass
        with pytest.raises(RunError, match="it is gone"), made.lend("layer.3"):
            pass


@pytest.mark.parametrize("prefetches", [True, False])
def test_a_full_disk_is_said_where_it_is_noticed(
    prefetches: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Home, piece: Piece, content: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskHome, "write", full)
    with streams(tmp_path, "disk", prefetches=prefetches) as made:
        with made.lend("layer.0", trains=True) as tensors:
            tensors[Key("weights", "w")].fill_(1)
        with pytest.raises(EnvironmentProblem, match="No space left on device"):
            made.settle()


def test_a_buffer_is_as_large_as_the_largest() -> None:
    small = Unit("a", "host", LAYOUTS)
    rows = Unit("b", "host", LAYOUTS, by_rows=True)
    assert group_bytes([small, rows]) == small.buffer_bytes == 512 + LAYOUTS["state"].data_bytes
    assert rows.buffer_bytes == LAYOUTS["state"].data_bytes


FORMS = {"int8": Int8Format(4), "fp32": None}


@contextmanager
def streamed_rows(
    folder: Path, placement: Placement, form: Int8Format | None, *, prefetches: bool, most_rows: int = 128
) -> Iterator[tuple[StreamedRows, torch.Tensor]]:
    """A streamed matrix of 400 rows, and the same values."""
    values = torch.randn(400, 9, generator=torch.Generator().manual_seed(0))
    weight = PlainWeight(values) if form is None else quantise(values, form)
    kinds = {f"embed{key}": (tensor.dtype, tuple(tensor.shape)) for key, tensor in weight.tensors().items()}
    unit = Unit("embed", placement, {"weights": FileLayout.of(kinds), "state": FileLayout.of({})}, by_rows=True)
    home, lane = home_of(unit, folder), CpuLane()
    for key, tensor in weight.tensors().items():
        home.write(Piece(Key("weights", f"embed{key}")), bytes_of(tensor))
    jobs = Jobs(lane, in_background=prefetches)
    empty = weight.with_tensors({key: tensor.to("meta") for key, tensor in weight.tensors().items()})
    try:
        yield (
            StreamedRows(empty, RowStream(home, lane, jobs, RowBuffers(most_rows * row_bytes(unit), CPU), most_rows)),
            weight.values(torch.float32),
        )
    finally:
        jobs.close()


@pytest.mark.parametrize("prefetches", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_are_read_and_written(placement: Placement, form: str, prefetches: bool, tmp_path: Path) -> None:
    with streamed_rows(tmp_path, placement, FORMS[form], prefetches=prefetches) as (weight, values):
        assert weight.shape == (400, 9) and not weight.is_ready(torch.float32) and weight.problem() is None
        blocks = [slice(start, min(start + 128, 400)) for start in range(0, 400, 128)]
        for _ in range(2):
            for rows in blocks:
                assert torch.equal(weight[rows].values(torch.float32), values[rows])
        tokens = torch.tensor([399, 3, 4, 5, 3, 200])
        assert torch.equal(weight[tokens].values(torch.float32), values[tokens])
        changed = values.clone()
        for step, rows in enumerate(blocks):  # each block is changed while the next one is on its way
            block = weight[rows]
            plain = block.values(torch.float32).clone().mul_(2)
            block.write(plain, Noise.of(0, "rounding", step))
            changed[rows] = block.values(torch.float32)
        assert not torch.equal(changed, values)
        for rows in reversed(blocks):
            assert torch.equal(weight[rows].values(torch.float32), changed[rows])
        assert torch.equal(weight[tokens].values(torch.float32), changed[tokens])
        assert torch.equal(weight.copied_to(CPU).values(torch.float32), changed)


def test_rows_that_were_fetched_before_a_change_are_fetched_again(tmp_path: Path) -> None:
    with streamed_rows(tmp_path, "host", None, prefetches=True) as (weight, values):
        weight[slice(0, 128)].values(torch.float32)  # fetches the second block as well
        block = weight[slice(100, 200)]
        block.write(torch.zeros(100, 9), None)
        assert torch.equal(weight[slice(128, 256)].values(torch.float32)[:72], torch.zeros(72, 9))
        assert torch.equal(weight[slice(0, 128)].values(torch.float32)[:100], values[:100])


def test_the_whole_is_refused(tmp_path: Path) -> None:
    with streamed_rows(tmp_path, "host", None, prefetches=True) as (weight, _):
        with pytest.raises(TypeError, match="rows"):
            weight.values(torch.float32)
        with pytest.raises(TypeError, match="rows"):
            weight.write(torch.zeros(400, 9), None)
        with pytest.raises(ValueError, match="129 rows does not fit"):
            weight[slice(0, 129)]


def test_host_memory_is_no_tensor_of_the_device() -> None:
    buffer = CpuLane().host_buffer(64)
    assert buffer.pinned is None and np.frombuffer(buffer.content, np.uint8).sum() == 0
