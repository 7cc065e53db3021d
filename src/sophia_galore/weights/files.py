"""Read weight files into a store, convert weights, and write them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch

from sophia_galore.errors import ModelError, RunError
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.records.files import INT8_FILE, MODEL
from sophia_galore.weights.bitsandbytes import QUANTISED_FROM, Freezer
from sophia_galore.weights.deferred import DeferredWeight
from sophia_galore.weights.int8 import Int8Format, Int8Weight, quantise
from sophia_galore.weights.layout import Layout
from sophia_galore.weights.manifest import repair_hint
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.row_int8 import RowInt8Weight
from sophia_galore.weights.safetensors_layout import TensorKind
from sophia_galore.weights.saved import BLOCK_SIZE, SCALES, SavedWeight, matching_weights
from sophia_galore.weights.store import WeightStore
from sophia_galore.weights.tensor_stream import SHARD_BYTES, Block, FinishedFile, TensorStream, blocks_of, write_stream
from sophia_galore.weights.weight import Weight

_INT8 = Int8Format()
_CPU = torch.device("cpu")
_ALL = slice(None)

Form = torch.dtype | Int8Format | None
"""A format to convert weights to; None: the one that they have."""


class NamedWeights(Protocol):
    """Weights that are written into files: a `WeightStore`, or those of a folder."""

    def items(self) -> Iterable[tuple[str, Weight]]:
        """Return the names and weights, for their shapes and formats; their tensors may be on the meta device."""

    def finished(self) -> Sequence[FinishedFile]:
        """Return files that hold the tensors of some weights as they are."""

    def opened(self) -> Iterator[tuple[str, Callable[[], Weight]]]:
        """Yield, for the same weights one after the other, a function that returns it for one block of its rows.

        What it returns is valid until it is called again or the next weight is asked for.
        """


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
    elsewhere: Collection[str] = (),
    settle: Callable[[str, Weight], Weight] = lambda name, weight: weight,
    layout: Layout | None = None,
) -> WeightStore:
    """Read a model folder's safetensors into a store, weight by weight and large ones by rows.

    Rows are converted as they are read, so that beside the store some rows of one weight are in memory. Weights that
    are already in the same eight-bit format are copied.

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
        elsewhere: Names of the weights that live elsewhere; they are converted in host memory.
        settle: Takes each weight to where it lives, and returns what stands for it in the store.
        layout: What the folder's tensors are in the model; None: its weights under the same names.

    Returns:
        The store.

    Raises:
        ModelError: A tensor is missing, unknown, of another shape or not finite, or a file is damaged.
    """
    weights: dict[str, Weight] = {}
    for saved in matching_weights(folder, shapes, tied_head, layout.read if layout else iter):
        path, name = saved.path, saved.name
        freezes = frozen is not None and name in frozen.names
        target = QUANTISED_FROM if freezes else form if name in int8 else dtype
        keeps = as_packed and saved.kind.is_packed
        if freezes and isinstance(saved.kind, RowInt8Weight):
            weight = saved.opened()
        else:
            place = _CPU if freezes or name in elsewhere else device
            weight = _loaded(saved, None if keeps else target, place, without_update=without_updates)
        if not weight.is_finite():
            raise ModelError(
                f"{path}: {name} holds values that are not finite in "
                f"{'int8' if isinstance(target, Int8Format) else target}.",
                f"Take a format of a wider range. If it is float32 already, the weights are broken: "
                f"{repair_hint(folder)}",
            )
        weights[name] = frozen.freeze(name, weight) if frozen and freezes else settle(name, weight)
    return WeightStore({name: weights[name] for name in shapes})


def _loaded(saved: SavedWeight, target: Form, device: torch.device, *, without_update: bool) -> Weight:
    """Return a weight of a file in another format, made by rows."""

    def opened() -> Weight:
        weight = saved.opened()
        return weight.settled if without_update else weight

    kind = saved.kind.settled if without_update else saved.kind
    if not kind.shape or (target is None and isinstance(kind, DeferredWeight)):
        return convert(opened(), target, device)
    kinds = _kinds(kind, target).items()
    parts = {ending: torch.empty(shape, dtype=dtype, device=device) for ending, (dtype, shape) in kinds}
    if target is None:
        made, is_copy = kind.with_tensors(parts), True
    elif isinstance(target, Int8Format):
        made = Int8Weight(parts[""], parts[SCALES], target)
        is_copy = isinstance(kind, Int8Weight) and kind.int8_block == target.block
    else:
        made, is_copy = PlainWeight(parts[""]), not kind.is_packed
    for rows in row_blocks(kind.shape):
        made[rows].copy_(opened()[rows] if is_copy else convert(opened(), target, device, rows))
    return made


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


def save_weights(
    folder: Path,
    weights: NamedWeights,
    form_of: Callable[[Weight], Form] = lambda weight: None,
    *,
    carried: NamedWeights | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights into a folder, as `read_weights` reads them, one after the other and large ones by rows.

    If one is in eight bits, the file has another name, so that other programs find no weights instead of wrong ones.

    Args:
        folder: An existing folder. If this fails, files in it are half written.
        weights: The weights, on any device.
        form_of: Returns the format in which a weight is written; a converted one must be finite.
        carried: Further tensors, which are written as they are.
        shard_bytes: Most bytes in a file; more are written into several, with an index.

    Raises:
        RunError: A weight in a module of bitsandbytes was changed; nothing is written.
        ModelError: A weight is not finite in its format.
    """
    block: int | None = None
    is_packed = converts = False
    for name, weight in weights.items():
        _refuse_changed(name, weight)
        target = form_of(weight)
        is_packed |= len(_kinds(weight, target)) > 1
        converts |= target is not None
        if isinstance(target, Int8Format):
            block = block or target.block
        elif target is None:
            block = block or weight.int8_block
    stream = _followed_by(_stream_of(weights, form_of), carried)
    write_stream(
        folder,
        (INT8_FILE if is_packed else MODEL).removesuffix(".safetensors"),
        stream if converts else replace(stream, finished=weights.finished()),
        metadata=file_metadata(block),
        shard_bytes=shard_bytes,
    )


