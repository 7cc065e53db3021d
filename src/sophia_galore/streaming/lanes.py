"""How bytes get from the host to the compute device and back.

The jobs run on one thread, in the order in which they were given. So a buffer may be given to the next unit as soon as
writing out the last one was ordered. On a CPU a job copies, or reads into the buffer directly. On CUDA a job orders
copies on a side stream, which waits for the stream of the computation, and the computation waits for it. All copies go
through this one stream, so they keep the order of the jobs. The processor runs ahead of it: before it reads or
overwrites memory that copies use, it waits for them.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.streaming.homes import Home, HostBuffer
from sophia_galore.streaming.units import Key, Piece
from sophia_galore.weights.safetensors_layout import bytes_of

# Else torch rounds pinned memory up to a power of two: a unit could take almost twice its size.
_EXACT_SIZES = "pinned_max_round_threshold_mb:1,pinned_max_cached_size_mb:1"


class DeviceBuffer:
    """Memory of the compute device that units visit.

    Args:
        tensor: (bytes,) uint8.

    Attributes:
        content: The same bytes for direct access; None on a GPU.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.content = bytes_of(tensor) if tensor.device.type == "cpu" else None


class Lane(ABC):
    """Copies between the homes of units and buffers of the compute device."""

    @abstractmethod
    def host_buffer(self, num_bytes: int) -> HostBuffer:
        """Return zeroed host memory, pinned if the device is a GPU."""

    @abstractmethod
    def fetch(self, home: Home, piece: Piece, buffer: DeviceBuffer, place: slice) -> None:
        """Copy a piece into a buffer; called on the thread of the jobs.

        Args:
            home: Where it is.
            piece: The piece.
            buffer: The buffer.
            place: Its bytes there.
        """

    @abstractmethod
    def fetch_rows(self, home: Home, key: Key, rows: Sequence[int], buffer: DeviceBuffer) -> None:
        """Copy single rows of a tensor into a buffer, one after the other; called on the thread of the jobs.

        Args:
            home: Where it is.
            key: The tensor.
            rows: Row numbers, sorted.
            buffer: The buffer, of the size of these rows.
        """

    @abstractmethod
    def write_back(self, home: Home, piece: Piece, buffer: DeviceBuffer, place: slice) -> None:
        """Copy a piece from a buffer to its home; arguments as for `fetch`."""

    @abstractmethod
    def now(self) -> object:
        """Return a mark of what the calling thread ordered so far on the device."""

    @abstractmethod
    def wait_here(self, mark: object) -> None:
        """Let what the calling thread orders next on the device wait for a mark of the jobs."""

    @abstractmethod
    def begin(self, after: object) -> None:
        """Begin a job: its copies wait for what was ordered before a mark."""

    @abstractmethod
    def end(self) -> object:
        """End a job; return a mark of its copies."""

    @abstractmethod
    def enter_thread(self) -> None:
        """Prepare the thread that the jobs run on; called there, before the first of them."""

    @abstractmethod
    def finish(self) -> None:
        """Let the calling thread wait for all copies that were ordered: then it may read what they wrote."""


class CpuLane(Lane):
    """The compute device is the CPU: bytes are copied or read where they are used."""

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        """See `Lane`."""
        # Made by numpy: tensors on a CPU count as memory of the compute device.
        return HostBuffer(np.zeros(num_bytes, np.uint8).data)

    def fetch(self, home: Home, piece: Piece, buffer: DeviceBuffer, place: slice) -> None:
        """See `Lane`."""
        assert buffer.content is not None
        home.read(piece, buffer.content[place])

    def fetch_rows(self, home: Home, key: Key, rows: Sequence[int], buffer: DeviceBuffer) -> None:
        """See `Lane`."""
        assert buffer.content is not None
        home.read_rows(key, rows, buffer.content)

    def write_back(self, home: Home, piece: Piece, buffer: DeviceBuffer, place: slice) -> None:
        """See `Lane`."""
        assert buffer.content is not None
        home.write(piece, buffer.content[place])

    def now(self) -> object:
        """See `Lane`; nothing on a CPU runs later than it is ordered."""
        return None

    def wait_here(self, mark: object) -> None:
        """See `Lane`."""

    def begin(self, after: object) -> None:
        """See `Lane`."""

    def end(self) -> object:
        """See `Lane`."""
        return None

    def enter_thread(self) -> None:
        """See `Lane`."""

    def finish(self) -> None:
        """See `Lane`."""


