"""One reader a file format; each gives records that know where they stand."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

from sophia_galore.data.record import Record
from sophia_galore.errors import DataError, short


def read_json(path: Path) -> list[Record]:
    """Reads a JSON list of objects, or an object whose field ``data`` is such a list.

    Args:
        path: The file.

    Returns:
        The records; ``where`` counts them from 1.

    Raises:
        DataError: Broken JSON (with line and column), or JSON of another shape.
    """
    text = _decoded(path)
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        several = error.msg == "Extra data"
        raise DataError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}.",
            "One object a line is JSONL: name the file .jsonl." if several else "Repair the file at that place.",
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: the JSON is nested too deeply.", "Check how the file was written.") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise DataError(
            f"{path} holds {_kind(content)} where a list of records is expected.",
            'Write a list of objects, or an object {"data": [...]}.',
        )
    return [_record(item, f"{path}, record {number}") for number, item in enumerate(content, start=1)]


def read_jsonl(path: Path) -> list[Record]:
    """Reads one JSON object a line; blank lines are allowed.

    Args:
        path: The file.

    Returns:
        The records; ``where`` is ``file:line``.

    Raises:
        DataError: A line that is not a JSON object (with line and column).
    """
    records = []
    # Not splitlines(): that would also cut at U+2028 and others, which JSON strings may contain.
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: broken JSON at column {error.colno}: {error.msg}.",
                "Repair or delete that line; each line must be one complete JSON object.",
            ) from error
        except RecursionError as error:
            raise DataError(f"{path}:{number}: the JSON is nested too deeply.", "Repair that line.") from error
        records.append(_record(item, f"{path}:{number}"))
    return records


def read_csv(path: Path) -> list[Record]:
    """Reads comma-separated values whose first line names the columns.

    Args:
        path: The file.

    Returns:
        The records, all values being strings; ``where`` names the line a record begins on.

    Raises:
        DataError: A row with more or fewer values than columns, or quoting that never ends.
    """
    previous_limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts over 128 KiB
    try:
        rows = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
        header: list[str] | None = None
        records = []
        begin = 1
        for row in rows:
            line, begin = begin, rows.line_num + 1  # a quoted value may hold newlines
            if not row:
                continue
            if header is None:
                header = _csv_header(row, path)
                continue
            if len(row) != len(header):
                raise DataError(
                    f"{path}:{line}: {len(row)} values, but the first line names {len(header)} columns.",
                    "Put values that contain commas or line breaks in double quotes.",
                )
            records.append(Record(dict(zip(header, row, strict=True)), f"{path}:{line}"))
    except csv.Error as error:
        raise DataError(
            f"{path}:{rows.line_num}: broken CSV: {error}.", "Check the double quotes at and before that line."
        ) from error
    finally:
        csv.field_size_limit(previous_limit)
    return records


def _csv_header(row: list[str], path: Path) -> list[str]:
    header = [name.strip() for name in row]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}:1: the column {twice[0]!r} is named twice.", "Give every column its own name.")
    return header


def read_parquet(path: Path) -> list[Record]:
    """Reads a Parquet file.

    Args:
        path: The file.

    Returns:
        The records; ``where`` counts them from 1.

    Raises:
        DataError: The file is not Parquet, or damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # ParquetFile, not read_table: the latter takes columns from folder names such as "a=1".
        rows = pq.ParquetFile(path).read().to_pylist()
    except pa.ArrowException as error:
        raise DataError(
            f"{path} is not a readable Parquet file: {short(error)}.", "Write or download it again."
        ) from error
    return [Record(row, f"{path}, record {number}") for number, row in enumerate(rows, start=1)]


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: not UTF-8 text (byte 0x{raw[error.start]:02x} at byte {column} of the line).",
            "Save the file in the encoding UTF-8.",
        ) from error


def _record(item: Any, where: str) -> Record:
    if not isinstance(item, dict):
        raise DataError(f"{where}: {_kind(item)} where a record (a JSON object) is expected.", "Write {...} there.")
    return Record(item, where)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
