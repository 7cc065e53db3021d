"""Where data come from: one name, or a list of data sets of which each has its own share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer
from pydantic_core import PydanticCustomError

FormatName = Literal["alpaca", "sharegpt", "messages", "prompt_completion", "text"]

PROBLEM = "data_source"
"""Type of a validation error whose message is written for the user."""


class DataSource(BaseModel):
    """One data set of several.

    Attributes:
        path: A file, a folder, a pattern such as ``data/*.jsonl``, or a hub dataset.
        weight: How often an epoch goes through it: 0.5 takes half of its examples, chosen by the seed, 2 takes each
            of them twice.
        max_examples: Use at most so many of its examples, chosen by the seed, before `weight` applies.
        format: How its records are laid out; None: as `data.format` says.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    path: str = Field(min_length=1)
    weight: float = Field(1.0, gt=0, le=1000)
    max_examples: int | None = Field(None, ge=1)
    format: FormatName | None = None

    @model_serializer
    def _lean(self) -> str | dict[str, Any]:
        given = {name: getattr(self, name) for name in type(self).model_fields}
        said = {name: value for name, value in given.items() if value != type(self).model_fields[name].default}
        return self.path if set(said) == {"path"} else said


_KEYS = ", ".join(DataSource.model_fields)


def _listed(value: object) -> object:
    """A list or a single object as a tuple of sources; a name stays a name."""
    if isinstance(value, Mapping):
        value = (value,)
    if not isinstance(value, list | tuple):
        return value
    if not value:
        raise PydanticCustomError(PROBLEM, "an empty list names no data")
    return tuple(_source(item, place) for place, item in enumerate(value, start=1))


def _source(item: object, place: int) -> DataSource:
    if isinstance(item, DataSource):
        return item
    if isinstance(item, str):
        item = {"path": item}
    if not isinstance(item, Mapping):
        raise PydanticCustomError(PROBLEM, f"entry {place} is neither a name nor an object with the keys {_KEYS}")
    fields = dict(item)
    if "path" not in fields and "name" in fields:
        fields["path"] = fields.pop("name")
    if unknown := [str(key) for key in fields if key not in DataSource.model_fields]:
        raise PydanticCustomError(PROBLEM, f"entry {place} has the unknown key '{unknown[0]}'; known are {_KEYS}")
    if "path" not in fields:
        raise PydanticCustomError(PROBLEM, f"entry {place} lacks its `path`")
    wrong = {
        "path": not isinstance(fields["path"], str) or not fields["path"],
        "weight": not _number(fields.get("weight", 1.0), 0, 1000),
        "max_examples": fields.get("max_examples") is not None and not _whole(fields["max_examples"]),
        "format": fields.get("format") not in (None, *FormatName.__args__),  # type: ignore[attr-defined]
    }
    if broken := [key for key, is_wrong in wrong.items() if is_wrong]:
        takes = {
            "path": "the name of a file, folder or hub dataset",
            "weight": "a number above 0, at most 1000",
            "max_examples": "a whole number of at least 1",
            "format": f"one of {', '.join(FormatName.__args__)}",  # type: ignore[attr-defined]
        }[broken[0]]
        raise PydanticCustomError(PROBLEM, f"entry {place}: {broken[0]} takes {takes}")
    return DataSource(**fields)


def _number(value: object, above: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and above < value <= most


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


DataSources = Annotated[str | tuple[DataSource, ...], BeforeValidator(_listed)]
"""A name, or a list of names and objects; in a configuration also a single object."""

MaybeDataSources = Annotated[str | tuple[DataSource, ...] | None, BeforeValidator(_listed)]
"""The same, or none."""


def listed_sources(value: str | tuple[DataSource, ...]) -> tuple[DataSource, ...]:
    """The data sets that a value of `data.train` or `data.eval` names, at least one.

    Args:
        value: As the configuration has it.
    """
    return (DataSource(path=value),) if isinstance(value, str) else value


def sources_in_words(value: str | tuple[DataSource, ...]) -> str:
    """The names of these data sets for a sentence; long lists are shortened.

    Args:
        value: As the configuration has it.
    """
    paths = [source.path for source in listed_sources(value)]
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
