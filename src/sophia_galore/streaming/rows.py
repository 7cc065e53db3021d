"""A weight that never visits the compute device as a whole: an embedding or a head, block of rows by block of rows.

Blocks that follow each other are fetched ahead, into the other one of two buffers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.numerics.noise import Noise
from sophia_galore.streaming.homes import Home
from sophia_galore.streaming.lanes import DeviceBuffer, Jobs, Lane
from sophia_galore.streaming.streams import view_of
from sophia_galore.streaming.units import Key, Piece, Unit
from sophia_galore.weights.weight import Rows, Weight


@dataclass(eq=False)
class Visit:
    """A buffer and the rows in it."""

    buffer: DeviceBuffer
    owner: RowStream | None = None
    rows: slice | None = None
    fetch: Future[object] | None = None


class RowBuffers:
    """Two buffers for blocks of rows, which several weights use in turn.

    Args:
        num_bytes: Size of each.
        device: The compute device.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.device = device
        self.visits = [Visit(DeviceBuffer(torch.empty(num_bytes, dtype=torch.uint8, device=device))) for _ in range(2)]
        self.turn = 0

    def tensors(self) -> list[Tensor]:
        """Return the buffers."""
        return [visit.buffer.tensor for visit in self.visits]

    def find(self, owner: RowStream, rows: slice) -> Visit | None:
        """Return the buffer that holds a block of rows, and make it the last one in use; None: no buffer does."""
        for number, visit in enumerate(self.visits):
            if visit.owner is owner and visit.rows == rows:
                self.turn = number
                return visit
        return None

    def next(self) -> Visit:
        """Return the buffer that was not used last, and make it the last one in use."""
        self.turn = 1 - self.turn
        return self.visits[self.turn]

    @property
    def other(self) -> Visit:
        """The buffer that was not used last."""
        return self.visits[1 - self.turn]


