"""docs/troubleshooting.md is found by error message, so each of its headings is the beginning of one.

A message in the source has places that are filled in, as `{path} is damaged: {name} is missing.`; a heading has an
example in each of them, as a reader would see it.
"""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from documents import ROOT, prose

PLACE = "\0"
"""What is filled in."""
_LEAST = 10
"""Characters of a message that a heading has to share with it beside its examples."""
HEADINGS = re.findall(r"^### `(.+)`$", prose("docs/troubleshooting.md"), re.MULTILINE)


@cache
def messages() -> frozenset[str]:
    """Every text of the source, with a mark where something is filled in."""
    found: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        nodes = list(ast.walk(tree))
        # Neither docstrings nor the pieces of a text are messages.
        others = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        others |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            if id(node) in others:
                continue
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # Tables of verdicts are filled in later, by `str.format`.
                found.add(re.sub(r"\{[^{}]*\}", PLACE, node.value))
            elif isinstance(node, ast.JoinedStr):
                found.add("".join(part.value if isinstance(part, ast.Constant) else PLACE for part in node.values))
    return frozenset(text for text in found if len(text) > _LEAST)


def begins(heading: str, message: str) -> bool:
    """Whether a heading is how a message begins, with something in each place that is filled in."""
    literals = message.split(PLACE)
    before, shared = "", 0
    for literal in literals:
        for size in range(len(literal), 0, -1):
            ends = shared + size >= _LEAST and heading.endswith(literal[:size])
            if ends and re.fullmatch(before, heading[: len(heading) - size]):
                return True
        before, shared = f"{before}{re.escape(literal)}.+", shared + len(literal)
        # An example may also be what a heading ends with.
        if shared >= _LEAST and literal is not literals[-1] and re.fullmatch(before, heading):
            return True
    return False


@pytest.mark.parametrize("heading", HEADINGS)
def test_a_heading_is_how_a_message_begins(heading: str) -> None:
    assert any(begins(heading, message) for message in messages())


def test_every_heading_of_a_message_is_looked_at() -> None:
    assert len(HEADINGS) > 100
    assert (
        len(HEADINGS) == len(set(HEADINGS)) == len(re.findall(r"^###", prose("docs/troubleshooting.md"), re.MULTILINE))
    )


def test_a_heading_that_nobody_says_is_found() -> None:
    assert not any(begins("The cat is on the keyboard again", message) for message in messages())
    assert not begins("a.json is whole", f"{PLACE} is damaged: {PLACE}")
    assert begins("a.json is damaged", f"{PLACE} is damaged: {PLACE}")
