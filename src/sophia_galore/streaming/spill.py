"""Tensors of a step that are needed again later: they wait in host memory or in files.

What is on the device does not depend on how fast the copies are: tensors that leave stay there until the next ones
leave, and those that come back are there from the moment they are asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sophia_galore.streaming.homes import DiskHome, Home, HostBuffer, HostHome
from sophia_galore.streaming.lanes import DeviceBuffer, Jobs, Lane
from sophia_galore.streaming.units import Key, Piece, Placement, Unit
from sophia_galore.weights.safetensors_layout import FileLayout, TensorKind


class Spill(ABC):
    """Keeps lists of tensors by number."""

    @abstractmethod
    def put(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Let tensors leave the device; the caller drops its references.

        Args:
            number: Number of the list.
            tensors: The tensors, which must not change any more.

        Raises:
            EnvironmentProblem: A file can't be written.
        """

    @abstractmethod
    def fetch(self, number: int) -> None:
        """Begin to bring a list back, unless that was begun already."""

    @abstractmethod
    def take(self, number: int) -> list[Tensor]:
        """Return a list that has left; it is not kept any longer.

        Raises:
            RunError: A file is damaged.
        """


@dataclass
class _Coming:
    """A list on its way back."""

    tensors: list[Tensor]
    job: Future[object]


class TensorSpill(Spill):
    """Keeps them in host memory or in files.

    Args:
        placement: host or disk.
        lane: Copies.
        jobs: Runs the copies.
        folder: Where files are written; made if there is need.
        device: The compute device.
    """

    def __init__(self, placement: Placement, lane: Lane, jobs: Jobs, folder: Path, device: torch.device) -> None:
        self._placement, self._lane, self._jobs, self._folder = placement, lane, jobs, folder
        self._device = device
        if placement == "disk":
            folder.mkdir(parents=True, exist_ok=True)
        self._homes: dict[int, Home] = {}
        self._buffers: dict[int, HostBuffer] = {}
        self._leaving: tuple[list[Tensor], Future[object]] | None = None
        self._coming: dict[int, _Coming] = {}

    def put(self, number: int, tensors: Sequence[Tensor]) -> None:
        """See `Spill`."""
        self._settle()
        self._coming.pop(number, None)
        leaving = [tensor.contiguous() for tensor in tensors]
        home = self._home(number, {str(place): (part.dtype, tuple(part.shape)) for place, part in enumerate(leaving)})
        buffers = [_buffer_of(tensor) for tensor in leaving]
        lane = self._lane

        def job() -> None:
            for place, buffer in enumerate(buffers):
                lane.write_back(home, Piece(_key(place)), buffer, slice(0, len(buffer.tensor)))
            home.commit()

        self._leaving = (leaving, self._jobs.give(job, after=lane.now()))

    def fetch(self, number: int) -> None:
        """See `Spill`."""
        if number in self._coming or number not in self._homes:
            return
        home, lane = self._homes[number], self._lane
        spans = home.unit.layouts["state"].spans
        tensors = [
            torch.empty(spans[str(place)].shape, dtype=spans[str(place)].dtype, device=self._device)
            for place in range(len(spans))
        ]
        buffers = [_buffer_of(tensor) for tensor in tensors]

        def job() -> None:
            for place, buffer in enumerate(buffers):
                lane.fetch(home, Piece(_key(place)), buffer, slice(0, len(buffer.tensor)))

        self._coming[number] = _Coming(tensors, self._jobs.give(job, after=lane.now()))

    def take(self, number: int) -> list[Tensor]:
        """See `Spill`."""
        self._settle()
        self.fetch(number)
        coming = self._coming.pop(number)
        self._jobs.wait(coming.job)
        return coming.tensors

    def _settle(self) -> None:
        """Wait for what leaves, and drop it."""
        if self._leaving is not None:
            _, job = self._leaving
            self._jobs.wait(job)
            self._leaving = None

    def _home(self, number: int, kinds: dict[str, TensorKind]) -> Home:
        """Return where a list is kept; the last step's place is used again if its tensors had the same shapes."""
        known = self._homes.get(number)
        if known is not None and known.unit.layouts["state"].kinds == kinds:
            return known
        unit = Unit(f"inputs {number}", self._placement, {"weights": FileLayout.of({}), "state": FileLayout.of(kinds)})
        if self._placement == "disk":
            self._homes[number] = DiskHome(unit, self._folder, number)
        else:
            buffer = self._buffers.get(number)
            if buffer is None or len(buffer.content) < unit.host_bytes:
                self._buffers[number] = buffer = self._lane.host_buffer(unit.host_bytes)
            self._homes[number] = HostHome(unit, buffer)
        return self._homes[number]


def _key(place: int) -> Key:
    return Key("state", str(place))


def _buffer_of(tensor: Tensor) -> DeviceBuffer:
    return DeviceBuffer(tensor.view(-1).view(torch.uint8))