class RowStream:
    """Fetches and writes back rows of one weight.

    Args:
        home: The home of the weight's unit.
        lane: Copies.
        jobs: Runs the copies.
        buffers: Where blocks of rows visit; large enough for `most_rows` rows.
        most_rows: Rows of the largest block.
    """

    def __init__(self, home: Home, lane: Lane, jobs: Jobs, buffers: RowBuffers, most_rows: int) -> None:
        self._home, self._lane, self._jobs, self._buffers = home, lane, jobs, buffers
        spans = home.unit.layouts["weights"].spans
        # In the order of the file: wide dtypes first, so that each tensor is aligned in a buffer.
        self._name, self._most_rows = home.unit.name, most_rows
        self._spans = {key.removeprefix(self._name): span for key, span in spans.items()}
        starts = itertools.accumulate((most_rows * span.row_bytes for span in self._spans.values()), initial=0)
        self._starts = dict(zip(self._spans, starts, strict=False))
        self._num_rows = next(iter(spans.values())).shape[0]

    @property
    def device(self) -> torch.device:
        """The compute device."""
        return self._buffers.device

    def blocks(self) -> Iterator[slice]:
        """Yield slices over all rows, each as large as a buffer."""
        for start in range(0, self._num_rows, self._most_rows):
            yield slice(start, min(start + self._most_rows, self._num_rows))

    def read(self, rows: slice) -> tuple[dict[str, Tensor], Visit]:
        """Return a block of rows by suffix, in a buffer; it stays valid until another block is read."""
        start, stop, _ = rows.indices(self._num_rows)
        rows = slice(start, stop)
        visit = self._buffers.find(self, rows)
        if visit is None:
            visit = self._buffers.next()
            self._fetch(visit, rows)
        if visit.fetch is not None:
            self._jobs.wait(visit.fetch)
            visit.fetch = None
        following = slice(stop, min(stop + stop - start, self._num_rows))
        other = self._buffers.other
        if following.start < following.stop and (other.owner, other.rows) != (self, following):
            self._fetch(other, following)
        tensors = {
            suffix: view_of(visit.buffer.tensor, self._starts[suffix], span.dtype, (stop - start, *span.shape[1:]))
            for suffix, span in self._spans.items()
        }
        return tensors, visit

    def gather(self, rows: Tensor) -> dict[str, Tensor]:
        """Return single rows by suffix, as new tensors.

        Args:
            rows: (k,) int64, sorted.
        """
        numbers = rows.tolist()
        found: dict[str, Tensor] = {}
        orders: list[tuple[Key, DeviceBuffer]] = []
        for suffix, span in self._spans.items():
            buffer = torch.empty(len(numbers) * span.row_bytes, dtype=torch.uint8, device=self.device)
            orders.append((Key("weights", self._name + suffix), DeviceBuffer(buffer)))
            found[suffix] = view_of(buffer, 0, span.dtype, (len(numbers), *span.shape[1:]))

        def job() -> None:
            for key, buffer in orders:
                self._lane.fetch_rows(self._home, key, numbers, buffer)

        self._jobs.wait(self._jobs.give(job, after=self._lane.now()))
        return found

    def write_back(self, visit: Visit, rows: slice) -> None:
        """Write a block of rows back, which was changed in its buffer.

        Args:
            visit: Its buffer, from `read`.
            rows: The rows.
        """
        for other in self._buffers.visits:
            if other is not visit and other.owner is self and other.rows is not None and _overlap(other.rows, rows):
                other.rows = None  # it was fetched before the change

        def job() -> None:
            for piece, place in self._pieces(rows):
                self._lane.write_back(self._home, piece, visit.buffer, place)

        self._jobs.give(job, after=self._lane.now())  # if it fails, every later job does

    def commit(self) -> None:
        """Finish the writes since the last call, and wait for them."""
        self._jobs.wait(self._jobs.give(self._home.commit))

    def _fetch(self, visit: Visit, rows: slice) -> None:
        if rows.stop - rows.start > self._most_rows:
            raise ValueError(f"{self._name}: a block of {rows.stop - rows.start} rows does not fit into its buffer")
        visit.owner, visit.rows = self, rows

        def job() -> None:
            for piece, place in self._pieces(rows):
                self._lane.fetch(self._home, piece, visit.buffer, place)

        # Whatever used this buffer, or its memory before, was ordered earlier.
        visit.fetch = self._jobs.give(job, after=self._lane.now())

    def _pieces(self, rows: slice) -> Iterator[tuple[Piece, slice]]:
        """Yield the pieces of a block of rows, each with its bytes in a buffer."""
        count = rows.stop - rows.start
        for suffix, span in self._spans.items():
            start = self._starts[suffix]
            piece = Piece(Key("weights", self._name + suffix), rows.start, count)
            yield piece, slice(start, start + count * span.row_bytes)


class _InForm(Weight):
    """A weight whose format, shape and tensors are those of another one.

    Args:
        form: The other one.
    """

    def __init__(self, form: Weight) -> None:
        self._form = form

    @property
    def format(self) -> str:
        """See `Weight`."""
        return self._form.format

    @property
    def dtype(self) -> torch.dtype:
        """See `Weight`."""
        return self._form.dtype

    @property
    def is_packed(self) -> bool:
        """See `Weight`."""
        return self._form.is_packed

    @property
    def int8_block(self) -> int | None:
        """See `Weight`."""
        return self._form.int8_block

    def tensors(self) -> dict[str, Tensor]:
        """See `Weight`."""
        return self._form.tensors()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Weight:
        """See `Weight`; the result is an ordinary weight."""
        return self._form.with_tensors(tensors)


