"""Read tool definitions and tool calls, in the form that Hugging Face's chat templates take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sophia_galore.data.fields import absent, one_of, parsed
from sophia_galore.data.meanings import CALLS, TOOLS
from sophia_galore.data.record import Record
from sophia_galore.errors import DataError

Call = Mapping[str, Any]
_FORM = 'Write {"name": ..., "arguments": {...}} there, as JSON.'


def tools_of(record: Record, items: Iterable[Any] = ()) -> tuple[Mapping[str, Any], ...]:
    """Return the tools that a field of the record or one of its messages defines.

    Args:
        record: The normalised record. Its field is a list of definitions, one definition, or JSON of either.
        items: The messages, unread.

    Returns:
        Definitions of the form ``{"type": "function", "function": {...}}``; none if there is no such field, or an
        empty one (``[]``, also as text).

    Raises:
        DataError: The field holds something else, or there are two.
    """
    name, value = one_of(record.fields, TOOLS, record.where)
    found = _definitions(value, record.where, name)
    for index, item in enumerate(items):
        if not isinstance(item, Mapping) or not any(name in item for name in TOOLS):
            continue
        own, value = one_of(item, TOOLS, record.where, f"[{index}]")
        more = _definitions(value, record.where, f"[{index}].{own}")
        if more and found and more != found:
            raise DataError(f"{record.where}: tools are defined twice, and differently.", "Keep one definition.")
        found = found or more
    return found


def calls_of(item: Mapping[str, Any], where: str, name: str) -> tuple[Call, ...]:
    """Return the calls in a message's ``tool_calls`` or ``function_call``.

    Args:
        item: The message.
        where: Location of the record, for error messages.
        name: The message, such as ``messages[3]``.

    Returns:
        Calls of the form ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``, with their ``id``
        where they have one. Arguments that are JSON text are read, since templates write them as JSON again.

    Raises:
        DataError: The field holds something else.
    """
    field, value = one_of(item, CALLS, where, name)
    return calls_in(value, where, f"{name}.{field}") if field else ()


def calls_in(value: Any, where: str, name: str) -> tuple[Call, ...]:
    """Return the calls that a value holds: a list of them or a single one, or JSON of either.

    Args:
        value: The value.
        where: Location of the record, for error messages.
        name: The field, for error messages.

    Raises:
        DataError: It holds something else.
    """
    value = parsed(value)
    if absent(value):
        return ()
    calls = list(value) if isinstance(value, list | tuple) else [value]
    return tuple(_call(parsed(call), where, name) for call in calls)


def _call(call: Any, where: str, name: str) -> Call:
    inner = call
    if isinstance(call, Mapping) and not absent(call.get("function")):
        inner = parsed(call["function"])
    if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str) or not inner["name"]:
        raise DataError(f"{where}: `{name}` is no call of a tool: it lacks a name.", _FORM)
    _, arguments = one_of(inner, ("arguments", "parameters", "input"), where, name)
    arguments = parsed(arguments)
    if arguments is not None and not isinstance(arguments, Mapping):
        raise DataError(f"{where}: the arguments of `{inner['name']}` in `{name}` are no JSON object.", _FORM)
    read = {"type": "function", "function": {"name": inner["name"], "arguments": dict(arguments or {})}}
    own_id = call.get("id") if isinstance(call, Mapping) else None
    return {"id": own_id, **read} if isinstance(own_id, str) and own_id else read


def _definitions(value: Any, where: str, name: str) -> tuple[Mapping[str, Any], ...]:
    value = parsed(value)
    if absent(value) or value in ("null", "None"):
        return ()
    tools = [value] if isinstance(value, Mapping) else value
    if not isinstance(tools, list | tuple):
        raise DataError(
            f"{where}: the field `{name}` is of type {type(value).__name__} where a list of tools is expected.",
            "Write a list of JSON schemas there, or JSON that holds one.",
        )
    return tuple(_definition(parsed(tool), where, f"{name}[{index}]") for index, tool in enumerate(tools))


def _definition(tool: Any, where: str, name: str) -> Mapping[str, Any]:
    if isinstance(tool, Mapping) and tool.get("type") is not None and not isinstance(tool.get("name"), str):
        return dict(tool)
    if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
        return {"type": "function", **tool}
    if isinstance(tool, Mapping) and isinstance(tool.get("name"), str):
        inner = {key: part for key, part in tool.items() if key != "type" or part != "function"}
        return {"type": "function", "function": inner}
    raise DataError(
        f"{where}: `{name}` is no definition of a tool.",
        'Write {"type": "function", "function": {"name": ..., "parameters": {...}}} there.',
    )
