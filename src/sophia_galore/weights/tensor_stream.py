"""Named tensors that are written and read one after the other, in one safetensors file or in several.

What is written is announced before: the names, dtypes and shapes of all tensors. So the files are laid out first, and
no more than some rows of one tensor must be in memory at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.records.files import index_name
from sophia_galore.weights.safetensors_header import torch_dtype
from sophia_galore.weights.safetensors_layout import FileLayout, TensorKind, TensorWriter

SHARD_BYTES = 5 * 10**9
"""Tensors of more bytes than this are written into several files, as transformers does."""

Group = Mapping[str, TensorKind]
"""Dtype and shape of tensors by name; those of a group are in one file."""


class Block(NamedTuple):
    """Some rows of a tensor.

    Attributes:
        name: The tensor's name.
        rows: The rows; of a tensor without dimensions, itself.
        first: Number of the first of the rows.
    """

    name: str
    rows: Tensor
    first: int


@dataclass(frozen=True)
class FinishedFile:
    """A file that holds some tensors already.

    Args:
        kinds: Dtype and shape of its tensors.
        keep_as: Gives its content, as it is now, another name in the same file system.
    """

    kinds: Group
    keep_as: Callable[[Path], None]


@dataclass(frozen=True)
class TensorStream:
    """Named tensors that come one after the other.

    Args:
        groups: Dtypes and shapes of all tensors.
        blocks: Returns an iterator over their rows, in the order of the groups, all rows of a group before those of
            the next one; each block is valid until the next one is asked for.
        finished: Files that hold some of these tensors already, so that they need not be written.
    """

    groups: Sequence[Group]
    blocks: Callable[[], Iterator[Block]]
    finished: Sequence[FinishedFile] = ()

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> TensorStream:
        """Return a stream of tensors that are in memory.

        Args:
            tensors: The tensors by name, on any device.
        """
        groups = [{name: (tensor.dtype, tuple(tensor.shape))} for name, tensor in tensors.items()]
        return cls(groups, lambda: (block for name, tensor in tensors.items() for block in blocks_of(name, tensor)))

    @property
    def kinds(self) -> dict[str, TensorKind]:
        """Dtype and shape of each tensor by name."""
        return {name: kind for group in self.groups for name, kind in group.items()}

    def only(self, wanted: Callable[[str], bool]) -> TensorStream:
        """Return the stream of those tensors whose names are wanted."""
        groups = [{name: kind for name, kind in group.items() if wanted(name)} for group in self.groups]
        return TensorStream(
            [group for group in groups if group], lambda: (block for block in self.blocks() if wanted(block.name))
        )


def blocks_of(name: str, tensor: Tensor) -> Iterator[Block]:
    """Yield a tensor by blocks of rows, which are views of it; of an empty tensor, none."""
    if not tensor.ndim:
        yield Block(name, tensor, 0)
    elif tensor.numel():
        for rows in row_blocks(tensor.shape):
            yield Block(name, tensor[rows], rows.start)


def write_stream(
    folder: Path,
    stem: str,
    stream: TensorStream,
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    indexed: bool = True,
) -> None:
    """Write tensors into `STEM.safetensors`, or into `STEM-00001-of-0000N.safetensors` and so on with an index.

    Finished files of the stream are among them.

    Args:
        folder: An existing folder. If this fails, files in it are half written.
        stem: How the names of the files begin.
        stream: The tensors.
        metadata: Text for the header of each file; at most one entry, since the library writes several in any order.
        shard_bytes: Most bytes of tensors in a file; a larger group has a file of its own.
        indexed: Whether an index lists which of several files has a tensor; it is written last.

    Raises:
        OSError: The disk is full or not writable.
        ValueError: The stream does not yield what its groups announce.
    """
    there = {name for file in stream.finished for name in file.kinds}
    if there:
        stream = replace(stream.only(lambda name: name not in there), finished=stream.finished)
    written = _shards(stream.groups, shard_bytes)
    shards = [*written, *(file.kinds for file in stream.finished)]
    names = [
        f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else f"{stem}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, finished in zip(names[len(written) :], stream.finished, strict=True):
        finished.keep_as(folder / name)
    blocks = stream.blocks()
    for file, kinds in zip(names, written, strict=False):
        with TensorWriter(folder / file, FileLayout.of(kinds, metadata)) as writer:
            while not writer.is_complete:
                _write_next(writer, blocks)
    for block in blocks:
        raise ValueError(f"{block.name} has more rows than were announced")
    if indexed and len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(_group_bytes, shards))},
            "weight_map": {name: file for file, kinds in zip(names, shards, strict=True) for name in kinds},
        }
        path = folder / index_name(f"{stem}.safetensors")
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_stream(files: Iterable[Path]) -> TensorStream:
    """Return the tensors of safetensors files; only the headers are read until blocks are asked for.

    Args:
        files: The files.

    Raises:
        SafetensorError: A file is damaged.
        OSError: It can't be read.
    """
    from safetensors import safe_open

    places: list[tuple[Path, str]] = []
    groups: list[Group] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                head = file.get_slice(name)
                places.append((path, name))
                groups.append({name: (torch_dtype(head.get_dtype()), tuple(head.get_shape()))})

    def blocks() -> Iterator[Block]:
        for (path, name), group in zip(places, groups, strict=True):
            _, shape = group[name]
            for rows in row_blocks(shape) if shape else (slice(0),):
                # Opened again for each block: pages of a mapped file stay resident until it is closed.
                with safe_open(path, framework="pt") as file, _disable_current_modes():
                    tensor = file.get_tensor(name)
                if tensor.numel():
                    yield Block(name, tensor[rows] if shape else tensor, rows.start or 0)

    return TensorStream(groups, blocks)


def _write_next(writer: TensorWriter, blocks: Iterator[Block]) -> None:
    # A function of its own, so that nothing holds the block while the next one is made.
    for block in blocks:
        writer.write(*block)
        return
    raise ValueError("there are fewer tensors than were announced")


def _shards(groups: Sequence[Group], shard_bytes: int) -> list[dict[str, TensorKind]]:
    """Fill files in the order of the groups, each with as many as fit."""
    shards: list[dict[str, TensorKind]] = [{}]
    for group in groups:
        if shards[-1] and _group_bytes(shards[-1]) + _group_bytes(group) > shard_bytes:
            shards.append({})
        shards[-1].update(group)
    return shards


def _group_bytes(group: Group) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in group.values())
