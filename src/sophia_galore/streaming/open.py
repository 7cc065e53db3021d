"""Open the homes of units, and what moves them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sophia_galore.streaming.homes import DiskHome, Home, HostHome
from sophia_galore.streaming.lanes import CpuLane, CudaLane, Jobs, Lane
from sophia_galore.streaming.rows import RowBuffers, RowStream, StreamedRows, row_bytes
from sophia_galore.streaming.spill import Spill, TensorSpill
from sophia_galore.streaming.streams import Streams, group_bytes
from sophia_galore.streaming.units import Key, Piece, Placement, Unit
from sophia_galore.weights.safetensors_layout import bytes_of
from sophia_galore.weights.weight import Weight

# While a layer works in one buffer, the last one leaves the other one and the next one comes into it.
_LAYER_BUFFERS = 2

INPUTS = "inputs"
"""Folder of the files in which layer inputs wait, inside that of the layers."""


@dataclass(frozen=True)
class Streaming:
    """What moves the units of a run.

    Args:
        streams: Lends them.
        rows: For each unit whose weight comes by rows, what fetches them, by its name.
        buffers: All buffers on the compute device.
        spill: Where layer inputs wait for their backward; None: on the device.
    """

    streams: Streams
    rows: Mapping[str, RowStream]
    buffers: Sequence[Tensor]
    spill: Spill | None = None

    def take_in(self, name: str, weight: Weight) -> Weight:
        """Copy a weight to where it lives, before anything is lent.

        Args:
            name: The weight.
            weight: In host memory.

        Returns:
            What stands for it in a store; the weight itself if it is in no unit.

        Raises:
            OSError: The disk is full or not writable.
        """
        tensors = weight.tensors()
        home = next((home for home in self.streams.homes.values() if name in home.unit.layouts["weights"].spans), None)
        if home is None:
            return weight
        for ending, tensor in tensors.items():
            home.write(Piece(Key("weights", name + ending)), bytes_of(tensor.contiguous()))
        at_rest = weight.with_tensors({ending: tensor.to("meta") for ending, tensor in tensors.items()})
        return StreamedRows(at_rest, self.rows[name]) if name in self.rows else at_rest


def open_streaming(
    units: Sequence[Unit],
    ends: Collection[str],
    *,
    folder: Path,
    device: torch.device,
    prefetches: bool = True,
    most_rows: int = 1,
    inputs: Placement = "device",
) -> Streaming:
    """Create the homes of units, all zero, and the buffers that they visit.

    Args:
        units: The units.
        ends: Names of those that are no layers: the embedding and the head, of which one is in use at a time.
        folder: Where files are written; made if there is need. Files of an earlier run in it are replaced.
        device: The compute device.
        prefetches: Whether bytes move in the background.
        most_rows: Rows of the largest block of a weight that comes by rows.
        inputs: Where layer inputs wait for their backward.

    Raises:
        OSError: The disk is full or not writable.
    """
    lane = CpuLane() if device.type == "cpu" else CudaLane(device, staging_bytes(units, most_rows))
    if "disk" in (inputs, *(unit.placement for unit in units)):
        folder.mkdir(parents=True, exist_ok=True)
    homes = [_home(unit, lane, folder, number) for number, unit in enumerate(units)]
    jobs = Jobs(lane, in_background=prefetches)
    layers = [unit.name for unit in units if unit.name not in ends]
    groups = [(layers, _LAYER_BUFFERS), ([unit.name for unit in units if unit.name in ends], 1)]
    streams = Streams(homes, lane, jobs, [group for group in groups if group[0]], device)
    by_rows = [home for home in homes if home.unit.by_rows]
    buffers = RowBuffers(row_buffer_bytes(units, most_rows), device) if by_rows else None
    return Streaming(
        streams,
        {home.unit.name: RowStream(home, lane, jobs, buffers, most_rows) for home in by_rows if buffers},
        [*streams.buffers(), *(buffers.tensors() if buffers else [])],
        None if inputs == "device" else TensorSpill(inputs, lane, jobs, folder / INPUTS, device),
    )


def buffers_bytes(units: Sequence[Unit], ends: Collection[str], most_rows: int) -> int:
    """Return the bytes of all buffers on the compute device; arguments as for `open_streaming`."""
    layers = [unit for unit in units if unit.name not in ends]
    around = [unit for unit in units if unit.name in ends]
    return _LAYER_BUFFERS * group_bytes(layers) + group_bytes(around) + 2 * row_buffer_bytes(units, most_rows)


def row_buffer_bytes(units: Sequence[Unit], most_rows: int) -> int:
    """Return the bytes of a buffer for blocks of rows."""
    return max((most_rows * row_bytes(unit) for unit in units if unit.by_rows), default=0)


def staging_bytes(units: Sequence[Unit], most_rows: int) -> int:
    """Return the bytes of a buffer of host memory that what a GPU can't fetch by itself passes through.

    Tensors in files do, each as a whole, since one checksum is for all of it. Of a weight that comes by rows, a block
    does. Single rows of it do as well if it is in host memory, from where the processor collects them.
    """
    largest = 0
    for unit in units:
        for part, layout in unit.layouts.items():
            for span in layout.spans.values():
                if part == "weights" and unit.by_rows:
                    largest = max(largest, min(most_rows * span.row_bytes, span.num_bytes))
                elif unit.placement == "disk":
                    largest = max(largest, span.num_bytes)
    return largest


def _home(unit: Unit, lane: Lane, folder: Path, number: int) -> Home:
    if unit.placement == "disk":
        return DiskHome(unit, folder, number)
    return HostHome(unit, lane.host_buffer(unit.host_bytes))
