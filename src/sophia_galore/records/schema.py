"""Reading and writing files against a schema.

A schema is a pydantic model. It ignores fields that it does not know, which a newer version may have written, and has
defaults for those that older versions did not write. What is wrong with a file becomes one sentence for the user.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from sophia_galore.errors import UserError
from sophia_galore.records.durable import flush

FOREIGN = "The file was changed, or is not of this program."
_RESTORE = "Restore the file, or train again."
_LONGEST_VALUE = 60


class Record(BaseModel):
    """The base of all schemas: frozen, and tolerant of unknown fields."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    @classmethod
    def of(cls, values: Any, where: str) -> Self:
        """Check values against the schema.

        Args:
            values: What a file holds.
            where: The file, for the message; with a line, if it has lines.

        Raises:
            UserError: A field is missing, or holds something else.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(_sentence(error, where), FOREIGN) from None

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a JSON file.

        Raises:
            UserError: It is missing, is not JSON, or does not fit the schema.
        """
        return cls.of(read_object(path), str(path))

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """Read a JSON file that may be missing or damaged: then it is None."""
        try:
            return cls.read(path)
        except UserError:
            return None

    def to_json(self) -> dict[str, Any]:
        """As plain data: the fields that were set."""
        return self.model_dump(by_alias=True, exclude_unset=True)


AnyRecord = TypeVar("AnyRecord", bound=Record)


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("not a number")
    return value


def _whole(value: Any) -> int:
    if not float(_number(value)).is_integer():
        raise ValueError("not a whole number")
    return int(value)


def _size(value: Any) -> int | None:
    return int(value) if value is not None and isfinite(_number(value)) else None


def _sizes(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value or {}
    return {str(name): size for name, size in value.items() if size is not None}


Number = Annotated[float, BeforeValidator(_number)]
"""A number, also one that is not finite."""

Whole = Annotated[int, BeforeValidator(_whole)]
"""A count, such as a step."""

Size = Annotated[int | None, BeforeValidator(_size)]
"""A size in bytes; None if it was not measured."""

Sizes = Annotated[dict[str, Whole], BeforeValidator(_sizes)]
"""Sizes in bytes by name; what was not measured is left out."""

Text = Annotated[str, BeforeValidator(lambda value: str(value or ""))]
"""Text; "" if it is not known."""


def _sentence(error: ValidationError, where: str) -> str:
    """The first problem, as a sentence."""
    found = error.errors(include_url=False)[0]
    *outer, name = found["loc"] or ("",)
    if isinstance(name, int):
        outer, name = [*outer[:-1]], f"{outer[-1] if outer else ''}[{name}]"
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in outer).lstrip(".")
    begin = f"{where}: {place}: " if place else f"{where}: "
    if found["type"] == "missing" or found["input"] is None:
        return f"{begin}'{name}' is missing"
    value = repr(found["input"])
    value = value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}..."
    subject = f"'{name}' is {value}" if name else value
    if found["type"] == "value_error":
        return f"{begin}{subject}, {found['ctx']['error']}"
    kinds = {"dict_type": "a table", "list_type": "a list", "tuple_type": "a list", "string_type": "a text"}
    kind = next((word for start, word in kinds.items() if found["type"].startswith(start)), "an object")
    return f"{begin}{subject}, not {kind}"


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file is missing, or is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} can't be read", "Name the folder of a run (training.output_dir).") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}", _RESTORE) from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what a run writes", _RESTORE)
    return found


def find_json(path: Path) -> Any:
    """What a JSON file holds; None if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def find_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds; {} if there is none."""
    found = find_json(path)
    return found if isinstance(found, dict) else {}


def write_json(path: Path, document: Mapping[str, Any] | Sequence[str]) -> None:
    """Write a JSON document as people can read it."""
    write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, documents: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON document a line."""
    lines = (json.dumps(document, ensure_ascii=False) + "\n" for document in documents)
    # What can't be written as UTF-8, such as half of a surrogate pair in a file's name, is shown by its number.
    path.write_text("".join(lines), encoding="utf-8", errors="backslashreplace")


def write_text(path: Path, text: str) -> None:
    """Write a text file; on a full disk, or if the power fails, the old one stays."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_text(text, encoding="utf-8")
        flush(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