class StreamedRows(_InForm):
    """A weight whose rows are elsewhere. Blocks of them can be read and written; the whole can't.

    Its tensors have no values: they are on the meta device, for shapes and dtypes.

    Args:
        form: A weight of the same format and shape without values, on the meta device.
        stream: Fetches and writes back its rows.
    """

    def __init__(self, form: Weight, stream: RowStream) -> None:
        super().__init__(form)
        self._stream = stream

    @property
    def device(self) -> torch.device:
        """The compute device, on which its rows are used."""
        return self._stream.device

    def is_ready(self, dtype: torch.dtype) -> bool:
        """See `Weight`; it never is there as a whole."""
        return False

    def __getitem__(self, rows: Rows) -> Weight:
        """See `Weight`; a block of rows stays valid until another one is asked for."""
        if isinstance(rows, Tensor):
            numbers, places = rows.unique(return_inverse=True)
            found = self._form.with_tensors(self._stream.gather(numbers))
            return found if torch.equal(numbers, rows) else found[places]
        tensors, visit = self._stream.read(rows)
        start, stop, _ = rows.indices(self.shape[0])
        return _Block(self._form.with_tensors(tensors), self._stream, visit, slice(start, stop))

    def values(self, dtype: torch.dtype) -> Tensor:
        """Raise an error: it is never there as a whole."""
        raise TypeError("a weight that is streamed by rows has no values as a whole; ask for its rows")

    def write(self, values: Tensor, noise: Noise | None) -> None:
        """Raise an error: its rows are written, not the whole."""
        raise TypeError("a weight that is streamed by rows can't be written as a whole; write its rows")

    def parts(self, *, change: bool = False) -> Iterator[Mapping[str, Tensor]]:
        """See `Weight`."""
        for rows in self._stream.blocks():
            tensors, visit = self._stream.read(rows)
            yield tensors
            if change:
                self._stream.write_back(visit, rows)
        if change:
            self._stream.commit()

    def copied_to(self, device: torch.device) -> Weight:
        """See `Weight`."""
        whole = {suffix: torch.empty_like(tensor, device=device) for suffix, tensor in self.tensors().items()}
        made = self._form.with_tensors(whole)
        for rows in self._stream.blocks():
            made[rows].copy_(self[rows])
        return made

    def copy_(self, other: Weight) -> None:
        """See `Weight`."""
        for rows in self._stream.blocks():
            self[rows].copy_(other[rows])
        self._stream.commit()

    def problem(self) -> str | None:
        """See `Weight`."""
        return next((found for rows in self._stream.blocks() if (found := self[rows].problem())), None)

    def is_finite(self) -> bool:
        """See `Weight`."""
        return all(self[rows].is_finite() for rows in self._stream.blocks())


class _Block(_InForm):
    """A block of rows in a buffer; what is written to it is written back.

    Args:
        inner: The rows as an ordinary weight, in the buffer.
        stream: Writes them back.
        visit: The buffer.
        rows: Which rows they are.
    """

    def __init__(self, inner: Weight, stream: RowStream, visit: Visit, rows: slice) -> None:
        super().__init__(inner)
        self._stream, self._visit, self._rows = stream, visit, rows

    def __getitem__(self, rows: Rows) -> Weight:
        """See `Weight`; to be read only."""
        return self._form[rows]

    def values(self, dtype: torch.dtype) -> Tensor:
        """See `Weight`."""
        return self._form.values(dtype)

    def write(self, values: Tensor, noise: Noise | None) -> None:
        """See `Weight`."""
        self._form.write(values, noise)
        self._stream.write_back(self._visit, self._rows)

    def copied_to(self, device: torch.device) -> Weight:
        """See `Weight`."""
        return self._form.copied_to(device)

    def copy_(self, other: Weight) -> None:
        """See `Weight`."""
        self._form.copy_(other)
        self._stream.write_back(self._visit, self._rows)

    def problem(self) -> str | None:
        """See `Weight`."""
        return self._form.problem()


def row_bytes(unit: Unit) -> int:
    """Return the bytes of one row of a unit whose weight comes by rows."""
    return sum(span.row_bytes for span in unit.layouts["weights"].spans.values())


def _overlap(one: slice, other: slice) -> bool:
    return bool(one.start < other.stop and other.start < one.stop)
