"""Read weight files into a store, convert weights, and write them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sophia_galore.errors import ModelError, RunError
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.records.files import INT8_FILE, MODEL
from sophia_galore.weights.bitsandbytes import QUANTISED_FROM, Freezer
from sophia_galore.weights.deferred import DeferredWeight
from sophia_galore.weights.folder import INVERSE_FREQUENCIES, weight_files
from sophia_galore.weights.int8 import Int8Format, Int8Weight, quantise
from sophia_galore.weights.manifest import repair_hint
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.row_int8 import ABSMAX, RowInt8Weight
from sophia_galore.weights.safetensors_header import torch_dtype
from sophia_galore.weights.safetensors_layout import TensorKind
from sophia_galore.weights.store import WeightStore
from sophia_galore.weights.tensor_stream import SHARD_BYTES, Block, TensorStream, blocks_of, write_stream
from sophia_galore.weights.weight import Weight

_SCALES = ".scales"
# Suffixes for the tensors of a deferred update.
_UPDATE = (".left", ".right", ".shrink")
_ENDINGS = (_SCALES, *_UPDATE)
_BLOCK_SIZE = "block_size"
_INT8 = Int8Format()
_CPU = torch.device("cpu")
_ALL = slice(None)

Form = torch.dtype | Int8Format | None
"""A format to convert weights to; None: the one that they have."""


class NamedWeights(Protocol):
    """Weights that are written into files: a `WeightStore`, or those of a folder."""

    def items(self) -> Iterable[tuple[str, Weight]]:
        """Return the names and weights, for their shapes and formats; their tensors may be on the meta device."""

    def each(self) -> Iterator[tuple[str, Weight]]:
        """Yield the same weights, one after the other; each is valid until the next one is asked for."""


class FolderWeights:
    """The weights of a model's folder, of which only one is in memory at a time.

    Args:
        folder: The folder.
        ignored: Whether a weight is left out, by its name.
    """

    def __init__(self, folder: Path, ignored: Callable[[str], bool]) -> None:
        self._folder, self._ignored = folder, ignored

    def items(self) -> Iterator[tuple[str, Weight]]:
        """Yield the names, and weights on the meta device."""
        return self._kept(_read(self._folder, _meta))

    def each(self) -> Iterator[tuple[str, Weight]]:
        """Yield each weight; it may be a view of the mapped file."""
        return self._kept(read_weights(self._folder))

    def _kept(self, found: Iterator[tuple[Path, str, Weight]]) -> Iterator[tuple[str, Weight]]:
        return ((name, weight) for _, name, weight in found if not self._ignored(name))


def load_store(
    folder: Path,
    shapes: Mapping[str, torch.Size],
    *,
    tied_head: str | None,
    dtype: torch.dtype,
    device: torch.device,
    int8: Collection[str] = (),
    form: Int8Format = _INT8,
    without_updates: bool = False,
    frozen: Freezer | None = None,
    as_packed: bool = False,
) -> WeightStore:
    """Read a model folder's safetensors into a store, tensor by tensor.

    Each tensor is converted as it is read, so that the model is never in memory twice. Weights that are already in
    the same eight-bit format are copied.

    Args:
        folder: The model's folder.
        shapes: Name and shape of each parameter of the model.
        tied_head: Name of a second copy of the tied embedding in files; it is ignored.
        dtype: The store's dtype.
        device: Device of the store.
        int8: Names of the weights that are stored in eight bits instead.
        form: The format of these.
        without_updates: Whether to ignore deferred updates, since a resumed run has them in its optimizer's state.
        frozen: Puts weights into modules of bitsandbytes; these have neither the format `dtype` nor `form`.
        as_packed: Whether weights that are already in eight bits keep their format.

    Returns:
        The store.

    Raises:
        ModelError: A tensor is missing, unknown, of another shape or not finite, or a file is damaged.
    """
    weights: dict[str, Weight] = {}
    for path, name, weight in read_weights(folder):
        if name == tied_head or name.endswith(INVERSE_FREQUENCIES):
            continue
        if name not in shapes:
            raise ModelError(
                f"{path} holds {name}, which this architecture does not have.",
                "config.json and the weights must belong to the same model.",
            )
        if weight.shape != shapes[name]:
            raise ModelError(
                f"{path}: {name} has shape {tuple(weight.shape)}, config.json says {tuple(shapes[name])}.",
                "config.json and the weights must belong to the same model.",
            )
        freezes = frozen is not None and name in frozen.names
        target = QUANTISED_FROM if freezes else form if name in int8 else dtype
        keeps = as_packed and weight.is_packed
        if without_updates:
            weight = weight.settled
        if not (freezes and isinstance(weight, RowInt8Weight)):
            weight = convert(weight, None if keeps else target, torch.device("cpu") if freezes else device)
        if not weight.is_finite():
            raise ModelError(
                f"{path}: {name} holds values that are not finite in "
                f"{'int8' if isinstance(target, Int8Format) else target}.",
                f"Take a format of a wider range. If it is float32 already, the weights are broken: "
                f"{repair_hint(folder)}",
            )
        weights[name] = frozen.freeze(name, weight) if frozen and freezes else weight
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weights, the first is {missing[0]}.", repair_hint(folder))
    return WeightStore({name: weights[name] for name in shapes})


def convert(weight: Weight, target: Form, device: torch.device, rows: slice = _ALL) -> Weight:
    """Return a weight in another format, or a copy in the same one; eight bits are rounded to nearest.

    But a deferred update is rounded stochastically into codes of the same format, as at the next refresh: almost all
    of it is smaller than a code, so rounding to nearest would lose it.

    Args:
        weight: The weight as it was read.
        target: The format; None: the weight's format.
        device: Device of the result.
        rows: The rows to convert, from `row_blocks`.
    """
    if isinstance(weight, DeferredWeight) and isinstance(target, Int8Format) and weight.int8_block == target.block:
        return weight.rounded_in(target, device, rows)
    if rows != _ALL:
        weight = weight[rows]
    if target is None:
        return weight.copied_to(device)
    if not isinstance(target, Int8Format):
        # A copy: a tensor that is not converted would still be a view of the mapped file.
        return PlainWeight(weight.values(target).to(device, copy=weight.is_ready(target)))
    if weight.int8_block == target.block:
        return Int8Weight.copy_of(weight, target, device)
    # `quantise` converts a plain tensor to float32 in parts: the whole embedding would be larger than the store.
    return quantise(weight.values(weight.dtype), target, device)


def read_weights(folder: Path) -> Iterator[tuple[Path, str, Weight]]:
    """Yield file, name and weight for each weight of a model folder; a weight may be a view of the mapped file.

    Raises:
        ModelError: A file is missing or damaged, or codes and scales do not match.
    """
    for path, name, weight in _read(folder, lambda file, key: file.get_tensor(key)):
        if weight.is_packed and (problem := weight.problem()):
            raise ModelError(f"{path}: {name} {problem}.", "Take another copy of the model.")
        yield path, name, weight


def _read(folder: Path, tensor_of: Callable[[Any, str], Tensor]) -> Iterator[tuple[Path, str, Weight]]:
    """Yield file, name and weight, with tensors from a function of an open file and the tensor's name."""
    from safetensors import SafetensorError, safe_open

    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names, metadata = list(file.keys()), file.metadata() or {}
            form = Int8Format(int(metadata[_BLOCK_SIZE])) if _BLOCK_SIZE in metadata else None
            for name in names:
                if (form and name.endswith(_ENDINGS)) or (name.endswith(ABSMAX) and name.removesuffix(ABSMAX) in names):
                    continue
                # Opened again for each weight: pages of a mapped file stay resident until it is closed.
                with safe_open(path, framework="pt") as file, _disable_current_modes():
                    parts = {end: tensor_of(file, name + end) for end in ("", *_ENDINGS, ABSMAX) if name + end in names}
                weight = _joined(path, name, parts, form)
                del parts
                yield path, name, weight
                del weight
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}", repair_hint(folder)) from error


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
    if form is None or _SCALES not in parts:
        raise ModelError(f"{path}: {name} is in eight bits, but its scales are not there.", repair_hint(path.parent))
    base = Int8Weight(parts[""], parts[_SCALES], form)
    return DeferredWeight(base, parts[".shrink"], lambda: (parts[".left"], parts[".right"])) if found else base


