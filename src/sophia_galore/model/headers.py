"""What safetensors files say of their tensors, before the first byte of a weight: names, types, shapes.

A file is 8 bytes of header length, a JSON header, then the tensors' bytes
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sophia_galore.weights.folder import HEAD, INVERSE_FREQUENCIES, weight_files

PREFIX_BYTES = 8

# The format's own limit; more is no header but somebody's mistake.
_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file.

    Attributes:
        dtype: Its type as the format writes it, such as "BF16".
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]


def read_headers(read: Callable[[int, int], bytes]) -> dict[str, TensorHeader]:
    """Reads the headers of one file, and nothing behind them.

    Args:
        read: Gives the bytes of the file from the first number up to, not including, the second.

    Returns:
        What the file says of each of its tensors, by name.

    Raises:
        ValueError: It is no safetensors file.
    """
    try:
        (length,) = struct.unpack("<Q", read(0, PREFIX_BYTES))
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"its header would have {length:,} bytes")
        entries = json.loads(read(PREFIX_BYTES, PREFIX_BYTES + length))
        return {
            name: TensorHeader(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except (struct.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError("it is no safetensors file") from error


def read_folder_headers(folder: Path) -> dict[str, TensorHeader]:
    """Reads the headers of all weights of a model's folder.

    Args:
        folder: A whole model's folder.

    Raises:
        ModelError: It has no weights.
    """
    headers: dict[str, TensorHeader] = {}
    for path in weight_files(folder):
        with path.open("rb") as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            headers |= read_headers(read)
    return headers


def main_dtype(headers: Iterable[TensorHeader]) -> torch.dtype | None:
    """The type that most of the numbers are stored in; None if torch has no such type.

    Args:
        headers: The tensors.
    """
    count: Counter[str] = Counter()
    for header in headers:
        count[header.dtype] += math.prod(header.shape)
    return _DTYPES.get(count.most_common(1)[0][0]) if count else None


def count_numbers(headers: Mapping[str, TensorHeader], *, tied: bool) -> int:
    """The number of parameters in files, counted as the model counts them.

    Args:
        headers: The tensors by name.
        tied: Whether the head is the embedding; some files hold it a second time.
    """
    return sum(
        math.prod(header.shape)
        for name, header in headers.items()
        if not (tied and name == HEAD) and not name.endswith(INVERSE_FREQUENCIES)
    )
