"""Read the headers of a model's weight files, which tell dtypes and shapes without reading weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from sophia_galore.weights.folder import HEAD, INVERSE_FREQUENCIES, weight_files
from sophia_galore.weights.safetensors_header import TORCH_DTYPES, TensorHeader, read_file_header


def read_folder_headers(folder: Path) -> dict[str, TensorHeader]:
    """Read the headers of all weights of a model's folder.

    Args:
        folder: The folder of a complete model.

    Raises:
        ModelError: It has no weights.
    """
    headers: dict[str, TensorHeader] = {}
    for path in weight_files(folder):
        headers |= read_file_header(path).tensors
    return headers


def main_dtype(headers: Iterable[TensorHeader]) -> torch.dtype | None:
    """Return the dtype of most of the numbers; None if torch does not have it.

    Args:
        headers: The tensors.
    """
    count: Counter[str] = Counter()
    for header in headers:
        count[header.dtype] += math.prod(header.shape)
    return TORCH_DTYPES.get(count.most_common(1)[0][0]) if count else None


def count_numbers(headers: Mapping[str, TensorHeader], *, tied: bool) -> int:
    """Return the number of parameters in files, as the model counts them.

    Args:
        headers: The tensors by name.
        tied: Whether the head is tied to the embedding; a second copy in the files is not counted.
    """
    return sum(
        math.prod(header.shape)
        for name, header in headers.items()
        if not (tied and name == HEAD) and not name.endswith(INVERSE_FREQUENCIES)
    )