def save_weights(
    folder: Path,
    weights: NamedWeights,
    form_of: Callable[[Weight], Form] = lambda weight: None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights into a folder, as `read_weights` reads them, one after the other and large ones by rows.

    If one is in eight bits, the file has another name, so that other programs find no weights instead of wrong ones.

    Args:
        folder: An existing folder. If this fails, files in it are half written.
        weights: The weights, on any device.
        form_of: Returns the format in which a weight is written; a converted one must be finite.
        shard_bytes: Most bytes in a file; more are written into several, with an index.

    Raises:
        RunError: A weight in a module of bitsandbytes was changed; nothing is written.
        ModelError: A weight is not finite in its format.
    """
    groups: list[dict[str, TensorKind]] = []
    block: int | None = None
    is_packed = False
    for name, weight in weights.items():
        if weight.held_by_module and (problem := weight.problem()):
            raise RunError(f"{name} {problem}, so it is not saved.")
        target = form_of(weight)
        kinds = _kinds(weight, target)
        groups.append({name + ending: kind for ending, kind in kinds.items()})
        is_packed |= len(kinds) > 1
        if isinstance(target, Int8Format):
            block = block or target.block
        elif target is None:
            block = block or weight.int8_block
    write_stream(
        folder,
        (INT8_FILE if is_packed else MODEL).removesuffix(".safetensors"),
        TensorStream(
            groups,
            lambda: (block for name, weight in weights.each() for block in _blocks(name, weight, form_of(weight))),
        ),
        metadata={_BLOCK_SIZE: str(block)} if block else {"format": "pt"},
        shard_bytes=shard_bytes,
    )


def _kinds(weight: Weight, form: Form) -> dict[str, TensorKind]:
    """Return dtypes and shapes of a weight's tensors in a format, by suffix; no values are read."""
    if form is None:
        return {ending: (tensor.dtype, tuple(tensor.shape)) for ending, tensor in weight.tensors().items()}
    shape = tuple(weight.shape)
    if not isinstance(form, Int8Format):
        return {"": (form, shape)}
    return {"": (torch.int8, shape), _SCALES: (torch.bfloat16, (shape[0], form.num_scales(shape[1])))}


def _blocks(name: str, weight: Weight, form: Form) -> Iterator[Block]:
    """Yield the tensors of a weight in a format, by rows."""
    if form is None:
        for ending, tensor in weight.tensors().items():
            yield from blocks_of(name + ending, tensor)
        return
    for rows in row_blocks(weight.shape) if weight.shape else (_ALL,):
        yield from _converted(name, weight, form, rows)


def _converted(name: str, weight: Weight, form: Form, rows: slice) -> Iterator[Block]:
    made = convert(weight, form, _CPU, rows)
    if not made.is_finite():
        raise ModelError(
            f"{name} holds values that are not finite in {'int8' if isinstance(form, Int8Format) else form}.",
            "Take bf16 or fp32; if it is that already, the model's weights are broken.",
        )
    for ending, tensor in made.tensors().items():
        yield Block(name + ending, tensor, rows.start or 0)
