"""A document as one page that needs nothing beside it: no network, no script, pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape

from sophia_galore.report.document import Code, Document, Paragraph, Part, Picture, Points, Table
from sophia_galore.report.style import AMBER, FAINT, INK, MUTED

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
    """The text of `report.html`.

    Args:
        document: What is to be said.
        pictures: SVG files by the names of the document's pictures.
    """
    body = [f"<h1>{escape(document.title)}</h1>", *(_part(part, pictures) for part in document.opening)]
    for section in document.sections:
        body += [f"<h2>{escape(section.heading)}</h2>", *(_part(part, pictures) for part in section.parts)]
    # The icon is said to be empty, since a browser asks for one otherwise.
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(document.title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{_STYLE}\n</style>\n'
        "</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n"
    )


def _part(part: Part, pictures: Mapping[str, bytes]) -> str:
    match part:
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Points(items, warns):
            kind = ' class="warnings"' if warns else ""
            return f"<ul{kind}>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>"
        case Table():
            return _table(part)
        case Picture(name, says):
            data = base64.b64encode(pictures[name]).decode("ascii")
            return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{escape(says)}"></figure>'
        case Code(lines):
            return "<pre><code>" + escape("\n".join(lines)) + "</code></pre>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.columns)
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows]
    kind = ' class="words"' if table.words else ""
    lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>'
    )