def save_in_layout(
    folder: Path,
    layout: Layout,
    weights: NamedWeights,
    lend: Callable[[str], AbstractContextManager[Callable[[], Weight]]],
    dtype_of: Callable[[Weight], torch.dtype],
    *,
    carried: NamedWeights | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write weights into a folder under the names and in the shapes of another folder, one conversion at a time.

    Args:
        folder: An existing folder. If this fails, files in it are half written.
        layout: What the tensors of the other folder are in the model.
        weights: The weights, for their shapes and formats.
        lend: Lends a weight by its name: a function that returns it for one block of rows.
        dtype_of: Returns the precision in which a weight is written; it must be finite in it.
        carried: Further tensors, which are written as they are.
        shard_bytes: Most bytes in a file; more are written into several, with an index.

    Raises:
        RunError: A weight in a module of bitsandbytes was changed; nothing is written.
        ModelError: A weight is not finite in its precision.
    """
    kinds = dict(weights.items())
    for name, weight in kinds.items():
        _refuse_changed(name, weight)
    shapes = {name: tuple(weight.shape) for name, weight in kinds.items()}

    def values(name: str) -> Iterator[Block]:
        with lend(name) as opened:
            yield from _blocks(name, opened, dtype_of)

    groups = [group for one in layout.conversions for group in one.groups(shapes, lambda name: dtype_of(kinds[name]))]
    stream = TensorStream(groups, lambda: (block for one in layout.conversions for block in one.blocks(values, shapes)))
    write_stream(
        folder,
        MODEL.removesuffix(".safetensors"),
        _followed_by(stream, carried),
        metadata=file_metadata(None),
        shard_bytes=shard_bytes,
    )


def _stream_of(weights: NamedWeights, form_of: Callable[[Weight], Form] = lambda weight: None) -> TensorStream:
    """Return the tensors of weights, each in its format."""
    return TensorStream(
        [
            {name + ending: kind for ending, kind in _kinds(weight, form_of(weight)).items()}
            for name, weight in weights.items()
        ],
        lambda: (block for name, opened in weights.opened() for block in _blocks(name, opened, form_of)),
    )


def _followed_by(stream: TensorStream, carried: NamedWeights | None) -> TensorStream:
    """Return a stream with further tensors behind it, which are written as they are."""
    if carried is None:
        return stream
    more = _stream_of(carried)
    return replace(stream, groups=[*stream.groups, *more.groups], blocks=lambda: chain(stream.blocks(), more.blocks()))


def _refuse_changed(name: str, weight: Weight) -> None:
    if weight.held_by_module and (problem := weight.problem()):
        raise RunError(f"{name} {problem}, so it is not saved.")


def file_metadata(block: int | None) -> dict[str, str]:
    """Return the metadata of a file of weights.

    Args:
        block: Number of elements that share a scale, if weights in it are in eight bits.
    """
    return {BLOCK_SIZE: str(block)} if block else {"format": "pt"}


def _kinds(weight: Weight, form: Form) -> dict[str, TensorKind]:
    """Return dtypes and shapes of a weight's tensors in a format, by suffix; no values are read."""
    if form is None:
        return {ending: (tensor.dtype, tuple(tensor.shape)) for ending, tensor in weight.tensors().items()}
    shape = tuple(weight.shape)
    if not isinstance(form, Int8Format):
        return {"": (form, shape)}
    return {"": (torch.int8, shape), SCALES: (torch.bfloat16, (shape[0], form.num_scales(shape[1])))}


def _blocks(name: str, opened: Callable[[], Weight], form_of: Callable[[Weight], Form]) -> Iterator[Block]:
    """Yield the tensors of a weight in a format, by rows."""
    weight = opened()
    form, shape = form_of(weight), weight.shape
    if form is None:
        settled = weight.settled
        for rows in row_blocks(weight.shape) if weight.shape else (_ALL,):
            for ending, tensor in (settled[rows] if weight.shape else settled).tensors().items():
                yield Block(name + ending, tensor, rows.start or 0)
        update = weight.update_tensors() if isinstance(weight, DeferredWeight) else {}
        for ending, tensor in update.items():
            yield from blocks_of(name + ending, tensor)
        return
    del weight
    for rows in row_blocks(shape) if shape else (_ALL,):
        yield from _converted(name, opened(), form, rows)


def _converted(name: str, weight: Weight, form: Form, rows: slice) -> Iterator[Block]:
    made = convert(weight, form, _CPU, rows)
    if not made.is_finite():
        raise ModelError(
            f"{name} holds values that are not finite in {'int8' if isinstance(form, Int8Format) else form}.",
            "Take bf16 or fp32; if it is that already, the model's weights are broken.",
        )
    for ending, tensor in made.tensors().items():
        yield Block(name + ending, tensor, rows.start or 0)
