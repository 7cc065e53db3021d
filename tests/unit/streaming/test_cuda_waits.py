"""Each wait of the copies on a GPU is needed: without it, values are wrong in an order that CUDA allows.

The waits are taken out one by one, each with a use of units in which that shows. What stands for CUDA is
`fake_cuda.py`; no GPU is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_cuda import Event, Order
from sophia_galore.streaming import lanes
from sophia_galore.streaming.homes import Home
from sophia_galore.streaming.lanes import CudaLane, Jobs
from sophia_galore.streaming.open import staging_bytes
from sophia_galore.streaming.streams import Streams
from sophia_galore.streaming.units import Key, Piece, Unit
from sophia_galore.weights.safetensors_layout import FileLayout
from streaming_cases import (
    LAYOUTS,
    WHEREVER,
    Place,
    place_named,
    read_and_write_rows,
    streamed_rows,
    streams,
    take_steps,
)

W = Key("weights", "w")


def at_home(home: Home) -> set[int]:
    """The values of a matrix at home, read by the processor."""
    found = np.zeros(35, np.int8)
    home.read(Piece(W), found.view(np.uint8).data)
    return set(found.tolist())


def settle(place: Place, folder: Path) -> None:
    """What is settled can be read."""
    with streams(place, folder, "host", prefetches=False) as made:
        with made.lend("layer.0", trains=True) as tensors:
            place.linger()
            tensors[W].fill_(4)
        made.settle()
        assert at_home(made.homes["layer.0"]) == {4}


def close(place: Place, folder: Path) -> None:
    """Copies do not outlive their buffers."""
    with streams(place, folder, "host", prefetches=False) as made:
        with made.lend("layer.0", trains=True) as tensors:
            place.linger()
            tensors[W].fill_(4)
        home = made.homes["layer.0"]
    assert at_home(home) == {4}


def change_what_is_in_files(place: Place, folder: Path) -> None:
    """A change is made to what comes from a file, and not lost when that comes."""
    with streams(place, folder, "disk", prefetches=False) as made:
        for _ in range(2):
            with made.lend("layer.0", trains=True) as tensors:
                place.linger()
                for tensor in tensors.values():
                    tensor += 1
        with made.lend("layer.0", trains=True) as tensors:
            assert all(bool((tensor == 2).all()) for tensor in tensors.values())


def change_twice(place: Place, folder: Path) -> None:
    """What is written back is what was there when the loan ended, also if the next one changes it at once."""
    with streams(place, folder, "host", prefetches=False) as made:
        with made.lend("layer.0", trains=True) as tensors:
            place.linger()
            tensors[W].fill_(4)
        with made.lend("layer.0", trains=True) as tensors:
            tensors[W].fill_(5)
            assert bool((tensors[W] == 5).all())
            assert at_home(made.homes["layer.0"]) == {4}


def gather_changed_rows(place: Place, folder: Path) -> None:
    """Single rows are those that were written just before."""
    with streamed_rows(place, folder, "host", None, prefetches=False) as (weight, _):
        place.linger()
        weight[slice(0, 128)].write(torch.full((128, 9), 7.0), None)
        assert bool((weight[torch.tensor([3, 5])].values(torch.float32) == 7).all())


def read_three_blocks(place: Place, folder: Path) -> None:
    """What was computed from a block is not changed by a later one in the same buffer."""
    with streamed_rows(place, folder, "host", None, prefetches=False) as (weight, values):
        read = []
        for start in range(0, 400, 100):
            block = weight[slice(start, start + 100)].values(torch.float32)
            place.linger()
            read.append(block * 1)
        assert torch.equal(torch.cat(read).cpu(), values)


def without(owner: type, name: str, caller: str = "") -> Callable[[pytest.MonkeyPatch], None]:
    """Return what lets a method do nothing where functions of some name call it, or its caller; "": wherever."""
    before = getattr(owner, name)

    def left_out(self: Any, *args: Any) -> Any:
        callers = sys._getframe(1), sys._getframe(2)
        called_by_it = any(frame.f_code.co_qualname.startswith(caller) for frame in callers)
        return None if called_by_it else before(self, *args)

    return lambda patch: patch.setattr(owner, name, left_out)


def without_mark(job: str) -> Callable[[pytest.MonkeyPatch], None]:
    """Return what gives a kind of job without the mark that its copies wait for."""
    before = Jobs.give

    def give(self: Jobs, what: Callable[[], None], *, after: object = None) -> Any:
        marked = not getattr(what, "__qualname__", "").startswith(f"{job}.")
        return before(self, what, after=after if marked else None)

    return lambda patch: patch.setattr(Jobs, "give", give)


def without_waiting_for_writes(patch: pytest.MonkeyPatch) -> None:
    before = Streams._wait

    def wait(self: Streams, jobs: list[Any]) -> None:
        if not any(jobs is slot.writes for slot in self._slots):
            before(self, jobs)

    patch.setattr(Streams, "_wait", wait)


def steps(placement: Any, *, prefetches: bool = False) -> Callable[[Place, Path], None]:
    return partial(take_steps, placement=placement, prefetches=prefetches)


def rows(placement: Any, *, prefetches: bool = False) -> Callable[[Place, Path], None]:
    return partial(read_and_write_rows, placement=placement, form="int8", prefetches=prefetches)


# The wait, what leaves it out, the order of copies in which that shows, and a use that goes wrong.
WAITS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Order, Callable[[Place, Path], None]]] = {
    "a job's copies wait for the computation": (without(CudaLane, "begin"), "early", steps("host")),
    "a fetch waits for the last user of its buffer": (without_mark("Streams._fetch"), "early", steps("host")),
    "a fetch from a file does": (without_mark("Streams._fetch"), "early", steps("disk")),
    "a fetch waits for the memory of a new buffer": (
        without(CudaLane, "now", "Streams.__init__"),
        "early",
        steps("host"),
    ),
    "writing back waits for the last kernel": (without_mark("Streams._write_back"), "early", settle),
    "writing back to a file does": (without_mark("Streams._write_back"), "early", steps("disk")),
    "the computation waits for a fetch": (without(CudaLane, "wait_here", "Streams._wait"), "late", steps("host")),
    "it waits for a fetch from a file": (
        without(CudaLane, "wait_here", "Streams._wait"),
        "late",
        change_what_is_in_files,
    ),
    "a change waits for writing back": (without_waiting_for_writes, "late", change_twice),
    "a file is written after the copy from the device": (
        without(CudaLane, "finish", "CudaLane.write_back"),
        "late",
        steps("disk"),
    ),
    "staging is used again after its copy": (without(Event, "synchronize", "CudaLane._next"), "late", steps("disk")),
    "settling waits for the copies": (without(CudaLane, "finish", "Streams._commit"), "late", settle),
    "the end waits for the copies": (without(CudaLane, "finish", "Jobs.close"), "late", close),
    "a block waits for the last user of its buffer": (without_mark("RowStream._fetch"), "early", read_three_blocks),
    "writing back a block waits for the last kernel": (
        without_mark("RowStream.write_back"),
        "early",
        gather_changed_rows,
    ),
    "the computation waits for a block": (without(CudaLane, "wait_here", "RowStream.read"), "late", rows("host")),
    "single rows wait for their new memory": (without_mark("RowStream.gather"), "early", gather_changed_rows),
    "the computation waits for single rows": (
        without(CudaLane, "wait_here", "RowStream.gather"),
        "late",
        gather_changed_rows,
    ),
    "single rows are read after they are written": (
        without(CudaLane, "finish", "CudaLane.fetch_rows"),
        "late",
        gather_changed_rows,
    ),
}

USES = (settle, close, change_what_is_in_files, change_twice, gather_changed_rows, read_three_blocks)


@pytest.mark.parametrize("name", WHEREVER)
@pytest.mark.parametrize("use", USES)
def test_values_are_right(use: Callable[[Place, Path], None], name: str, tmp_path: Path) -> None:
    with place_named(name) as place:
        use(place, tmp_path)


@pytest.mark.parametrize("wait", WAITS)
def test_they_are_wrong_without(wait: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out, order, use = WAITS[wait]
    with place_named(order) as place:
        leave_out(monkeypatch)
        with pytest.raises(AssertionError):
            use(place, tmp_path)


def test_the_thread_of_the_copies_uses_the_device_of_the_computation(tmp_path: Path) -> None:
    with place_named("late") as place, streams(place, tmp_path, "host") as made, made.lend("layer.0"):
        pass
    assert place.fake is not None
    assert place.fake.devices == {"streaming_0": torch.device("cuda", 0)}


def test_staging_is_as_large_as_what_passes_through_it() -> None:
    matrix = FileLayout.of({"e": (torch.float32, (1000, 8)), "e.scales": (torch.bfloat16, (1000, 1))})
    by_rows = {"weights": matrix, "state": FileLayout.of({})}
    of_layers = max(span.num_bytes for layout in LAYOUTS.values() for span in layout.spans.values())
    assert of_layers == 40
    for units, most_rows, expected in (
        ([Unit("a", "host", LAYOUTS)], 10, 0),
        ([Unit("a", "disk", LAYOUTS)], 10, of_layers),
        ([Unit("e", "host", by_rows, by_rows=True)], 10, 320),
        ([Unit("e", "disk", by_rows, by_rows=True)], 10, 320),
        ([Unit("e", "disk", by_rows, by_rows=True)], 5000, 32000),
        ([Unit("e", "disk", by_rows)], 10, 32000),
    ):
        assert staging_bytes(units, most_rows) == expected


@pytest.mark.parametrize(
    "before, after",
    [
        ("", lanes._EXACT_SIZES),
        ("expandable_segments:True", f"expandable_segments:True,{lanes._EXACT_SIZES}"),
        ("pinned_max_round_threshold_mb:64", "pinned_max_round_threshold_mb:64"),
    ],
)
def test_pinned_memory_takes_its_size(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [before]
    monkeypatch.setattr(torch._C, "_accelerator_getAllocatorSettings", lambda: settings[-1])
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    with place_named("late") as place:
        place.lane([])
        place.lane([])
    assert settings[-1] == after and len(settings) <= 2


@pytest.mark.gpu
def test_pinned_memory_of_a_gpu_takes_its_size() -> None:
    size = (64 << 20) + 1
    with place_named("gpu") as place:
        lane = place.lane([])
        before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
        pinned = lane.host_buffer(size).pinned
        assert pinned is not None and pinned.is_pinned()
        assert torch.cuda.host_memory_stats()["allocated_bytes.current"] - before < size + (1 << 20)
