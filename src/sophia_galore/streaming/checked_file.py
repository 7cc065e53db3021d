"""A file of tensors that is read and written in place, and checked whenever a part of it is read.

Its checksums are in memory: the file belongs to one process. A part that differs from what was written (a flipped bit,
a file that was cut short or removed) is found before it is used.

A checkpoint keeps such a file by a hard link. The next write must not change what is linked, so it begins a new file;
what was not written anew is copied when the writes are committed.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from sophia_galore.errors import RunError
from sophia_galore.weights.safetensors_layout import FileLayout, read_all, write_all

# Zero bytes that are summed up at once.
_CHUNK_BYTES = 1 << 20


class CheckedFile:
    """A safetensors file with a checksum for each block of rows of a tensor.

    Args:
        path: The file; it is replaced by one whose tensors are zero.
        layout: Its layout.
        block_rows: Rows of a block by tensor; tensors that are left out are one block.

    Raises:
        OSError: The disk is full or not writable.
    """

    def __init__(self, path: Path, layout: FileLayout, block_rows: Mapping[str, int] | None = None) -> None:
        self.path, self.layout = path, layout
        self._blocks = {
            name: max(1, (block_rows or {}).get(name, 0) * span.row_bytes or span.num_bytes)
            for name, span in layout.spans.items()
        }
        self._sums = {name: list(self._zero_sums(name)) for name in layout.spans}
        self._begun: set[tuple[str, int]] | None = None  # the blocks that a new file has already
        self._create(path)

    def read(self, name: str, start: int, into: memoryview) -> None:
        """Read a part of a tensor.

        Args:
            name: The tensor.
            start: Its first byte, counted from the beginning of the tensor.
            into: Receives the bytes.

        Raises:
            RunError: The file is damaged, cut short or gone.
        """
        block, size = self._blocks[name], self.layout.spans[name].num_bytes
        low, high = start // block * block, min(-(-(start + len(into)) // block) * block, size)
        target = into if high - low == len(into) else memoryview(bytearray(high - low))
        numbers = range(low // block, -(-high // block))
        try:
            for path, first, last in self._stretches(name, numbers):
                with path.open("rb", buffering=0) as file:
                    content = target[first * block - low : last * block - low]
                    read_all(file, content, self._place(name, first * block))
        except EOFError as error:
            raise self._damaged("it was cut short") from error
        except FileNotFoundError as error:
            raise self._damaged("it is gone") from error
        for number in numbers:
            if zlib.crc32(target[number * block - low : (number + 1) * block - low]) != self._sums[name][number]:
                raise self._damaged(f"{name} is not what was written")
        if target is not into:
            into[:] = target[start - low : start - low + len(into)]

    def write(self, name: str, start: int, content: memoryview) -> None:
        """Write whole blocks of a tensor.

        Args:
            name: The tensor.
            start: The first byte, counted from the beginning of the tensor; the beginning of a block.
            content: The bytes; they end with a block, or with the tensor.

        Raises:
            OSError: The disk is full or not writable.
            RunError: The file is gone.
        """
        block, size = self._blocks[name], self.layout.spans[name].num_bytes
        assert start % block == 0 and (len(content) % block == 0 or start + len(content) == size)
        if self._begun is None and self._is_linked():
            self._begun = set()
            self._create(self._new)
        with (self.path if self._begun is None else self._new).open("r+b", buffering=0) as file:
            write_all(file, content, self._place(name, start))
        for low in range(0, len(content), block):
            number = (start + low) // block
            self._sums[name][number] = zlib.crc32(content[low : low + block])
            if self._begun is not None:
                self._begun.add((name, number))

    def commit(self) -> None:
        """Finish a new file, if one was begun: copy what was not written into it, and put it in place.

        Raises:
            OSError: The disk is full or not writable.
            RunError: The old file is damaged.
        """
        if self._begun is None:
            return
        with self._new.open("r+b", buffering=0) as file:
            for name, span in self.layout.spans.items():
                block = self._blocks[name]
                for number in range(len(self._sums[name])):
                    if (name, number) not in self._begun:
                        low = number * block
                        content = memoryview(bytearray(min(block, span.num_bytes - low)))
                        self.read(name, low, content)
                        write_all(file, content, self._place(name, low))
        os.replace(self._new, self.path)
        self._begun = None

    def keep_as(self, path: Path) -> None:
        """Keep the file as it is now under another name: by a hard link where the file system has them, else a copy.

        Args:
            path: The new name, on the same file system.

        Raises:
            OSError: There is no room for a copy.
        """
        assert self._begun is None
        try:
            os.link(self.path, path)
        except FileNotFoundError as error:
            raise self._damaged("it is gone") from error
        except OSError:
            shutil.copyfile(self.path, path)

    @property
    def _new(self) -> Path:
        return self.path.with_name(f"{self.path.name}.new")

    def _create(self, path: Path) -> None:
        with path.open("wb", buffering=0) as file:
            write_all(file, memoryview(self.layout.header), 0)
            file.truncate(self.layout.file_bytes)

    def _is_linked(self) -> bool:
        try:
            return self.path.stat().st_nlink > 1
        except FileNotFoundError as error:
            raise self._damaged("it is gone") from error

    def _stretches(self, name: str, numbers: range) -> Iterator[tuple[Path, int, int]]:
        """Yield the files of some blocks, each with the first of its blocks and the one after the last."""
        if self._begun is None:
            yield self.path, numbers.start, numbers.stop
            return
        for number in numbers:
            yield self._new if (name, number) in self._begun else self.path, number, number + 1

    def _place(self, name: str, start: int) -> int:
        return len(self.layout.header) + self.layout.spans[name].start + start

    def _zero_sums(self, name: str) -> Iterator[int]:
        size, block = self.layout.spans[name].num_bytes, self._blocks[name]
        whole = _crc_of_zeros(block)
        for low in range(0, size, block):
            yield whole if low + block <= size else _crc_of_zeros(size - low)

    def _damaged(self, what: str) -> RunError:
        return RunError(
            f"The file {self.path}, which holds weights of this run, is damaged: {what}.",
            "Checkpoints are not affected: go on with --resume. If it happens again, check the disk.",
        )


def _crc_of_zeros(size: int) -> int:
    found, zeros = 0, bytes(_CHUNK_BYTES)
    while size:
        found = zlib.crc32(zeros[: min(size, _CHUNK_BYTES)], found)
        size -= min(size, _CHUNK_BYTES)
    return found
