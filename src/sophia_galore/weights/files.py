"""The files that hold weights: reading them into a store, converting them, writing them."""

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
# What else may stand behind a name: the update of a weight that is not in its codes yet.
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

    Each tensor is converted as it is read, so that the model never exists twice. What is in eight bits already, in
    the same format, is taken as it is.

    Args:
        folder: The model's folder.
        shapes: Name and shape of each parameter that the model has.
        tied_head: Name under which a file may hold a second copy of the tied embedding; it is left out.
        dtype: The store's dtype.
        device: Where the store lives.
        int8: Names of the weights that are held in eight bits instead.
        form: In which format these are.
        without_updates: Leave out updates that are not in the codes yet: a run that goes on has them among its
            optimizer's state.
        frozen: What puts weights into bitsandbytes' modules, and which; those are neither in `dtype` nor in `form`.
        as_packed: Leave what is in eight bits already as it is, in whichever format.

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


def open_store(folder: Path, device: torch.device) -> WeightStore:
    """Read a model folder into a store, each weight in its own format; for frozen ones no bitsandbytes is needed.

    Args:
        folder: The model's folder.
        device: Where the store lives.

    Raises:
        ModelError: As for `read_weights`.
    """
    return WeightStore({name: convert(weight, None, device) for _, name, weight in read_weights(folder)})


def convert(weight: Weight, target: torch.dtype | Int8Format | None, device: torch.device) -> Weight:
    """Return a weight in another format, or a copy in the same one; eight bits are rounded to nearest.

    But a deferred update goes into codes of the same format without bias, as it would at the next refresh: it is
    smaller than a code nearly everywhere, and would be lost to nearest.

    Args:
        weight: As it was read.
        target: The format; None: the weight's own.
        device: Where the result lives.
    """
    if target is None:
        return weight.copied_to(device)
    if not isinstance(target, Int8Format):
        # A copy: a tensor that is not converted would still be a view of the mapped file.
        return PlainWeight(weight.values(target).to(device, copy=weight.is_ready(target)))
    if isinstance(weight, DeferredWeight) and weight.base.form.block == target.block:
        return weight.rounded_in(target, device)
    if isinstance(weight, Int8Weight) and weight.form.block == target.block:
        return Int8Weight.copy_of(weight, target, device)
    # A plain tensor is widened by parts in there: the vocabulary's, in float32, would be larger than the store.
    return quantise(weight.values(weight.dtype), target, device)


def read_weights(folder: Path) -> Iterator[tuple[Path, str, Weight]]:
    """Yield the weights of a model folder one by one: file, name, and the weight, which may be a view of the mapped file.

    Raises:
        ModelError: A file is missing or damaged, or codes and scales do not belong together.
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
                # Opened anew each time: pages of a mapped file stay resident until it is closed. No mode counts them.
                with safe_open(path, framework="pt") as file, _disable_current_modes():
                    parts = {end: file.get_tensor(name + end) for end in ("", *_ENDINGS, ABSMAX) if name + end in names}
                yield path, name, _joined(path, name, parts, form)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{path} is damaged: {error}", repair_hint(folder)) from error


def _joined(path: Path, name: str, parts: dict[str, Tensor], form: Int8Format | None) -> Weight:
    """Return a weight from its tensors in a file, by what stands behind its name there."""
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

    Where one is in eight bits, the file has another name, so that programs that know nothing of codes and scales
    find no weights rather than wrong ones.

    Args:
        folder: An existing folder.
        weights: Name to weight; each is brought to the CPU, one copy if it is elsewhere.

    Raises:
        RunError: A weight that a module of bitsandbytes holds is not as it was made; nothing is written.
    """
    from safetensors.torch import save_file

    store = WeightStore(weights)
    for name, weight in store.items():
        if weight.held_by_module and (problem := weight.problem()):
            raise RunError(f"{name} {problem}, so it is not saved.")
    tensors = {key: tensor.to("cpu").contiguous() for key, tensor in store.tensors().items()}
    forms = [weight.settled.form for _, weight in store.items() if isinstance(weight.settled, Int8Weight)]
    # One entry at most: safetensors writes several in an order that changes from file to file.
    metadata = {_BLOCK_SIZE: str(forms[0].block)} if forms else {"format": "pt"}
    is_packed = any(weight.is_packed for _, weight in store.items())
    save_file(tensors, folder / (INT8_FILE if is_packed else "model.safetensors"), metadata=metadata)
