"""Text of data files, decompressed if necessary."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO

from sophia_galore.errors import DataError, EnvironmentProblem, short

DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
"""Decompression by extension; it follows the extension of the file itself: ``x.jsonl.gz``."""

_OPEN: dict[str, Callable[[Path], IO[bytes]]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}  # type: ignore[dict-item]

BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
"""What reading a damaged compressed file raises, beside errors of the system."""


def ending(path: Path) -> str:
    """Return the extension that says the type of a file, in lower case, without that of the compression.

    Args:
        path: The file.
    """
    name = path.with_suffix("") if path.suffix.lower() in DECOMPRESS else path
    return name.suffix.lower()


def file_text(path: Path) -> str:
    """Return the text of a file in UTF-8, or in UTF-16 if it begins with a byte-order mark of UTF-16.

    Args:
        path: The file; it may be compressed.

    Returns:
        The text, without a byte-order mark.

    Raises:
        DataError: It can't be decompressed or decoded; the message names the line.
    """
    raw = path.read_bytes()
    if decompress := DECOMPRESS.get(path.suffix.lower()):
        try:
            raw = decompress(raw)
        except (OSError, EOFError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise not_decompressed(path, error) from error
    if is_utf16(raw):
        try:
            return raw.decode("utf-16")
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: broken UTF-16 text.", "Save the file in the encoding UTF-8.") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x} at byte {column} of the line).",
            "Save the file in the encoding UTF-8.",
        ) from error


def open_unpacked(path: Path) -> IO[bytes]:
    """Open a file to read it piece by piece, decompressed if necessary; damage is raised as one of `BROKEN`.

    Args:
        path: The file.
    """
    opened: IO[bytes] = _OPEN.get(path.suffix.lower(), lambda plain: plain.open("rb"))(path)
    return opened


def is_utf16(begins: bytes) -> bool:
    """Return whether a text begins with a byte-order mark of UTF-16.

    Args:
        begins: Its first bytes, or all.
    """
    return begins.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def not_decompressed(path: Path, error: Exception) -> DataError:
    """Return the error for a damaged compressed file.

    Args:
        path: The file.
        error: What was raised.
    """
    return DataError(f"{path} can't be decompressed: {short(error)}.", "Write or download it again.")


def not_permitted(path: Path) -> EnvironmentProblem:
    """Return the error for a file that this user may not read.

    Args:
        path: The file.
    """
    return EnvironmentProblem(
        f"{path} can't be read: permission denied.", "Give the user who runs this the right to read the file."
    )
