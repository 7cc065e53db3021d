"""Weights in the files of a model's folder, of which only the rows that are used are in memory.

A file is mapped into memory, and a page of it that was read stays until the mapping ends. So a weight is opened again
for each block of its rows, which takes less than a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sophia_galore.errors import ModelError
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.weights.deferred import DeferredWeight
from sophia_galore.weights.folder import INVERSE_FREQUENCIES, weight_files
from sophia_galore.weights.int8 import Int8Format, Int8Weight
from sophia_galore.weights.manifest import repair_hint
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.row_int8 import ABSMAX, RowInt8Weight
from sophia_galore.weights.safetensors_header import torch_dtype
from sophia_galore.weights.tensor_stream import FinishedFile
from sophia_galore.weights.weight import Weight

SCALES = ".scales"
"""Suffix of a weight's name for its scales, if it is in eight bits."""
BLOCK_SIZE = "block_size"
"""Key of a file's metadata for the number of elements that share a scale."""

# Suffixes for the tensors of a deferred update.
_UPDATE = (".left", ".right", ".shrink")
_ENDINGS = (SCALES, *_UPDATE)


@dataclass(frozen=True)
class SavedWeight:
    """A weight in a file.

    Attributes:
        path: The file.
        name: The weight's name.
        kind: The weight on the meta device, for its shape and format.
        opened: Returns the weight as a view of the file, which is mapped again; to be dropped after one block of rows.
    """

    path: Path
    name: str
    kind: Weight
    opened: Callable[[], Weight]

    def copy_into(self, weight: Weight) -> None:
        """Copy it by rows into a weight of the same format, exactly; both without a deferred update."""
        for rows in row_blocks(weight.shape):
            weight.settled[rows].copy_(self.opened().settled[rows])

    def problem(self) -> str | None:
        """Return what is wrong with it, as text to follow its name; None: nothing is wrong."""
        blocks = list(row_blocks(self.kind.shape)) if all(part.ndim for part in self.kind.tensors().values()) else []
        if len(blocks) < 2:
            return self.opened().problem()
        # The last one without an end: scales may have more rows than codes.
        ends = [*blocks[:-1], slice(blocks[-1].start, None)]
        return next((problem for rows in ends if (problem := self.opened()[rows].problem())), None)


class FolderWeights:
    """Some of the tensors of a model's folder.

    Args:
        folder: The folder.
        names: Their names.
    """

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        self._folder, self._names = folder, frozenset(names)

    def items(self) -> Iterator[tuple[str, Weight]]:
        """Yield the names, and weights on the meta device."""
        return ((saved.name, saved.kind) for saved in _found(self._folder) if saved.name in self._names)

    def finished(self) -> Sequence[FinishedFile]:
        """Return nothing: the files have other tensors as well."""
        return ()

    def opened(self) -> Iterator[tuple[str, Callable[[], Weight]]]:
        """Yield the names, and functions that return views of the mapped file."""
        return ((saved.name, saved.opened) for saved in saved_weights(self._folder, self._names))


def saved_weights(folder: Path, names: Collection[str] | None = None) -> Iterator[SavedWeight]:
    """Yield each weight of a model folder, checked if it is in eight bits.

    Args:
        folder: The folder.
        names: The names of those that are wanted; None: all.

    Raises:
        ModelError: A file is missing or damaged, or codes and scales do not match.
    """
    for saved in _found(folder):
        if names is not None and saved.name not in names:
            continue
        if saved.kind.is_packed and (problem := saved.problem()):
            raise ModelError(f"{saved.path}: {saved.name} {problem}.", "Take another copy of the model.")
        yield saved


def matching_weights(
    folder: Path,
    shapes: Mapping[str, torch.Size],
    tied_head: str | None,
    read: Callable[[Iterable[SavedWeight]], Iterator[SavedWeight]] = iter,
) -> Iterator[SavedWeight]:
    """Yield the weights of a folder that holds those of a model, no more and no less.

    Args:
        folder: The model's folder.
        shapes: Name and shape of each parameter of the model.
        tied_head: Name of a second copy of the tied embedding in files; it is ignored.
        read: Makes the model's weights from those of the folder.

    Raises:
        ModelError: A tensor is missing, unknown or of another shape, or a file is damaged.
    """
    missing = dict.fromkeys(shapes)
    for saved in read(saved_weights(folder)):
        name = saved.name
        if name == tied_head or name.endswith(INVERSE_FREQUENCIES):
            continue
        if name not in shapes:
            raise ModelError(
                f"{saved.path} holds {name}, which this architecture does not have.",
                "config.json and the weights must belong to the same model.",
            )
        if saved.kind.shape != shapes[name]:
            raise ModelError(
                f"{saved.path}: {name} has shape {tuple(saved.kind.shape)}, config.json says {tuple(shapes[name])}.",
                "config.json and the weights must belong to the same model.",
            )
        missing.pop(name, None)
        yield saved
    if missing:
        first = next(iter(missing))
        raise ModelError(f"{folder} lacks {len(missing)} weights, the first is {first}.", repair_hint(folder))


