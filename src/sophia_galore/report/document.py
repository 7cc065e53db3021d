"""A report as a document of simple parts, and its conversion to Markdown and HTML.

The HTML page is self-contained: no network, no script, embedded pictures. The Markdown refers to picture files in its
folder.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from sophia_galore.report.style import AMBER, FAINT, INK, MUTED


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences.

    Args:
        items: One sentence for each bullet.
        warning: Whether these are warnings.
    """

    items: Sequence[str]
    warning: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows, the others are aligned to the right.

    Args:
        columns: Their headings.
        rows: One cell for each column.
        text: Whether the columns hold text: all are then aligned to the left.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure.

    Args:
        name: Name of its PNG file, such as "losses.png".
        alt_text: Description for readers who can't see it.
    """

    name: str
    alt_text: str


@dataclass(frozen=True)
class Code:
    """Shell commands."""

    lines: Sequence[str]


Part = Paragraph | Bullets | Table | Picture | Code


@dataclass(frozen=True)
class Section:
    """Parts under a heading."""

    heading: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Document:
    """A title, an introduction and sections."""

    title: str
    opening: Sequence[Part]
    sections: Sequence[Section]


def to_markdown(document: Document) -> str:
    """Return the text of `report.md`.

    Args:
        document: The report; a picture becomes a link to the PNG file of its name.
    """
    blocks = [f"# {document.title}", *map(_markdown, document.opening)]
    for section in document.sections:
        blocks += [f"## {section.heading}", *map(_markdown, section.parts)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _markdown(part: Part) -> str:
    match part:
        case Paragraph(text):
            return text
        case Bullets(items, warning):
            return "\n".join(f"- {'**Warning:** ' if warning else ''}{item}" for item in items)
        case Table():
            return _markdown_table(part)
        case Picture(name, alt_text):
            return f"![{alt_text}]({name})"
        case Code(lines):
            return "\n".join(["```bash", *lines, "```"])


def _markdown_table(table: Table) -> str:
    ruler = ["---", *("---" if table.text else "---:" for _ in table.columns[1:])]
    return "\n".join(_row(cells) for cells in (table.columns, ruler, *table.rows))


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


_STYLE = f"""
:root {{ color-scheme: light; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 64rem; padding: 2rem 1.25rem 4rem; color: {INK}; background: #fff;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }}
h1 {{ font-size: 1.75rem; line-height: 1.25; margin: 0 0 1rem; }}
h2 {{ font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid {FAINT}; }}
p {{ max-width: 48rem; }}
.scroll {{ overflow-x: auto; margin: 1rem 0; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }}
th, td {{ padding: .4rem .9rem .4rem 0; border-bottom: 1px solid {FAINT}; text-align: right; vertical-align: top; }}
th {{ color: {MUTED}; font-weight: 600; vertical-align: bottom; }}
th:first-child, td:first-child, .words th, .words td {{ text-align: left; }}
.words td {{ overflow-wrap: anywhere; }}
td:first-child {{ font-weight: 600; }}
ul {{ padding-left: 1.2rem; }}
ul.warnings {{ list-style: none; padding: 0; }}
ul.warnings li {{ border-left: 4px solid {AMBER}; background: #fdf6e7; padding: .6rem .9rem; margin: .6rem 0; }}
figure {{ margin: 1rem 0 1.5rem; }}
img {{ width: 100%; height: auto; display: block; }}
pre {{ background: #f5f7f9; padding: .9rem 1rem; overflow-x: auto; border-radius: 6px; font-size: .85rem; }}
""".strip()


def to_html(document: Document, pictures: Mapping[str, bytes]) -> str:
    """Return the text of `report.html`.

    Args:
        document: The report.
        pictures: SVG files by the names of the document's pictures.
    """
    body = [f"<h1>{escape(document.title)}</h1>", *(_html(part, pictures) for part in document.opening)]
    for section in document.sections:
        body += [f"<h2>{escape(section.heading)}</h2>", *(_html(part, pictures) for part in section.parts)]
    # Without an empty icon a browser would request one.
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(document.title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{_STYLE}\n</style>\n'
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _html(part: Part, pictures: Mapping[str, bytes]) -> str:
    match part:
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items, warning):
            kind = ' class="warnings"' if warning else ""
            return f"<ul{kind}>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Table():
            return _html_table(part)
        case Picture(name, alt_text):
            data = base64.b64encode(pictures[name]).decode("ascii")
            return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(alt_text)}"></figure>'
        case Code(lines):
            return "<pre><code>" + escape("\n".join(lines)) + "</code></pre>"


def _html_table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.columns)
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows]
    kind = ' class="words"' if table.text else ""
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    )
