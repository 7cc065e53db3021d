"""Read the header of a safetensors file: names, dtypes, shapes and offsets of its tensors.

A file has 8 bytes for the length of the header, a JSON header, and the data of the tensors
(https://huggingface.co/docs/safetensors/index#format).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

PREFIX_BYTES = 8

# In the order in which the library sorts tensors: wide ones first, so that each tensor is aligned.
TORCH_DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by the names that the format gives them."""

# The limit of the format.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a file.

    Attributes:
        dtype: Its dtype as the format writes it, such as "BF16".
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        tensors: The tensors by name.
        file_bytes: Size of the complete file in bytes.
    """

    tensors: dict[str, TensorHeader]
    file_bytes: int


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name, such as "BF16".

    Raises:
        ValueError: torch does not have it.
    """
    if name not in TORCH_DTYPES:
        raise ValueError(f"it holds a tensor of the type {name}")
    return TORCH_DTYPES[name]


def read_header(read: Callable[[int, int], bytes]) -> Header:
    """Read only the header of a file.

    Args:
        read: Returns the bytes of the file from the first offset up to, not including, the second.

    Raises:
        ValueError: It is not a safetensors file.
    """
    try:
        (length,) = struct.unpack("<Q", read(0, PREFIX_BYTES))
        if length > _MAX_HEADER_BYTES:
            raise ValueError(f"its header would have {length:,} bytes")
        entries = json.loads(read(PREFIX_BYTES, PREFIX_BYTES + length))
        entries.pop("__metadata__", None)
        tensors = {
            name: TensorHeader(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]))
            for name, entry in entries.items()
        }
        ends = [int(entry["data_offsets"][1]) for entry in entries.values()]
    except (struct.error, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError("it is no safetensors file") from error
    return Header(tensors, PREFIX_BYTES + length + max(ends, default=0))


def read_file_header(path: Path) -> Header:
    """Read the header of a local file.

    Raises:
        ValueError: It is not a safetensors file.
    """
    with path.open("rb") as file:

        def read(start: int, stop: int) -> bytes:
            file.seek(start)
            return file.read(stop - start)

        return read_header(read)
