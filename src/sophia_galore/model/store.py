"""The weight store: where parameters live between uses."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sophia_galore.errors import ModelError, RunError
from sophia_galore.model.frozen import QUANTISED_FROM, Freezer, Frozen8bit
from sophia_galore.model.manifest import way_to_repair
from sophia_galore.model.weight_files import INT8_FILE, INVERSE_FREQUENCIES, weight_files
from sophia_galore.numerics.folded import FoldedTensor
from sophia_galore.numerics.int8 import Int8Format, Int8Tensor, Stored, materialise, quantise
from sophia_galore.numerics.random import generator
from sophia_galore.numerics.row_int8 import ABSMAX, RowInt8

_SCALES = ".scales"
# What else may stand behind a name: the low-rank remainder of a weight whose last updates are not in its codes yet.
_REMAINDER = (".left", ".right", ".shrink")
_ENDINGS = (_SCALES, *_REMAINDER)
_BLOCK_SIZE = "block_size"
_INT8 = Int8Format()

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WeightStore:
    """Named weights on one device, each in its own format.

    Args:
        weights: Name to stored weight; taken over, not copied.
    """

    def __init__(self, weights: Mapping[str, Stored]) -> None:
        self._weights = dict(weights)

    def __getitem__(self, name: str) -> Stored:
        """The stored weight itself: whoever changes it changes the model."""
        return self._weights[name]

    def __setitem__(self, name: str, weight: Stored) -> None:
        """Put another stored weight in a known one's place."""
        if name not in self._weights:
            raise KeyError(name)
        self._weights[name] = weight

    def items(self) -> Iterable[tuple[str, Stored]]:
        """Names and stored weights, in the model's order."""
        return self._weights.items()

    def names(self, prefix: str) -> list[str]:
        """Names of the weights that a module below this prefix has to be given, in the model's order.

        Those that modules hold themselves, frozen, are left out.
        """
        return [
            name
            for name, weight in self._weights.items()
            if name.startswith(f"{prefix}.") and not isinstance(weight, Frozen8bit)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that the store consists of, as a file keeps them: `name`, and beside codes their scales."""
        return {key: tensor for name, weight in self._weights.items() for key, tensor in _parts(name, weight)}

    def first_non_finite(self) -> str | None:
        """The first weight that holds a NaN or an infinity; None: there is none."""
        return next((name for name, weight in self._weights.items() if not is_finite(name, weight)), None)

    def plain_dtype(self) -> torch.dtype:
        """Precision of the weights that need no decoding."""
        return next(weight.dtype for weight in self._weights.values() if isinstance(weight, Tensor))

    def is_ready(self, name: str, dtype: torch.dtype) -> bool:
        """Whether a weight is stored as it is computed with, so that materialising it costs nothing."""
        weight = self._weights[name]
        return isinstance(weight, Tensor) and weight.dtype == dtype

    def materialise(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights in compute precision; where the store has that precision already, no copy is made.

        Args:
            names: Which weights.
            dtype: Compute precision.

        Returns:
            Name to tensor. Read only: may share memory with the store.
        """
        return {name: materialise(self._weights[name], dtype) for name in names}

    def rows(self, name: str, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Some rows of a weight in compute precision.

        Args:
            name: Which weight.
            rows: A slice, or (k,) int64 row numbers.
            dtype: Compute precision.

        Returns:
            (k, n). Read only: may share memory with the store.
        """
        return materialise(self._weights[name][rows], dtype)


def load_store(
    folder: Path,
    shapes: Mapping[str, torch.Size],
    *,
    tied_head: str | None,
    dtype: torch.dtype,
    device: torch.device,
    int8: Collection[str] = (),
    form: Int8Format = _INT8,
    without_remainders: bool = False,
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
        without_remainders: Leave out updates that are not in the codes yet: a run that goes on has them among its
            optimizer's state.
        frozen: What puts weights into bitsandbytes' modules, and which; those are neither in `dtype` nor in `form`.
        as_packed: Leave what is in eight bits already as it is, in whichever format.

    Returns:
        The store.

    Raises:
        ModelError: A tensor is missing, unknown, of another shape or not finite, or a file is damaged.
    """
    weights: dict[str, Stored] = {}
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
        keeps = as_packed and not isinstance(weight, Tensor)
        if without_remainders and isinstance(weight, FoldedTensor):
            weight = weight.base
        if not (freezes and isinstance(weight, RowInt8)):
            weight = convert(weight, None if keeps else target, torch.device("cpu") if freezes else device)
        if not is_finite(name, weight):
            raise ModelError(
                f"{path}: {name} holds values that are not finite in "
                f"{'int8' if isinstance(target, Int8Format) else target}.",
                f"Take a format of a wider range. If it is float32 already, the weights are broken: "
                f"{way_to_repair(folder)}",
            )
        weights[name] = frozen.freeze(name, weight) if frozen and freezes else weight
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise ModelError(f"{folder} lacks {len(missing)} weights, the first is {missing[0]}.", way_to_repair(folder))
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


def convert(weight: Stored, target: torch.dtype | Int8Format | None, device: torch.device) -> Stored:
    """A weight in another format, or a copy in the same one; eight bits are rounded to nearest.

    But a remainder goes into codes of the same format without bias, as it would at the next refresh: it is smaller
    than a code nearly everywhere, and would be lost to nearest.

    Args:
        weight: As it was read.
        target: The format; None: the weight's own.
        device: Where the result lives.
    """
    if target is None:
        if isinstance(weight, RowInt8):
            return weight.copied_to(device)
        if isinstance(weight, FoldedTensor):
            return _folded_copy(weight, device)
        target = weight.dtype if isinstance(weight, Tensor) else _form(weight) or _INT8
    if isinstance(target, Int8Format):
        if isinstance(weight, FoldedTensor) and weight.base.form.block == target.block:
            base = _int8_copy(weight.base, target, device)
            rounding = generator(0, "remainder", *weight.shape, device=device)
            base.write(weight.dequantise(torch.float32).to(device), rounding)
            return base
        if isinstance(weight, Int8Tensor) and weight.form.block == target.block:
            return _int8_copy(weight, target, device)
        # A plain tensor is widened by parts in there: the vocabulary's, in float32, would be larger than the store.
        plain = weight if isinstance(weight, Tensor) else materialise(weight, torch.float32)
        return quantise(plain, target, device)
    # A copy: a tensor that is not converted would still be a view of the mapped file.
    return materialise(weight, target).to(device, copy=isinstance(weight, Tensor) and weight.dtype == target)


def _int8_copy(weight: Int8Tensor, form: Int8Format, device: torch.device) -> Int8Tensor:
    return Int8Tensor(weight.codes.to(device, copy=True), weight.scales.to(device, copy=True), form)


def _folded_copy(weight: FoldedTensor, device: torch.device) -> FoldedTensor:
    left, right = (factor.to(device, copy=True) for factor in weight.factors())
    base = _int8_copy(weight.base, weight.base.form, device)
    return FoldedTensor(base, weight.shrink.to(device, copy=True), lambda: (left, right))


def read_weights(folder: Path) -> Iterator[tuple[Path, str, Stored]]:
    """The weights of a model folder one by one: file, name, and the weight, which may be a view of the mapped file.

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
            raise ModelError(f"{path} is damaged: {error}", way_to_repair(folder)) from error


def _joined(path: Path, name: str, parts: dict[str, Tensor], form: Int8Format | None) -> Stored:
    """A weight from its tensors in a file, by what stands behind its name there."""
    if parts[""].dtype != torch.int8 and len(parts) == 1:
        return parts[""]
    base: Int8Tensor | RowInt8
    if ABSMAX in parts:
        base = RowInt8(parts[""], parts[ABSMAX])
    elif form is not None and _SCALES in parts:
        base = Int8Tensor(parts[""], parts[_SCALES], form)
    else:
        raise ModelError(f"{path}: {name} is in eight bits, but its scales are not there.", way_to_repair(path.parent))
    joined: Int8Tensor | RowInt8 | FoldedTensor = base
    found = sum(end in parts for end in _REMAINDER)
    if isinstance(base, Int8Tensor) and found == len(_REMAINDER):
        joined = FoldedTensor(base, parts[".shrink"], lambda: (parts[".left"], parts[".right"]))
    elif found:
        raise ModelError(f"{path}: {name} has a part of a remainder only.", "Take another copy of the model.")
    if problem := joined.problem():
        raise ModelError(f"{path}: {name} {problem}.", "Take another copy of the model.")
    return joined


def save_weights(folder: Path, weights: Mapping[str, Stored]) -> None:
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

    for name, weight in weights.items():
        if isinstance(weight, Frozen8bit) and (problem := weight.problem()):
            raise RunError(f"{name} {problem}, so it is not saved.")
    tensors = {
        key: tensor.to("cpu").contiguous() for name, weight in weights.items() for key, tensor in _parts(name, weight)
    }
    forms = [form for weight in weights.values() if (form := _form(weight))]
    # One entry at most: safetensors writes several in an order that changes from file to file.
    metadata = {_BLOCK_SIZE: str(forms[0].block)} if forms else {"format": "pt"}
    plain = all(isinstance(weight, Tensor) for weight in weights.values())
    save_file(tensors, folder / ("model.safetensors" if plain else INT8_FILE), metadata=metadata)


def _form(weight: Stored) -> Int8Format | None:
    """The format of a weight in native eight bits; None: it is in another one."""
    if isinstance(weight, FoldedTensor):
        return weight.base.form
    return weight.form if isinstance(weight, Int8Tensor) else None


def _parts(name: str, weight: Stored) -> list[tuple[str, Tensor]]:
    """The tensors that a stored weight consists of, by the names that a file gives them."""
    if isinstance(weight, Tensor):
        return [(name, weight)]
    return [(name + ending, tensor) for ending, tensor in weight.tensors().items()]


def is_finite(name: str, weight: Stored) -> bool:
    """Whether all that a stored weight stands for is finite."""
    # The extremes are NaN if any entry is. Codes always are finite; their scales may not be.
    floats = [tensor for _, tensor in _parts(name, weight) if tensor.is_floating_point()]
    return all(math.isfinite(extreme) for tensor in floats for extreme in torch.aminmax(tensor))
