"""Units and streamed rows for tests, on each device that they can visit: a CPU, a GPU, and what stands for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch

from fake_cuda import FakeCuda, Order, fake_cuda
from sophia_galore.numerics.noise import Noise
from sophia_galore.streaming.homes import DiskHome, Home, HostHome
from sophia_galore.streaming.lanes import CpuLane, CudaLane, Jobs, Lane
from sophia_galore.streaming.open import staging_bytes
from sophia_galore.streaming.rows import RowBuffers, RowStream, StreamedRows, row_bytes
from sophia_galore.streaming.streams import Streams
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
FORMS = {"int8": Int8Format(4), "fp32": None}


@dataclass(frozen=True)
class Place:
    """Where units visit.

    Args:
        device: The compute device.
        lane: Makes a lane for some units.
        computing: Within it, the thread computes on the device.
        linger: Keeps the device busy, so that what does not wait for it comes too early.
        fake: What stands for CUDA, if something does.
    """

    device: torch.device
    lane: Callable[[list[Unit]], Lane]
    computing: Callable[[], AbstractContextManager[None]] = nullcontext
    linger: Callable[[], None] = lambda: None
    fake: FakeCuda | None = None


WITHOUT_GPU = ("cpu", *get_args(Order))
WHEREVER = (*WITHOUT_GPU, pytest.param("gpu", marks=pytest.mark.gpu))
"""Places by name: the CPU, a CPU that stands for a GPU, with each order of copies, and a GPU."""


@contextmanager
def place_named(name: str) -> Iterator[Place]:
    """Open one of the places."""
    if name == "cpu":
        yield Place(CPU, lambda units: CpuLane())
    elif name == "gpu":
        device = torch.device("cuda", 0)
        # Some milliseconds.
        linger = partial(torch.cuda._sleep, 5_000_000)
        yield Place(device, lambda units: CudaLane(device, staging_bytes(units, 128)), linger=linger)
    else:
        with fake_cuda("early" if name == "early" else "late") as fake:
            yield Place(CPU, lambda units: CudaLane(CPU, staging_bytes(units, 128)), fake.watching, fake=fake)


def home_of(unit: Unit, lane: Lane, folder: Path, number: int = 0) -> Home:
    if unit.placement == "host":
        return HostHome(unit, lane.host_buffer(unit.host_bytes))
    return DiskHome(unit, folder, number)


@contextmanager
def streams(
    place: Place, folder: Path, placement: Placement, *, prefetches: bool = True, count: int = 4
) -> Iterator[Streams]:
    """Some units that share two buffers."""
    units = [Unit(f"layer.{number}", placement, LAYOUTS, frozenset({"w/basis"})) for number in range(count)]
    lane = place.lane(units)
    homes = [home_of(unit, lane, folder, number) for number, unit in enumerate(units)]
    with place.computing():
        jobs = Jobs(lane, in_background=prefetches)
        made = Streams(homes, lane, jobs, [([unit.name for unit in units], 2)], place.device)
        try:
            yield made
        finally:
            made.close()


@contextmanager
def streamed_rows(
    place: Place,
    folder: Path,
    placement: Placement,
    form: Int8Format | None,
    *,
    prefetches: bool,
    most_rows: int = 128,
) -> Iterator[tuple[StreamedRows, torch.Tensor]]:
    """A streamed matrix of 400 rows, and the same values on the CPU."""
    values = torch.randn(400, 9, generator=torch.Generator().manual_seed(0))
    weight = PlainWeight(values) if form is None else quantise(values, form)
    kinds = {f"embed{key}": (tensor.dtype, tuple(tensor.shape)) for key, tensor in weight.tensors().items()}
    unit = Unit("embed", placement, {"weights": FileLayout.of(kinds), "state": FileLayout.of({})}, by_rows=True)
    lane = place.lane([unit])
    home = home_of(unit, lane, folder)
    for key, tensor in weight.tensors().items():
        home.write(Piece(Key("weights", f"embed{key}")), bytes_of(tensor))
    empty = weight.with_tensors({key: tensor.to("meta") for key, tensor in weight.tensors().items()})
    values = weight.values(torch.float32)
    with place.computing():
        jobs = Jobs(lane, in_background=prefetches)
        try:
            buffers = RowBuffers(most_rows * row_bytes(unit), place.device)
            yield StreamedRows(empty, RowStream(home, lane, jobs, buffers, most_rows)), values
        finally:
            jobs.close()


def take_steps(place: Place, folder: Path, placement: Placement, *, prefetches: bool) -> None:
    """Forward reads, backward adds to every tensor: after n steps each holds n, though only two units fit."""
    with streams(place, folder, placement, prefetches=prefetches) as made:
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
                    place.linger()
                    for tensor in tensors.values():
                        tensor += 1
        made.settle()
        for name in names:
            with made.lend(name, trains=True) as tensors:
                assert all(bool((tensor == 3).all()) for tensor in tensors.values())
    assert len(made.buffers()) == 2 and made.take_waited_s() > 0


def read_and_write_rows(place: Place, folder: Path, placement: Placement, form: str, *, prefetches: bool) -> None:
    """Blocks of rows and single rows are what was written, before and after each block is changed."""
    with streamed_rows(place, folder, placement, FORMS[form], prefetches=prefetches) as (weight, values):
        assert weight.shape == (400, 9) and not weight.is_ready(torch.float32) and weight.problem() is None
        blocks = [slice(start, min(start + 128, 400)) for start in range(0, 400, 128)]
        for _ in range(2):
            for rows in blocks:
                assert torch.equal(weight[rows].values(torch.float32).cpu(), values[rows])
        tokens = torch.tensor([399, 3, 4, 5, 3, 200])
        on_device = tokens.to(place.device)
        assert torch.equal(weight[on_device].values(torch.float32).cpu(), values[tokens])
        changed = values.clone()
        for step, rows in enumerate(blocks):  # each block is changed while the next one is on its way
            block = weight[rows]
            place.linger()
            plain = block.values(torch.float32).clone().mul_(2)
            block.write(plain, Noise.of(0, "rounding", step))
            changed[rows] = block.values(torch.float32).cpu()
        assert not torch.equal(changed, values)
        for rows in reversed(blocks):
            assert torch.equal(weight[rows].values(torch.float32).cpu(), changed[rows])
        assert torch.equal(weight[on_device].values(torch.float32).cpu(), changed[tokens])
        assert torch.equal(weight.copied_to(CPU).values(torch.float32), changed)
