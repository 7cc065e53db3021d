"""A document as Markdown; pictures are files beside it."""

from __future__ import annotations

from collections.abc import Sequence

from sophia_galore.report.document import Code, Document, Paragraph, Part, Picture, Points, Table


def to_markdown(document: Document) -> str:
    """The text of `report.md`.

    Args:
        document: What is to be said; a picture stands for the PNG file of its name.
    """
    blocks = [f"# {document.title}", *map(_part, document.opening)]
    for section in document.sections:
        blocks += [f"## {section.heading}", *map(_part, section.parts)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _part(part: Part) -> str:
    match part:
        case Paragraph(text):
            return text
        case Points(items, warns):
            return "\n".join(f"- {'**Warning:** ' if warns else ''}{item}" for item in items)
        case Table():
            return _table(part)
        case Picture(name, says):
            return f"![{says}]({name}.png)"
        case Code(lines):
            return "\n".join(["```bash", *lines, "```"])


def _table(table: Table) -> str:
    ruler = ["---", *("---" if table.words else "---:" for _ in table.columns[1:])]
    return "\n".join(_row(cells) for cells in (table.columns, ruler, *table.rows))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
