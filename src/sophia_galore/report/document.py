"""A report as parts that know nothing of how they are written down, in Markdown or in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Points:
    """A list of sentences.

    Args:
        items: One a point.
        warns: Whether these are warnings.
    """

    items: Sequence[str]
    warns: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows, the others are aligned to the right.

    Args:
        columns: Their headings.
        rows: As many cells in each as there are columns.
        words: The columns hold words: all are aligned to the left.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        name: Name of its file without the ending, such as "loss-by-tokens".
        says: What is to be seen on it, for those who can't see it.
    """

    name: str
    says: str


@dataclass(frozen=True)
class Code:
    """Lines to type."""

    lines: Sequence[str]


Part = Paragraph | Points | Table | Picture | Code


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    heading: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Document:
    """A title, what stands before the first heading, and sections."""

    title: str
    opening: Sequence[Part]
    sections: Sequence[Section]