class CudaLane(Lane):
    """The compute device is a GPU: a side stream copies from and to pinned memory.

    Args:
        device: The GPU.
        staging_bytes: Size of each of two pinned buffers through which files and single rows pass: of the largest piece
            that is read from a file, and of at least one row.
    """

    def __init__(self, device: torch.device, staging_bytes: int) -> None:
        _pin_exact_sizes()
        self._stream = torch.cuda.Stream(device)
        self._device = device
        self._staging = [torch.empty(staging_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._busy: list[torch.cuda.Event | None] = [None, None]
        self._turn = 0

    def host_buffer(self, num_bytes: int) -> HostBuffer:
        """See `Lane`."""
        pinned = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=True)
        return HostBuffer(bytes_of(pinned), pinned)

    def fetch(self, home: Home, piece: Piece, buffer: DeviceBuffer, place: slice) -> None:
        """See `Lane`."""
        target, pinned = buffer.tensor[place], home.pinned(piece)
        if pinned is None:
            self._stage(target, partial(home.read, piece))
            return
        with torch.cuda.stream(self._stream):
            target.copy_(pinned, non_blocking=True)

    def fetch_rows(self, home: Home, key: Key, rows: Sequence[int], buffer: DeviceBuffer) -> None:
        """See `Lane`."""
        self.finish()  # the processor reads what earlier copies may still be writing
        size = home.unit.span(key).row_bytes
        at_once = len(self._staging[0]) // size
        for start in range(0, len(rows), at_once):
            some = rows[start : start + at_once]
            target = buffer.tensor[start * size : (start + len(some)) * size]
            self._stage(target, partial(home.read_rows, key, some))

    def write_back(self, home: Home, piece: Piece, buffer: DeviceBuffer, place: slice) -> None:
        """See `Lane`."""
        source, pinned = buffer.tensor[place], home.pinned(piece)
        with torch.cuda.stream(self._stream):
            if pinned is not None:
                pinned.copy_(source, non_blocking=True)
                return
            staged = self._next_staging(len(source))
            staged.copy_(source, non_blocking=True)
            self.finish()
            home.write(piece, bytes_of(staged))

    def now(self) -> object:
        """See `Lane`."""
        return torch.cuda.current_stream(self._device).record_event()

    def wait_here(self, mark: object) -> None:
        """See `Lane`."""
        if isinstance(mark, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(mark)

    def begin(self, after: object) -> None:
        """See `Lane`."""
        if isinstance(after, torch.cuda.Event):
            self._stream.wait_event(after)

    def end(self) -> object:
        """See `Lane`."""
        return self._stream.record_event()

    def enter_thread(self) -> None:
        """See `Lane`; else its device would be the first GPU, and using the side stream would take memory there."""
        torch.cuda.set_device(self._stream.device)

    def finish(self) -> None:
        """See `Lane`."""
        self._stream.synchronize()

    def _stage(self, target: Tensor, read: Callable[[memoryview], None]) -> None:
        """Read into a staging buffer, and order its copy to the device."""
        staged = self._next_staging(len(target))
        read(bytes_of(staged))
        with torch.cuda.stream(self._stream):
            target.copy_(staged, non_blocking=True)
            self._busy[self._turn] = self._stream.record_event()

    def _next_staging(self, num_bytes: int) -> Tensor:
        """Return the staging buffer whose last copy is longer ago, once that copy is done."""
        self._turn = 1 - self._turn
        if (busy := self._busy[self._turn]) is not None:
            busy.synchronize()
            self._busy[self._turn] = None
        if len(self._staging[self._turn]) < num_bytes:  # layer inputs, whose size is known only when they come
            self._staging[self._turn] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return self._staging[self._turn][:num_bytes]


def _pin_exact_sizes() -> None:
    """Let torch take no more pinned memory than is asked for, unless the user set how it is taken."""
    settings = torch._C._accelerator_getAllocatorSettings()
    if "pinned_max_" not in settings:
        torch._C._accelerator_setAllocatorSettings(f"{settings},{_EXACT_SIZES}" if settings else _EXACT_SIZES)


class Jobs:
    """Runs jobs one after the other, on a thread of their own.

    After a failure no further job is run, since it could use what the failed one left: each fails with the same error.

    Args:
        lane: Copies.
        in_background: Whether to use a thread; if not, each job runs when it is given.

    Attributes:
        waited_s: Seconds that the computation waited for jobs.
    """

    def __init__(self, lane: Lane, *, in_background: bool) -> None:
        self._lane = lane
        self._pool = ThreadPoolExecutor(1, "streaming", lane.enter_thread) if in_background else None
        self._failure: BaseException | None = None
        self.waited_s = 0.0

    def give(self, job: Callable[[], None], *, after: object = None) -> Future[object]:
        """Order a job.

        Args:
            job: What to do.
            after: A mark of the lane: the job's copies wait for it.

        Returns:
            The mark of the job's copies, once it has run; or its error.
        """
        if self._pool is not None:
            return self._pool.submit(self._run, job, after)
        began_s = time.perf_counter()
        done: Future[object] = Future()
        try:
            done.set_result(self._run(job, after))
        except BaseException as error:  # whoever waits for the job gets it
            done.set_exception(error)
        self.waited_s += time.perf_counter() - began_s
        return done

    def wait(self, job: Future[object]) -> None:
        """Wait for a job, on the host and, where its copies are still under way, on the device.

        Raises:
            RunError: A file is damaged.
            EnvironmentProblem: The system failed to read or write a file.
        """
        began_s = time.perf_counter()
        try:
            self._lane.wait_here(job.result())
        except OSError as error:
            raise EnvironmentProblem(
                f"Weights of this run can't be kept on disk: {error.strerror or error}.",
                "Free some space there, or choose another training.output_dir. Checkpoints are not affected: go on "
                "with --resume.",
            ) from error
        finally:
            self.waited_s += time.perf_counter() - began_s

    def close(self) -> None:
        """Wait for the last job and its copies, and end the thread."""
        if self._pool is not None:
            self._pool.shutdown()
        self._lane.finish()  # the buffers may be freed now

    def _run(self, job: Callable[[], None], after: object) -> object:
        if self._failure is not None:
            raise self._failure
        try:
            self._lane.begin(after)
            job()
            return self._lane.end()
        except BaseException as error:
            self._failure = error
            raise
