"""YAML as people read it: the core schema of YAML 1.2, with a line number for every value.

PyYAML follows YAML 1.1, in which `1e-3` is text, `yes` is a truth value, `010` is eight and
`1:30` is ninety. Here only null, true, false, and numbers written as numbers are special;
anything else is text, and it is then up to the field to accept text or to refuse it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import yaml

from sophia_galore.config.given import Given
from sophia_galore.config.keys import children, sections
from sophia_galore.config.problems import Problem

_RESOLVERS: list[tuple[str, str, list[str]]] = [
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
]


class CoreLoader(yaml.SafeLoader):
    """A safe loader that gives meaning to the plain words of YAML 1.2 only."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own way to replace the table


class CoreDumper(yaml.SafeDumper):
    """A safe dumper that puts text in quotes if either version of YAML would misread it."""


for _tag, _pattern, _first in _RESOLVERS:
    _compiled = re.compile(rf"^(?:{_pattern})$")
    CoreLoader.add_implicit_resolver(_tag, _compiled, _first)
    CoreDumper.add_implicit_resolver(_tag, _compiled, _first)


def _represent_list(dumper: yaml.SafeDumper, items: list[object]) -> yaml.Node:
    """Numbers on one line, as people write them; anything longer an item a line."""
    on_one_line = all(isinstance(item, int | float) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=on_one_line)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Line breaks of any kind as escapes: PyYAML would fold them, and Unicode's own ones would be lost."""
    one_line = len((text + ".").splitlines()) == 1
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if one_line else '"')


CoreDumper.add_representer(list, _represent_list)
CoreDumper.add_representer(str, _represent_text)


def compose(text: str) -> yaml.Node | None:
    """The syntax tree of one YAML document; None if it holds nothing.

    Raises:
        yaml.YAMLError: If the text is no YAML.
    """
    loader = CoreLoader(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def entries(node: yaml.Node, locate: Callable[[yaml.Node], str], prefix: str = "") -> list[Given | Problem]:
    """Every value below a node, section by section.

    Args:
        node: A section of the document; null is an empty section.
        locate: Says where a node stands.
        prefix: Dotted name of the section; "" is the top level.

    Returns:
        Values and problems in the order of the text.
    """
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null"):
        return []
    if not isinstance(node, yaml.MappingNode):
        words = ", ".join(children(prefix))
        return [Problem(locate(node), f"{prefix} is a section, not a value", f"Keys under it: {words}.")]
    found: list[Given | Problem] = []
    places: dict[str, str] = {}
    for key_node, value_node in node.value:
        where = locate(key_node)
        if not isinstance(key_node, yaml.ScalarNode) or not key_node.value:
            found.append(Problem(where, "a key must be a word", "Write `key: value`."))
            continue
        name = f"{prefix}.{key_node.value}" if prefix else key_node.value
        if name in places:
            cause = f"'{name}' stands twice in the same section, first at {places[name]}"
            found.append(Problem(where, cause, "Keep one of them."))
            continue
        places[name] = where
        found.extend(one_entry(name, key_node, value_node, locate))
    return found


def one_entry(
    name: str, key_node: yaml.Node, value_node: yaml.Node, locate: Callable[[yaml.Node], str]
) -> list[Given | Problem]:
    """What stands behind one key: a whole section, or a single value."""
    if name in sections():
        return entries(value_node, locate, name)
    loader = CoreLoader("")
    try:
        value: object = loader.construct_object(value_node, deep=True)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        cause = f"the value of '{name}' can't be read: {plain_words(error)}"
        return [Problem(locate(key_node), cause, "Write a plain value, text in quotes, or a list.")]
    finally:
        loader.dispose()
    return [Given(name, value, locate(key_node), name)]


_PLAIN_WORDS = {
    r"\t'": "a tab where YAML allows only spaces",
    "mapping values are not allowed": "a colon where none is allowed (text that holds ': ' needs quotes)",
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
"""What PyYAML says, by a part of it, and what it means; the first that fits counts."""


def plain_words(error: Exception) -> str:
    """A YAML error without positions and without the parser's own vocabulary."""
    text = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error)
    return next((plain for part, plain in _PLAIN_WORDS.items() if part in text), text)
