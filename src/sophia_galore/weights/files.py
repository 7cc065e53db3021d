"""Read weight files into a store, convert weights, and write them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sophia_galore.errors import ModelError, RunError
from sophia_galore.weights.bitsandbytes import QUANTISED_FROM, Freezer
from sophia_galore.weights.deferred import DeferredWeight
from sophia_galore.weights.folder import INT8_FILE, INVERSE_FREQUENCIES, weight_files
from sophia_galore.weights.int8 import Int8Format, Int8Weight, quantise
from sophia_galore.weights.manifest import repair_hint
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.row_int8 import ABSMAX, RowInt8Weight
from sophia_galore.weights.store import WeightStore
from sophia_galore.weights.weight import Weight

_SCALES = ".scales"
# Suffixes for the tensors of a deferred update.
_UPDATE = (".left", ".right", ".shrink")
_ENDINGS = (_SCALES, *_UPDATE)
_BLOCK_SIZE = "block_size"
_INT8 = Int8Format()


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


def convert(weight: Weight, target: torch.dtype | Int8Format | None, device: torch.device) -> Weight:
    """Return a weight in another format, or a copy in the same one; eight bits are rounded to nearest.

    But a deferred update is rounded stochastically into codes of the same format, as at the next refresh: almost all
    of it is smaller than a code, so rounding to nearest would lose it.

    Args:
        weight: The weight as it was read.
        target: The format; None: the weight's format.
        device: Device of the result.
    """
    if target is None:
        return weight.copied_to(device)
    if not isinstance(target, Int8Format):
        # A copy: a tensor that is not converted would still be a view of the mapped file.
        return PlainWeight(weight.values(target).to(device, copy=weight.is_ready(target)))
    if isinstance(weight, DeferredWeight) and weight.int8_block == target.block:
        return weight.rounded_in(target, device)
    if isinstance(weight, Int8Weight) and weight.form.block == target.block:
        return Int8Weight.copy_of(weight, target, device)
    # `quantise` converts a plain tensor to float32 in parts: the whole embedding would be larger than the store.
    return quantise(weight.values(weight.dtype), target, device)


def read_weights(folder: Path) -> Iterator[tuple[Path, str, Weight]]:
    """Yield file, name and weight for each weight of a model folder; a weight may be a view of the mapped file.

    Raises:
        ModelError: A file is missing or damaged, or codes and scales do not match.
    """
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
                    parts = {end: file.get_tensor(name + end) for end in ("", *_ENDINGS, ABSMAX) if name + end in names}
                yield path, name, _joined(path, name, parts, form)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}", repair_hint(folder)) from error


def _joined(path: Path, name: str, parts: dict[str, Tensor], form: Int8Format | None) -> Weight:
    """Return a weight from its tensors in a file, given by suffix."""
    if parts[""].dtype != torch.int8 and len(parts) == 1:
        return PlainWeight(parts[""])
    base: Int8Weight | RowInt8Weight
    if ABSMAX in parts:
        base = RowInt8Weight(parts[""], parts[ABSMAX])
    elif form is not None and _SCALES in parts:
        base = Int8Weight(parts[""], parts[_SCALES], form)
    else:
        raise ModelError(f"{path}: {name} is in eight bits, but its scales are not there.", repair_hint(path.parent))
    joined: Weight = base
    found = sum(end in parts for end in _UPDATE)
    if isinstance(base, Int8Weight) and found == len(_UPDATE):
        joined = DeferredWeight(base, parts[".shrink"], lambda: (parts[".left"], parts[".right"]))
    elif found:
        raise ModelError(f"{path}: {name} has a part of a remainder only.", "Take another copy of the model.")
    if problem := joined.problem():
        raise ModelError(f"{path}: {name} {problem}.", "Take another copy of the model.")
    return joined


def save_weights(folder: Path, weights: Mapping[str, Weight | Tensor]) -> None:
    """Write weights into a folder, as `read_weights` reads them.

    If one is in eight bits, the file has another name, so that other programs find no weights instead of wrong ones.

    Args:
        folder: An existing folder.
        weights: Name to weight; weights on other devices are copied to the CPU.

    Raises:
        RunError: A weight in a module of bitsandbytes was changed; nothing is written.
    """
    from safetensors.torch import save_file

    store = WeightStore(weights)
    for name, weight in store.items():
        if weight.held_by_module and (problem := weight.problem()):
            raise RunError(f"{name} {problem}, so it is not saved.")
    tensors = {key: tensor.to("cpu").contiguous() for key, tensor in store.tensors().items()}
    blocks = [weight.int8_block for _, weight in store.items() if weight.int8_block is not None]
    # At most one entry: safetensors writes several in random order.
    metadata = {_BLOCK_SIZE: str(blocks[0])} if blocks else {"format": "pt"}
    is_packed = any(weight.is_packed for _, weight in store.items())
    save_file(tensors, folder / (INT8_FILE if is_packed else "model.safetensors"), metadata=metadata)
