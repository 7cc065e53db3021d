"""Read JSON and JSON Lines files; each record knows its location."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sophia_galore.data.bad_records import Report
from sophia_galore.data.file_text import file_text
from sophia_galore.data.meanings import ANSWERS
from sophia_galore.data.record import Content, Record
from sophia_galore.errors import DataError


def read_json(path: Path, report: Report) -> Content:
    """Read a JSON list of objects, or another common form of such a list.

    The other forms are an object whose field ``data`` is the list, a single record, an object of columns as pandas
    writes it, and one object per line.

    Args:
        path: The file.
        report: Called for each item that is not an object.

    Returns:
        The records; ``where`` counts them from 1, or names the line if there is one object per line.

    Raises:
        DataError: Broken JSON (with line and column), or JSON of another shape.
    """
    text = file_text(path)
    if not text.strip():
        return Content([])
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            records, broken = _lines(text, path)
            if len(records) > len(broken):
                for where, problem in broken:
                    report(where, problem)
                return Content(records, "one object a line")
        raise DataError(
            f"{path}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}.",
            "Repair the file at that place.",
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: the JSON is nested too deeply.", "Check how the file was written.") from error
    return _document(content, path, report)


def read_jsonl(path: Path, report: Report) -> Content:
    """Read one JSON object per line; blank lines are allowed. A single JSON document is read as such.

    Args:
        path: The file.
        report: Called for each line that is not a JSON object.

    Returns:
        The records; ``where`` is ``file:line``.

    Raises:
        DataError: No line is a JSON object.
    """
    text = file_text(path)
    records, broken = _lines(text, path)
    if broken and not records:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError):
            raise broken[0][1] from None
        if isinstance(content, list | dict):
            read = _document(content, path, report)
            return Content(read.records, read.note or "one JSON document")
    for where, problem in broken:
        report(where, problem)
    return Content(records)


def _lines(text: str, path: Path) -> tuple[list[Record], list[tuple[str, DataError]]]:
    """Return the records of a text with one object per line, and the lines that are not objects."""
    records: list[Record] = []
    broken: list[tuple[str, DataError]] = []
    # Not splitlines(): that would also cut at U+2028 and others, which JSON strings may contain.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            records.append(_record(json.loads(line), where))
        except json.JSONDecodeError as error:
            problem = DataError(
                f"{where}: broken JSON at column {error.colno}: {error.msg}.",
                "Repair or delete that line; each line must be one complete JSON object.",
            )
            broken.append((where, problem))
        except RecursionError:
            broken.append((where, DataError(f"{where}: the JSON is nested too deeply.", "Repair that line.")))
        except DataError as error:
            broken.append((where, error))
    return records, broken


def _document(content: Any, path: Path, report: Report) -> Content:
    note = ""
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    elif isinstance(content, dict) and (rows := _rows(content)):
        content, note = rows, "an object of columns" if len(rows) > 1 else ""
    if not isinstance(content, list):
        raise DataError(
            f"{path} holds {_kind(content)} where a list of records is expected.",
            'Write a list of objects, or an object {"data": [...]}.',
        )
    records = []
    for number, item in enumerate(content, start=1):
        where = f"{path}, record {number}"
        try:
            records.append(_record(item, where))
        except DataError as error:
            report(where, error)
    return Content(records, note)


def _rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the records of an object of columns, or the object if it is one record; else an empty list."""
    if not any(str(name).strip().lower() in ANSWERS for name in content):
        return []
    columns = list(content.values())
    if all(isinstance(column, dict) and column.keys() == columns[0].keys() for column in columns):
        return [{name: column[key] for name, column in content.items()} for key in columns[0]]
    lists = [column for column in columns if isinstance(column, list)]
    messages = any(isinstance(item, dict) for column in lists for item in column[:1])
    if len(lists) == len(columns) and not messages and len({len(column) for column in lists}) == 1:
        return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
    return [dict(content)]


def _record(item: Any, where: str) -> Record:
    if not isinstance(item, dict):
        raise DataError(f"{where}: {_kind(item)} where a record (a JSON object) is expected.", "Write {...} there.")
    return Record(item, where)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
