"""The keys of the schema: dotted names, defaults and accepted values.

Everything is derived from `RunConfig`, so a new field appears in messages, the reference and suggestions by itself.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sophia_galore.config.schema import RunConfig
from sophia_galore.config.schema_data import DataSource
from sophia_galore.config.size import Size, SizeOrZero


@dataclass(frozen=True)
class Key:
    """One option.

    Args:
        name: Dotted, as "training.max_steps".
        annotation: The field's type.
        accepts: The values it takes, in words.
        default: Value if nothing is given.
        description: The sentence from the schema.
    """

    name: str
    annotation: Any
    accepts: str
    default: object
    description: str

    def takes(self, kind: Any) -> bool:
        """Return whether the key accepts values of this type."""
        return any(kind in (member, _bare(member)) for member in _members(self.annotation))


@cache
def keys() -> dict[str, Key]:
    """Return every option by its dotted name, in the schema's order."""
    return {key.name: key for key in _walk(RunConfig, "")}


@cache
def sections() -> tuple[str, ...]:
    """Return the dotted names of all sections, in the schema's order, without the top level."""
    parts = [name.split(".") for name in keys()]
    return tuple(dict.fromkeys(".".join(words[:depth]) for words in parts for depth in range(1, len(words))))


def children(section: str) -> list[str]:
    """Return the names directly under a section; "" is the top level."""
    prefix = f"{section}." if section else ""
    words = (name[len(prefix) :].split(".")[0] for name in keys() if name.startswith(prefix))
    return list(dict.fromkeys(words))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for word, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _walk(annotation, f"{prefix}{word}.")
        else:
            default = field.get_default(call_default_factory=True, validated_data={})
            yield Key(f"{prefix}{word}", annotation, _accepts(field), default, field.description or "")


def _members(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union; any other type is its own only member."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _bare(annotation: Any) -> Any:
    """Return a type without the limits of a `Field` in a union."""
    if typing.get_origin(annotation) is not typing.Annotated:
        return annotation
    bare, *limits = typing.get_args(annotation)
    return bare if all(isinstance(limit, FieldInfo) for limit in limits) else annotation


def _accepts(field: FieldInfo) -> str:
    members = _members(field.annotation)
    words = [_words(member) for member in members if member is not type(None)]
    text = " or ".join(words) + _bounds(field.metadata)
    return f"{text}, or null" if type(None) in members else text


def _words(annotation: Any) -> str:
    if annotation in (Size, SizeOrZero):
        return "a size such as 4GiB" + (" or 0" if annotation == SizeOrZero else "")
    if annotation is DataSource:
        return f"a name or an object with {', '.join(DataSource.model_fields)}"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated and _bare(annotation) is arguments[0]:
        return _words(arguments[0]) + "".join(_bounds(limits.metadata) for limits in arguments[1:])
    if origin is typing.Literal:
        values = ", ".join(str(value) for value in arguments)
        return f"one of {values}" if len(arguments) > 1 else values
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each item {_words(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)} values, each {_words(arguments[0])}"
    plain = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
    return plain.get(annotation, str(annotation))


def _bounds(metadata: Sequence[Any]) -> str:
    """Describe the limits of a value, as " of at least 0 and below 1"."""
    words = {"ge": "of at least {}", "gt": "above {}", "le": "of at most {}", "lt": "below {}"}
    limits = [
        text.format(f"{limit:g}" if isinstance(limit, float) else limit)
        for constraint in metadata
        for name, text in words.items()
        if (limit := getattr(constraint, name, None)) is not None
    ]
    if any(getattr(constraint, "min_length", None) for constraint in metadata):
        limits.append("that is not empty")
    return f" {' and '.join(limits)}" if limits else ""
