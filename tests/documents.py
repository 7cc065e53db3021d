"""Reading the documents: their fenced blocks, the lines of their commands, their prose."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
READMES = ("README.md", "README.zh-CN.md")
PAGES = tuple(sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
DOCUMENTS = (*READMES, "CONTRIBUTING.md", "CHANGELOG.md", *PAGES)
TYPED = ("README.md", *PAGES)
"""Documents whose commands are run; the translation has the same ones, which is tested."""

MARKS = {
    "gpu": "needs a CUDA card",
    "network": "needs a hub or a package index",
    "install": "changes the environment; continuous integration installs anew",
    "long": "takes minutes to hours",
}
"""Why a block of commands is not run."""

_FENCE = re.compile(r"^```(\w*)(?: (\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced code block.

    Args:
        language: The first word behind the fence.
        mark: The second one; for commands that are not run, why.
        text: What is in it.
    """

    language: str
    mark: str
    text: str

    @property
    def lines(self) -> list[str]:
        """Its lines that are not empty."""
        return [line for line in self.text.splitlines() if line]


def read(name: str) -> str:
    """The text of a document."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str | None = None) -> list[Block]:
    """The code blocks of a document, of one language if it is given."""
    found = [Block(*match) for match in _FENCE.findall(read(name))]
    return [block for block in found if language in (None, block.language)]


def prose(name: str) -> str:
    """A document without its code blocks."""
    return _FENCE.sub("", read(name))


def shell_lines(name: str) -> list[str]:
    """Every line that a reader is told to type."""
    return [line for block in blocks(name, "bash") for line in block.lines]


def file_name(block: Block) -> str | None:
    """The name of the file that a block is to be written to: a comment in its first line says so."""
    first = block.lines[0]
    return first.removeprefix("# ") if block.language == "yaml" and first.startswith("# ") else None


def named_files() -> set[str]:
    """Files that the documents tell their reader to write."""
    return {name for page in TYPED for block in blocks(page, "yaml") if (name := file_name(block))}
