"""The weight store: where parameters live between uses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sophia_galore.errors import ModelError

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WeightStore:
    """Named weights in one format on one device.

    Args:
        weights: Name to tensor, all of the store's dtype; taken over, not copied.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = dict(weights)

    def __getitem__(self, name: str) -> Tensor:
        """The stored weight itself: whoever changes it changes the model."""
        return self._weights[name]

    def items(self) -> Iterable[tuple[str, Tensor]]:
        """Names and stored weights, in the model's order."""
        return self._weights.items()

    def names(self, prefix: str) -> list[str]:
        """Names of the weights below a module, in the model's order."""
        return [name for name in self._weights if name.startswith(f"{prefix}.")]

    def first_non_finite(self) -> str | None:
        """The first weight that holds a NaN or an infinity; None: there is none."""
        for name, weight in self._weights.items():
            if not _is_finite(weight):
                return name
        return None

    def materialise(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights in compute precision; where the store has that precision already, no copy is made.

        Args:
            names: Which weights.
            dtype: Compute precision.

        Returns:
            Name to tensor. Read only: may share memory with the store.
        """
        return {name: self._weights[name].to(dtype) for name in names}


def load_store(
    folder: Path, shapes: Mapping[str, torch.Size], *, tied_head: str | None, dtype: torch.dtype, device: torch.device
) -> WeightStore:
    """Read a model folder's safetensors into a store, tensor by tensor.

    Each tensor is converted as it is read, so that the model never exists twice.

    Args:
        folder: The model's folder.
        shapes: Name and shape of each parameter that the model has.
        tied_head: Name under which a file may hold a second copy of the tied embedding; it is left out.
        dtype: The store's dtype.
        device: Where the store lives.

    Returns:
        The store.

    Raises:
        ModelError: A tensor is missing, unknown, of another shape or not finite, or a file is damaged.
    """
    weights: dict[str, Tensor] = {}
    for path, name, tensor in _tensors(folder):
        if name == tied_head or name.endswith("rotary_emb.inv_freq"):
            continue
        if name not in shapes:
            raise ModelError(
                f"{path} holds {name}, which this architecture does not have.",
                "config.json and the weights must belong to the same model.",
            )
        if tensor.shape != shapes[name]:
            raise ModelError(
                f"{path}: {name} has shape {tuple(tensor.shape)}, config.json says {tuple(shapes[name])}.",
                "config.json and the weights must belong to the same model.",
            )
        # clone: a tensor that is not converted would still be a view of the mapped file.
        converted = tensor.to(device=device, dtype=dtype)
        weights[name] = converted.clone() if converted.data_ptr() == tensor.data_ptr() else converted
        if not _is_finite(weights[name]):
            raise ModelError(
                f"{path}: {name} holds values that are not finite in {dtype}.", "Download the model again."
            )
    missing = [name for name in shapes if name not in weights]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} weights, the first is {missing[0]}.", "Download the model again."
        )
    return WeightStore({name: weights[name] for name in shapes})


def _is_finite(weight: Tensor) -> bool:
    # The extremes are NaN if any entry is.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(weight))


def _tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for name in names:
                # Opened anew each time: pages of a mapped file stay resident until it is closed.
                with safe_open(path, framework="pt") as file:
                    yield path, name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged: {error}", "Download the model again.") from error


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the model by Hugging Face's convention; others beside them are not the model's."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder} holds neither model.safetensors nor an index of shards.", "Download the model again."
        )
    try:
        return [
            folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is damaged: {error!r}", "Download the model again.") from error
