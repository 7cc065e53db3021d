"""Tables: CSV in its dialects, Parquet and Arrow; each row is a record that knows where it stands."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

from sophia_galore.data.bad_records import Report
from sophia_galore.data.file_text import ending, file_text
from sophia_galore.data.meanings import ANSWERS, OPTIONAL
from sophia_galore.data.record import Content, Record
from sophia_galore.errors import DataError, short

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
_GAPS = ("NaN", "nan", "null", "NULL", "None", "<NA>")
"""What programs write into a cell that is empty."""


def read_csv(path: Path, report: Report) -> Content:
    """Reads values whose first line names the columns, separated by commas, semicolons, tabs or vertical bars.

    Args:
        path: The file. In one that ends in ``.tsv`` tabs separate; else the separator is the one with which the first
            line names columns that are known here, and commas before all others.
        report: Takes the rows with more or fewer values than columns.

    Returns:
        The records, all values being strings; ``where`` names the line a record begins on. A word such as NaN in a
        column that no format requires is null.

    Raises:
        DataError: Quoting that never ends, or a column that is named twice.
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
    """Reads a Parquet file.

    Args:
        path: The file.
        report: Takes nothing: a row of a table can always be read.

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
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "Parquet", error) from error
    return _table(rows, path)


def read_arrow(path: Path, report: Report) -> Content:
    """Reads an Arrow file, as `datasets` keeps them, in the form of a stream or of a file (Feather).

    Args:
        path: The file.
        report: Takes nothing: a row of a table can always be read.

    Returns:
        The records; ``where`` counts them from 1.

    Raises:
        DataError: The file is not Arrow, or damaged.
    """
    import pyarrow as pa

    try:
        with pa.OSFile(str(path)) as source:
            try:
                table = pa.ipc.open_stream(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                table = pa.ipc.open_file(source).read_all()
        rows = table.to_pylist()
    except PermissionError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, "Arrow", error) from error
    return _table(rows, path)


def _separator(text: str) -> str:
    """What separates the columns: that with which the first line names some that are known."""
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


def _table(rows: list[dict[str, Any]], path: Path) -> Content:
    records = [
        Record({name: _without_nulls(value) for name, value in row.items()}, f"{path}, record {number}")
        for number, row in enumerate(rows, start=1)
    ]
    return Content(records)


def _without_nulls(value: Any) -> Any:
    """A value without the nulls that a table writes into an object for the keys that only other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _unreadable(path: Path, kind: str, error: Exception) -> DataError:
    return DataError(f"{path} is not a readable {kind} file: {short(error)}.", "Write or download it again.")
