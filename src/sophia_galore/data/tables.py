"""Read tables (CSV and its dialects, Parquet, Arrow); each row is a record that knows its location."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sophia_galore.data.bad_records import Report
from sophia_galore.data.file_text import ending, file_text
from sophia_galore.data.meanings import ANSWERS, OPTIONAL
from sophia_galore.data.record import Content, Record
from sophia_galore.errors import DataError, short

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_GAPS = ("NaN", "nan", "null", "NULL", "None", "<NA>")
"""Values that programs write into empty cells."""


def read_csv(path: Path, report: Report) -> Content:
    """Read a CSV file with a header line, separated by commas, semicolons, tabs or vertical bars.

    Args:
        path: The file. A ``.tsv`` file is separated by tabs; otherwise the separator is the one that gives the most
            known column names in the first line, preferring commas.
        report: Called for each row with more or fewer values than columns.

    Returns:
        The records; all values are strings. ``where`` names the line where a record begins. A value such as NaN is
        null in columns that no format requires.

    Raises:
        DataError: A quote is not closed, or two columns have the same name.
    """
    text = file_text(path)
    skipped = 0
    separator = "\t" if ending(path) == ".tsv" else _separator(text)
    first, _, rest = text.partition("\n")
    if first.strip().lower() in {f"sep={known}" for known in _SEPARATORS if known != "\t"}:  # Excel's own first line
        separator, text, skipped = first.strip()[-1], rest, 1
    previous_limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses texts over 128 KiB
    try:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator)
        header: list[str] | None = None
        records = []
        begin = 1 + skipped
        for row in rows:
            line, begin = begin, rows.line_num + 1 + skipped  # a quoted value may hold newlines
            if not row:
                continue
            if header is None:
                header = _header(row, path)
                continue
            where = f"{path}:{line}"
            if len(row) != len(header):
                problem = DataError(
                    f"{where}: {len(row)} values, but the first line names {len(header)} columns.",
                    f"Put values that contain {_SEPARATORS[separator]} or line breaks in double quotes.",
                )
                report(where, problem)
                continue
            records.append(Record(_without_gaps(dict(zip(header, row, strict=True))), where))
    except csv.Error as error:
        raise DataError(
            f"{path}:{rows.line_num + skipped}: broken CSV: {error}.",
            "Check the double quotes at and before that line.",
        ) from error
    finally:
        csv.field_size_limit(previous_limit)
    usual = "\t" if ending(path) == ".tsv" else ","
    return Content(records, "" if separator == usual else f"{_SEPARATORS[separator]} between the columns")


def read_parquet(path: Path, report: Report) -> Content:
    """Read a Parquet file.

    Args:
        path: The file.
        report: Not used: every row of a table can be read.

    Returns:
        The records; ``where`` counts them from 1.

    Raises:
        DataError: The file is not Parquet, or damaged.
    """
    import pyarrow.parquet as pq

    # ParquetFile, not read_table: the latter takes columns from folder names such as "a=1".
    return _read_table(path, "Parquet", lambda: pq.ParquetFile(path).read())


def read_arrow(path: Path, report: Report) -> Content:
    """Read an Arrow file, as saved by `datasets`: an Arrow stream or an Arrow file (Feather).

    Args:
        path: The file.
        report: Not used: every row of a table can be read.

    Returns:
        The records; ``where`` counts them from 1.

    Raises:
        DataError: The file is not Arrow, or damaged.
    """
    import pyarrow as pa

    def load() -> Any:
        with pa.OSFile(str(path)) as source:
            try:
                return pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                return pa.ipc.open_file(source).read_all()

    return _read_table(path, "Arrow", load)


def _separator(text: str) -> str:
    """Return the separator that gives the most known column names in the first line."""
    line = next((line for line in text.splitlines() if line.strip()), "")

    def score(separator: str) -> int:
        try:
            names = next(csv.reader([line], delimiter=separator), [])
        except csv.Error:
            return 0
        known = {name.strip().lower().replace(" ", "_") for name in names}
        return len(known & set(ANSWERS))

    return max(_SEPARATORS, key=score)  # the first of equals


def _header(row: list[str], path: Path) -> list[str]:
    header = [name.strip() for name in row]
    if twice := sorted({name for name in header if header.count(name) > 1}):
        raise DataError(f"{path}:1: the column {twice[0]!r} is named twice.", "Give every column its own name.")
    return header


def _without_gaps(fields: dict[str, str]) -> dict[str, Any]:
    return {
        name: None if value in _GAPS and name.lower().replace(" ", "_") in OPTIONAL else value
        for name, value in fields.items()
    }


def _read_table(path: Path, kind: str, load: Callable[[], Any]) -> Content:
    import pyarrow as pa

    try:
        rows: list[dict[str, Any]] = load().to_pylist()
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} is not a readable {kind} file: {short(error)}.", "Write or download it again."
        ) from error
    records = [
        Record({name: _without_nulls(value) for name, value in row.items()}, f"{path}, record {number}")
        for number, row in enumerate(rows, start=1)
    ]
    return Content(records)


def _without_nulls(value: Any) -> Any:
    """Return a value without the nulls that a table adds to objects for keys that only other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
