"""The three files of a report, and the pictures beside them."""

from __future__ import annotations

import json
from pathlib import Path

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.report.comparison import Comparison
from sophia_galore.report.html import to_html
from sophia_galore.report.markdown import to_markdown
from sophia_galore.report.sections import CATEGORIES, LOSSES, document_of
from sophia_galore.report.style import as_svg, save, styled

REPORT_JSON, REPORT_MD, REPORT_HTML = "report.json", "report.md", "report.html"


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `report.html`, `report.md` with its pictures, and `report.json`.

    Args:
        comparison: What they say.
        folder: Where they go; it is made if it is missing.

    Returns:
        The three files, the page first.

    Raises:
        EnvironmentProblem: The folder can't be written to, or holds files of these names that are no report.
    """
    from sophia_galore.report.draw_comparison import draw_categories, draw_losses

    _refuse_others_files(folder)
    document = document_of(comparison)
    page, text, data = (folder / name for name in (REPORT_HTML, REPORT_MD, REPORT_JSON))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {}
        with styled():
            for picture, draw in ((LOSSES, draw_losses), (CATEGORIES, draw_categories)):
                figure = draw(comparison.runs)
                save(figure, folder / f"{picture.name}.png")
                pictures[picture.name] = as_svg(figure)
        page.write_text(to_html(document, pictures), encoding="utf-8")
        text.write_text(to_markdown(document), encoding="utf-8")
        data.write_text(json.dumps(comparison.to_json(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        cause = f"The report can't be written to {folder}: {error.strerror or error}"
        raise EnvironmentProblem(cause, "Check permissions and free space, or choose another --output.") from None
    return [page, text, data]


def _refuse_others_files(folder: Path) -> None:
    """A report replaces an earlier report, and no files that only have its names."""
    wanted = (REPORT_HTML, REPORT_MD, REPORT_JSON, *(f"{picture.name}.png" for picture in (LOSSES, CATEGORIES)))
    found = [name for name in wanted if (folder / name).exists()]
    if not found or _is_report(folder / REPORT_JSON):
        return
    raise EnvironmentProblem(
        f"{folder / found[0]} exists, and there is no report of this program beside it, so it is not replaced.",
        "Choose another --output, or move that file elsewhere.",
    )


def _is_report(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"runs", "summary", "warnings"} <= found.keys()