def saved_kinds(folder: Path) -> dict[str, Weight]:
    """Return the weights of a folder on the meta device, by name; only the headers of its files are read.

    Raises:
        ModelError: A file is missing or damaged.
    """
    return {saved.name: saved.kind for saved in _found(folder)}


def read_weights(folder: Path) -> Iterator[tuple[Path, str, Weight]]:
    """Yield file, name and weight for each weight of a model folder; a weight may be a view of the mapped file.

    Raises:
        ModelError: A file is missing or damaged, or codes and scales do not match.
    """
    return ((saved.path, saved.name, saved.opened()) for saved in saved_weights(folder))


def _found(folder: Path) -> Iterator[SavedWeight]:
    """Yield each weight of a folder; only the headers of its files are read."""
    files: dict[Path, tuple[list[str], Int8Format | None]] = {}
    for path in weight_files(folder):
        with _mapped(path) as file:
            found, metadata = list(file.keys()), file.metadata() or {}
        files[path] = (found, Int8Format(int(metadata[BLOCK_SIZE])) if BLOCK_SIZE in metadata else None)
    # A file that was kept as it is has no deferred updates; they are in another one.
    updates = {name: path for path, (found, _) in files.items() for name in found if name.endswith(_UPDATE)}
    for path, (listed, form) in files.items():
        names = dict.fromkeys(listed)
        for name in names:
            if (form and name.endswith(_ENDINGS)) or (name.endswith(ABSMAX) and name.removesuffix(ABSMAX) in names):
                continue
            places = {end: path for end in ("", SCALES, ABSMAX) if name + end in names}
            places |= {end: updates[name + end] for end in _UPDATE if form and name + end in updates}
            read = _Reader(name, places, form)
            yield SavedWeight(path, name, read(_meta), read)


@dataclass(frozen=True)
class _Reader:
    """Reads one weight of a file.

    Args:
        name: The weight's name.
        places: The file of each of its tensors, by suffix.
        form: Its eight-bit format.
    """

    name: str
    places: Mapping[str, Path]
    form: Int8Format | None

    def __call__(self, tensor_of: Callable[[Any, str], Tensor] = lambda file, name: file.get_tensor(name)) -> Weight:
        """Return the weight, with tensors from a function of an open file and the tensor's name."""
        parts: dict[str, Tensor] = {}
        for path in dict.fromkeys(self.places.values()):
            with _mapped(path) as file:
                parts |= {end: tensor_of(file, self.name + end) for end, at in self.places.items() if at == path}
        return _joined(self.places[""], self.name, parts, self.form)


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    """Map a file; what goes wrong is damage to it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file, _disable_current_modes():
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is damaged: {error}", repair_hint(path.parent)) from error


def _meta(file: Any, name: str) -> Tensor:
    head = file.get_slice(name)
    return torch.empty(head.get_shape(), dtype=torch_dtype(head.get_dtype()), device="meta")


def _joined(path: Path, name: str, parts: dict[str, Tensor], form: Int8Format | None) -> Weight:
    """Return a weight from its tensors in a file, given by suffix."""
    if parts[""].dtype != torch.int8 and len(parts) == 1:
        return PlainWeight(parts[""])
    found = sum(end in parts for end in _UPDATE)
    if found not in (0, len(_UPDATE)):
        raise ModelError(f"{path}: {name} has a part of a remainder only.", "Take another copy of the model.")
    if ABSMAX in parts and not found:
        return RowInt8Weight(parts[""], parts[ABSMAX])
    if form is None or SCALES not in parts:
        raise ModelError(f"{path}: {name} is in eight bits, but its scales are not there.", repair_hint(path.parent))
    base = Int8Weight(parts[""], parts[SCALES], form)
    return DeferredWeight(base, parts[".shrink"], lambda: (parts[".left"], parts[".right"])) if found else base
