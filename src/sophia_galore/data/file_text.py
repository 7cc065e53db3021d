"""Text of data files, decompressed if necessary."""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path

from sophia_galore.errors import DataError, short

DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.decompress,
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}
"""Decompression by extension; it follows the extension of the file itself: ``x.jsonl.gz``."""


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
            raise DataError(f"{path} can't be decompressed: {short(error)}.", "Write or download it again.") from error
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
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
