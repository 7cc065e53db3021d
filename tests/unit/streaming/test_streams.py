"""Lending units: what a borrower sees and changes is what is at home, with and without the thread, in few buffers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sophia_galore.errors import EnvironmentProblem, RunError
from sophia_galore.streaming.homes import DiskHome, Home, HostHome
from sophia_galore.streaming.lanes import CpuLane
from sophia_galore.streaming.streams import group_bytes
from sophia_galore.streaming.units import Key, Piece, Placement, Unit
from streaming_cases import (
    FORMS,
    LAYOUTS,
    PLACEMENTS,
    WHEREVER,
    Place,
    place_named,
    read_and_write_rows,
    streamed_rows,
    streams,
    take_steps,
)


@pytest.fixture(params=WHEREVER)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    with place_named(request.param) as opened:
        yield opened


@pytest.mark.parametrize("prefetches", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_steps_over_all_units_add_up(place: Place, placement: Placement, prefetches: bool, tmp_path: Path) -> None:
    take_steps(place, tmp_path, placement, prefetches=prefetches)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_only_what_changed_is_written(placement: Placement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    kind = HostHome if placement == "host" else DiskHome
    before = kind.write

    def noted(self: Home, piece: Piece, content: memoryview) -> None:
        written.append(piece.key.name)
        before(self, piece, content)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "write", noted)
    with place_named("cpu") as place, streams(place, tmp_path, placement) as made:
        with made.lend("layer.0", trains=True) as tensors:
            tensors[Key("state", "w/exp_avg")][1:3].add_(1)
        with made.lend("layer.0"):
            pass
        made.settle()
    assert written == ["w/exp_avg"]


def test_a_borrowed_unit_can_be_borrowed_again_inside(place: Place, tmp_path: Path) -> None:
    with streams(place, tmp_path, "disk") as made, made.lend("layer.1", trains=True) as outer:
        with made.lend("layer.1") as inner:
            assert inner[Key("weights", "w")] is outer[Key("weights", "w")]
        outer[Key("weights", "w")].fill_(4)


def test_damage_stops_the_borrower_and_everything_after(place: Place, tmp_path: Path) -> None:
    with streams(place, tmp_path, "disk") as made:
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
    place: Place, prefetches: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Home, piece: Piece, content: memoryview) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DiskHome, "write", full)
    with streams(place, tmp_path, "disk", prefetches=prefetches) as made:
        with made.lend("layer.0", trains=True) as tensors:
            tensors[Key("weights", "w")].fill_(1)
        with pytest.raises(EnvironmentProblem, match="No space left on device"):
            made.settle()


def test_a_buffer_is_as_large_as_the_largest() -> None:
    small = Unit("a", "host", LAYOUTS)
    rows = Unit("b", "host", LAYOUTS, by_rows=True)
    # Each tensor begins at a multiple of 512 bytes.
    assert group_bytes([small, rows]) == small.buffer_bytes == small.host_bytes == 3 * 512 + 12
    assert rows.buffer_bytes == 512 + 12 and rows.host_bytes == small.host_bytes
    places = [small.place(key) for key in small.keys(trains=True)]
    assert [place.start for place in places] == [0, 512, 1024, 1536]
    assert all(small.host_place(Piece(key)) == small.place(key) for key in small.keys(trains=True))


@pytest.mark.parametrize("prefetches", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows_are_read_and_written(
    place: Place, placement: Placement, form: str, prefetches: bool, tmp_path: Path
) -> None:
    read_and_write_rows(place, tmp_path, placement, form, prefetches=prefetches)


def test_rows_that_were_fetched_before_a_change_are_fetched_again(place: Place, tmp_path: Path) -> None:
    with streamed_rows(place, tmp_path, "host", None, prefetches=True) as (weight, values):
        weight[slice(0, 128)].values(torch.float32)  # fetches the second block as well
        block = weight[slice(100, 200)]
        block.write(torch.zeros(100, 9, device=place.device), None)
        assert torch.equal(weight[slice(128, 256)].values(torch.float32)[:72].cpu(), torch.zeros(72, 9))
        assert torch.equal(weight[slice(0, 128)].values(torch.float32)[:100].cpu(), values[:100])


def test_the_whole_is_refused(place: Place, tmp_path: Path) -> None:
    with streamed_rows(place, tmp_path, "host", None, prefetches=True) as (weight, _):
        with pytest.raises(TypeError, match="rows"):
            weight.values(torch.float32)
        with pytest.raises(TypeError, match="rows"):
            weight.write(torch.zeros(400, 9), None)
        with pytest.raises(ValueError, match="129 rows does not fit"):
            weight[slice(0, 129)]


def test_host_memory_is_no_tensor_of_the_device() -> None:
    buffer = CpuLane().host_buffer(64)
    assert buffer.pinned is None and np.frombuffer(buffer.content, np.uint8).sum() == 0
