"""Where the tensors of a unit are between uses: in one buffer of host memory, or in two files."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sophia_galore.streaming.checked_file import CheckedFile
from sophia_galore.streaming.units import Key, Piece, Unit
from sophia_galore.weights.safetensors_layout import FileLayout

# Rows of a checksum in a file whose rows are read one by one: about this many bytes, so that the row of a token costs a
# small read. A power of two, by which blocks of rows can be divided.
_BLOCK_BYTES = 1 << 14
_MOST_ROWS = 64


@dataclass(frozen=True)
class HostBuffer:
    """Memory of the host.

    Args:
        content: Its bytes.
        pinned: The same memory as a tensor from which a GPU copies by itself; None without a GPU.
    """

    content: memoryview
    pinned: torch.Tensor | None = None


class Home(ABC):
    """The tensors of a unit between uses.

    Args:
        unit: The unit.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    @abstractmethod
    def read(self, piece: Piece, into: memoryview) -> None:
        """Read a piece.

        Args:
            piece: Which rows of which tensor.
            into: Receives the bytes.

        Raises:
            RunError: The file is damaged.
        """

    @abstractmethod
    def write(self, piece: Piece, content: memoryview) -> None:
        """Write a piece.

        Args:
            piece: Which rows of which tensor.
            content: The bytes.

        Raises:
            OSError: The disk is full or not writable.
        """

    @abstractmethod
    def commit(self) -> None:
        """Finish the writes since the last call."""

    def pinned(self, piece: Piece) -> torch.Tensor | None:
        """Return the bytes of a piece as pinned memory, which a GPU reads and writes by itself; None: there is none."""
        return None

    def read_rows(self, key: Key, rows: Sequence[int], into: memoryview) -> None:
        """Read single rows of a tensor.

        Args:
            key: The tensor.
            rows: Row numbers, sorted.
            into: Receives the rows, one after the other.

        Raises:
            RunError: The file is damaged.
        """
        size, done = self.unit.span(key).row_bytes, 0
        # Rows that follow each other are read together.
        for _, group in itertools.groupby(enumerate(rows), key=lambda pair: pair[1] - pair[0]):
            stretch = [row for _, row in group]
            stop = done + len(stretch) * size
            self.read(Piece(key, stretch[0], len(stretch)), into[done:stop])
            done = stop


class HostHome(Home):
    """A unit in host memory.

    Args:
        unit: The unit.
        buffer: Memory of `unit.host_bytes` bytes.
    """

    def __init__(self, unit: Unit, buffer: HostBuffer) -> None:
        super().__init__(unit)
        self._buffer = buffer

    def read(self, piece: Piece, into: memoryview) -> None:
        """See `Home`."""
        _copy(into, self._buffer.content[self.unit.host_place(piece)])

    def write(self, piece: Piece, content: memoryview) -> None:
        """See `Home`."""
        _copy(self._buffer.content[self.unit.host_place(piece)], content)

    def commit(self) -> None:
        """See `Home`; there is nothing to do."""

    def pinned(self, piece: Piece) -> torch.Tensor | None:
        """See `Home`."""
        return None if self._buffer.pinned is None else self._buffer.pinned[self.unit.host_place(piece)]


class DiskHome(Home):
    """A unit in files.

    Args:
        unit: The unit.
        folder: Where its files are written; it exists.
        number: Number of the unit, for the names of its files.

    Raises:
        OSError: The disk is full or not writable.
    """

    def __init__(self, unit: Unit, folder: Path, number: int) -> None:
        super().__init__(unit)
        self.files = {
            part: CheckedFile(
                folder / f"{part}-{number:05}.safetensors", layout, _block_rows(layout) if by_rows else None
            )
            for part, layout, by_rows in (
                ("weights", unit.layouts["weights"], unit.by_rows),
                ("state", unit.layouts["state"], False),
            )
            if layout.spans
        }

    def read(self, piece: Piece, into: memoryview) -> None:
        """See `Home`."""
        self.files[piece.key.part].read(piece.key.name, self.unit.rows_of(piece).start, into)

    def write(self, piece: Piece, content: memoryview) -> None:
        """See `Home`."""
        self.files[piece.key.part].write(piece.key.name, self.unit.rows_of(piece).start, content)

    def commit(self) -> None:
        """See `Home`."""
        for file in self.files.values():
            file.commit()


def _copy(into: memoryview, content: memoryview) -> None:
    # By numpy, which lets other threads run meanwhile.
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(content, np.uint8))


def _block_rows(layout: FileLayout) -> dict[str, int]:
    """Return how many rows share a checksum: the same for all tensors of a weight."""
    most = max(span.row_bytes for span in layout.spans.values())
    rows = _MOST_ROWS
    while rows > 1 and rows * most > _BLOCK_BYTES:
        rows //= 2
    return dict.fromkeys(layout.spans, rows)
