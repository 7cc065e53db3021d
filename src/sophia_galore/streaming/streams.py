"""Units visit the compute device in a few buffers; the next one is on its way while one is in use.

A borrowed unit has a buffer until it is given back. What was changed is then written back in the background, and the
buffer may be given to the next unit at once, since jobs keep their order (`lanes.py`). With two buffers, a layer works
in one of them, while in the other the last layer is written back and the next one is fetched.

A tensor was changed if torch counted a change in place, or if a kernel of our own called `increment_version`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sophia_galore.streaming.homes import DiskHome, Home
from sophia_galore.streaming.lanes import DeviceBuffer, Jobs, Lane
from sophia_galore.streaming.units import Key, Part, Piece, Unit
from sophia_galore.weights.tensor_stream import FinishedFile


@dataclass(eq=False)
class _Slot:
    """A buffer and the unit in it."""

    buffer: DeviceBuffer
    unit: Unit | None = None
    loaded: set[Key] = field(default_factory=set)
    fetches: list[Future[object]] = field(default_factory=list)
    writes: list[Future[object]] = field(default_factory=list)
    tensors: dict[Key, Tensor] = field(default_factory=dict)
    users: int = 0
    last_use: int = 0
    released: object = None


class Streams:
    """Lends units.

    Args:
        homes: The home of each unit.
        lane: Copies between them and the compute device.
        jobs: Runs the copies.
        groups: For each group of units that share buffers, the names of its units and the number of its buffers.
        device: The compute device.
    """

    def __init__(
        self,
        homes: Sequence[Home],
        lane: Lane,
        jobs: Jobs,
        groups: Sequence[tuple[Sequence[str], int]],
        device: torch.device,
    ) -> None:
        self._homes = {home.unit.name: home for home in homes}
        self._lane, self._jobs = lane, jobs
        self._slots: list[_Slot] = []
        self._slots_of: dict[str, list[_Slot]] = {}
        self._clock = 0
        for names, count in groups:
            size = group_bytes([self._homes[name].unit for name in names])
            buffers = [DeviceBuffer(torch.empty(size, dtype=torch.uint8, device=device)) for _ in range(count)]
            # A kernel may still be using the memory of a new buffer: for what it was before, or to fill it.
            slots = [_Slot(buffer, released=lane.now()) for buffer in buffers]
            self._slots += slots
            self._slots_of |= dict.fromkeys(names, slots)

    def take_waited_s(self) -> float:
        """Return the seconds that the computation waited for copies since the last call.

        On a GPU they end when the copies are ordered; that the device waits for them is not seen from here.
        """
        waited_s, self._jobs.waited_s = self._jobs.waited_s, 0.0
        return waited_s

    @property
    def units(self) -> Mapping[str, Unit]:
        """The units by name."""
        return {name: home.unit for name, home in self._homes.items()}

    @property
    def homes(self) -> Mapping[str, Home]:
        """Their homes by name; read and write them only after `settle`."""
        return self._homes

    def buffers(self) -> list[Tensor]:
        """Return the buffers on the compute device."""
        return [slot.buffer.tensor for slot in self._slots]

    @contextmanager
    def lend(self, name: str, *, trains: bool = False) -> Iterator[dict[Key, Tensor]]:
        """Lend a unit.

        Args:
            name: The unit.
            trains: Whether its weights are to be updated: the whole state comes too.

        Yields:
            Its tensors; those that are changed in place are written back at the end.

        Raises:
            RunError: A file is damaged.
            EnvironmentProblem: A file can't be read or written.
        """
        slot = self._enter(self._homes[name].unit, trains=trains)
        slot.users += 1
        before = {key: tensor._version for key, tensor in slot.tensors.items()}
        try:
            yield {key: slot.tensors[key] for key in slot.loaded}
        finally:
            slot.users -= 1
            self._write_back(slot, [key for key, tensor in slot.tensors.items() if tensor._version != before[key]])

    def prefetch(self, name: str, *, trains: bool = False) -> None:
        """Begin to fetch a unit, if a buffer is free.

        Args:
            name: The unit.
            trains: As for `lend`.
        """
        unit = self._homes[name].unit
        if any(slot.unit is unit or not slot.users for slot in self._slots_of[name]):
            self._fetch(self._find_slot(unit), unit, trains=trains)

    def settle(self) -> None:
        """Wait until everything is written back.

        Raises:
            EnvironmentProblem: A file can't be written.
        """
        self._jobs.wait(self._jobs.give(self._commit))  # behind all other jobs

    def finished(self, part: Part) -> list[FinishedFile]:
        """Return the files of the units that live on disk, as they are now.

        Args:
            part: Those of weights, or of states.

        Raises:
            EnvironmentProblem: A file can't be written.
        """
        self.settle()
        files = (home.files.get(part) for home in self._homes.values() if isinstance(home, DiskHome))
        return [FinishedFile(file.layout.kinds, file.keep_as) for file in files if file is not None]

    def _commit(self) -> None:
        self._lane.finish()  # the mark of a write lets only the device wait for it
        for home in self._homes.values():
            home.commit()

    def close(self) -> None:
        """End the thread of the copies, once they are done."""
        self._jobs.close()

    def _enter(self, unit: Unit, *, trains: bool) -> _Slot:
        slot = self._find_slot(unit)
        self._fetch(slot, unit, trains=trains)
        self._wait(slot.fetches)
        if trains:
            self._wait(slot.writes)  # what is being written must not change
        self._clock += 1
        slot.last_use = self._clock
        return slot

    def _find_slot(self, unit: Unit) -> _Slot:
        """Return the slot that a unit is in, else the free one whose last use is longest ago."""
        slots = self._slots_of[unit.name]
        if (found := next((slot for slot in slots if slot.unit is unit), None)) is not None:
            return found
        free = [slot for slot in slots if not slot.users]
        assert free, f"all buffers are in use; {unit.name} is borrowed beside too many others"
        return min(free, key=lambda slot: slot.last_use)

    def _fetch(self, slot: _Slot, unit: Unit, *, trains: bool) -> None:
        """Order to fetch what is not in a slot yet."""
        if slot.unit is not unit:
            slot.unit, slot.loaded = unit, set()
            slot.writes = [job for job in slot.writes if not job.done()]  # after a failure every later job fails too
            slot.tensors = {
                key: view_of(slot.buffer.tensor, unit.place(key).start, unit.span(key).dtype, unit.span(key).shape)
                for key in unit.keys(trains=True)
            }
        missing = [key for key in unit.keys(trains=trains) if key not in slot.loaded]
        if not missing:
            return
        home, buffer, lane = self._homes[unit.name], slot.buffer, self._lane

        def job() -> None:
            for key in missing:
                lane.fetch(home, Piece(key), buffer, unit.place(key))

        slot.loaded.update(missing)
        slot.fetches.append(self._jobs.give(job, after=slot.released))

    def _write_back(self, slot: _Slot, changed: Sequence[Key]) -> None:
        slot.released = self._lane.now()
        unit = slot.unit
        if not changed or unit is None:
            return
        home, buffer, lane = self._homes[unit.name], slot.buffer, self._lane

        def job() -> None:
            for key in changed:
                lane.write_back(home, Piece(key), buffer, unit.place(key))
            home.commit()

        slot.writes.append(self._jobs.give(job, after=slot.released))

    def _wait(self, jobs: list[Future[object]]) -> None:
        while jobs:
            self._jobs.wait(jobs.pop(0))


def group_bytes(units: Sequence[Unit]) -> int:
    """Return the size of a buffer that each of some units can visit."""
    return max((unit.buffer_bytes for unit in units), default=0)


def view_of(buffer: Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Return a tensor in a buffer, with a count of its own of changes in place.

    Args:
        buffer: (bytes,) uint8.
        start: Its first byte, a multiple of the dtype's size.
        dtype: Its dtype.
        shape: Its shape.
    """
    made = torch.empty(0, dtype=dtype, device=buffer.device)
    return made.set_(buffer.untyped_storage(), start // dtype.itemsize, tuple(shape), ())
