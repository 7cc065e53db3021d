"""Read and write YAML 1.2 with ruamel.yaml.

In YAML 1.2, unlike in 1.1, `1e-3` is a number, and `yes` and `1:30` are text. Dates are text as well: no key takes one.
"""

from __future__ import annotations

import io
import re
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.error import YAMLError as YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

_TEXT = "tag:yaml.org,2002:str"
# YAML types that no key takes; such values are read as text.
_NO_TYPE = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value", "tag:yaml.org,2002:merge")
# Text that is text in both versions of YAML and needs no quotes.
_PLAIN = re.compile(r"[A-Za-z/][A-Za-z0-9_./-]*( [A-Za-z0-9_./-]+)*")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
_WIDTH = 100


def compose(text: str) -> Node | None:
    """Return the syntax tree of a YAML document; None if it is empty.

    Raises:
        YAMLError: If the text is no YAML.
    """
    root: Node | None = _reader().compose(text)
    if root is not None:
        _without_types(root, ())
    return root


def load(text: str) -> Any:
    """Load the plain values of a YAML document.

    Raises:
        YAMLError: If the text is no YAML.
    """
    return _reader().load(text)


def value_of(node: Node) -> object:
    """Return the plain value of a node.

    Raises:
        YAMLError, ValueError, RecursionError: It has none.
    """
    value: object = _reader().constructor.construct_object(node, deep=True)
    return value


def dump(values: dict[str, Any]) -> str:
    """Write plain values as YAML, in block style and in order.

    Args:
        values: Sections of null, truth values, numbers, text and lists.
    """
    writer: Any = _reader()
    writer.default_flow_style, writer.sort_base_mapping_type_on_output = False, False
    writer.allow_unicode, writer.width = True, _WIDTH
    writer.representer.add_representer(str, _represent_text)
    writer.representer.add_representer(list, _represent_list)
    out = io.StringIO()
    writer.dump(values, out)
    return out.getvalue()


def _reader() -> YAML:
    return YAML(typ="safe", pure=True)


def _represent_list(representer: Any, items: list[object]) -> Node:
    """Write a list of numbers on one line, any other list with one item a line."""
    on_one_line = all(isinstance(item, int | float) for item in items)
    node: Node = representer.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=on_one_line)
    return node


def _represent_text(representer: Any, text: str) -> Node:
    """Quote text that could be read as another type; double quotes escape line breaks."""
    is_plain = _PLAIN.fullmatch(text) and text.lower() not in _WORDS
    node: Node = representer.represent_scalar(_TEXT, text, style=None if is_plain else '"')
    return node


def _without_types(node: Node, above: tuple[Node, ...]) -> None:
    """Read dates and the like as text; refuse a value that contains itself, which would recurse without end."""
    if any(node is other for other in above):
        raise MarkedYAMLError(problem="recursive", problem_mark=node.start_mark)
    if isinstance(node, ScalarNode) and str(node.tag) in _NO_TYPE:
        node.tag = _TEXT
    elif isinstance(node, SequenceNode | MappingNode):
        for item in node.value:
            for inner in item if isinstance(item, tuple) else (item,):
                _without_types(inner, (*above, node))


_PLAIN_WORDS = {
    r"\t'": "a tab where YAML allows only spaces",
    "mapping values are not allowed": "a colon where none is allowed (text that holds ': ' needs quotes)",
    "found '<scalar>'": "the indentation does not fit, or text that begins with { or [ needs quotes",
    "expected <block end>": "the indentation does not fit the lines above",
    "could not find expected ':'": "a line without a colon after its key",
    "but found another document": "a second document begins ('---'); one file holds one configuration",
    "<stream end>": "a bracket, a brace or a quote is never closed",
    "unexpected end of stream": "a quote is never closed",
    "undefined alias": "text that begins with * needs quotes",
    "cannot start any token": "text that begins with @, `, % or | needs quotes",
    "special characters are not allowed": "a control character that does not belong in a text file",
    "recursive": "a value that contains itself",
    "could not determine a constructor": "tags, as in !!python/object, are not accepted",
}
"""The meaning of the parser's messages, by a part of each; the first match counts."""


def plain_words(error: Exception) -> str:
    """Return a YAML error in plain words, without positions."""
    text = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    return next((plain for part, plain in _PLAIN_WORDS.items() if part in text), text)
