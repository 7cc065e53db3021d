"""The layout of a safetensors file, known before its tensors are; and a writer that takes tensors in any order.

The library writes a file only from tensors that are all in memory. Here the header comes from names, dtypes and shapes,
so a model larger than memory can be written tensor by tensor, or by rows of a tensor. The bytes are those that the
library writes (`tests/unit/weights/test_safetensors_layout.py`).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from sophia_galore.weights.safetensors_header import PREFIX_BYTES, TORCH_DTYPES

TensorKind = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of a tensor."""

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(TORCH_DTYPES.values())}
_ALIGNMENT = 8


@dataclass(frozen=True)
class Span:
    """A tensor's place in the data of a file.

    Args:
        dtype: Its dtype.
        shape: Its shape.
        start: Its first byte, counted from the beginning of the data.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def num_bytes(self) -> int:
        """Its size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """The byte after its last one."""
        return self.start + self.num_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of a scalar, its bytes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True)
class FileLayout:
    """Where the tensors of a file are.

    Args:
        header: The bytes before the data.
        spans: The place of each tensor, in the order of the data.
    """

    header: bytes
    spans: Mapping[str, Span]

    @classmethod
    def of(
        cls,
        tensors: Mapping[str, TensorKind],
        metadata: Mapping[str, str] | None = None,
    ) -> FileLayout:
        """Lay out a file.

        Args:
            tensors: Dtype and shape of each tensor by name.
            metadata: Text for the header; None: none.
        """
        spans: dict[str, Span] = {}
        start = 0
        for name in sorted(tensors, key=lambda name: (_ORDER[tensors[name][0]], name)):
            dtype, shape = tensors[name]
            spans[name] = Span(dtype, tuple(shape), start)
            start = spans[name].stop
        entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        for name, span in spans.items():
            entries[name] = {
                "dtype": _NAMES[span.dtype],
                "shape": list(span.shape),
                "data_offsets": [span.start, span.stop],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(PREFIX_BYTES + len(text)) % _ALIGNMENT)
        return cls(struct.pack("<Q", len(text)) + text, spans)

    @property
    def kinds(self) -> dict[str, TensorKind]:
        """Dtype and shape of each tensor by name."""
        return {name: (span.dtype, span.shape) for name, span in self.spans.items()}

    @property
    def data_bytes(self) -> int:
        """Size of the data in bytes."""
        return max((span.stop for span in self.spans.values()), default=0)

    @property
    def file_bytes(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + self.data_bytes


class TensorWriter:
    """Writes a safetensors file tensor by tensor; a context manager.

    Args:
        path: The file; it is replaced.
        layout: Its layout.

    Raises:
        OSError: The disk is full or not writable.
    """

    def __init__(self, path: Path, layout: FileLayout) -> None:
        self._layout = layout
        self._left = {name: span.num_bytes for name, span in layout.spans.items()}
        self._left_bytes = layout.data_bytes
        self._file = path.open("wb", buffering=0)

    def __enter__(self) -> Self:
        """Write the header."""
        write_all(self._file, memoryview(self._layout.header), 0)
        return self

    @property
    def is_complete(self) -> bool:
        """Whether all bytes were written."""
        return self._left_bytes == 0

    def write(self, name: str, values: Tensor, first_row: int = 0) -> None:
        """Write a tensor, or some of its rows.

        Args:
            name: Its name.
            values: Its values in the dtype of the layout, on any device.
            first_row: Number of the first of the rows.
        """
        span = self._layout.spans[name]
        if values.dtype != span.dtype or values.shape[1:] != span.shape[1:]:
            raise ValueError(f"{name} is {values.dtype} {tuple(values.shape)} instead of {span.dtype} {span.shape}")
        content = bytes_of(values.detach().to("cpu").contiguous())
        write_all(self._file, content, len(self._layout.header) + span.start + first_row * span.row_bytes)
        self._left[name] -= len(content)
        self._left_bytes -= len(content)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file.

        Raises:
            ValueError: A tensor is missing.
        """
        self._file.close()
        missing = [name for name, left in self._left.items() if left]
        if missing and kind is None:
            raise ValueError(f"{missing[0]} (and {len(missing) - 1} more) was not written as a whole")


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, as a view."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def write_all(file: RawIOBase, content: memoryview, place: int) -> None:
    """Write bytes at a place of an open file; the system may take fewer at a time.

    Args:
        file: The file, without a buffer.
        content: The bytes.
        place: Where the first byte goes.

    Raises:
        OSError: The disk is full or not writable.
    """
    file.seek(place)
    while content:
        content = content[file.write(content) or 0 :]


def read_all(file: RawIOBase, into: memoryview, place: int) -> None:
    """Read bytes from a place of an open file.

    Args:
        file: The file, without a buffer.
        into: Receives the bytes.
        place: Where the first byte is.

    Raises:
        EOFError: The file is too short.
        OSError: It can't be read.
    """
    file.seek(place)
    while into:
        found = file.readinto(into)
        if not found:
            raise EOFError("the file is too short")
        into = into[found:]
