"""Writes a report: three files and their pictures."""

from __future__ import annotations

from pathlib import Path

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.records.files import REPORT_FILES, REPORT_HTML, REPORT_JSON, REPORT_MD
from sophia_galore.records.report import Report
from sophia_galore.records.schema import write_json
from sophia_galore.report.comparison import Comparison
from sophia_galore.report.document import to_html, to_markdown
from sophia_galore.report.sections import CATEGORIES, LOSSES, build_document
from sophia_galore.report.style import as_svg, save, styled


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write `report.html`, `report.md` with its pictures, and `report.json`.

    Args:
        comparison: The runs and their numbers.
        folder: Output folder; it is created if it is missing.

    Returns:
        The three files, the page first.

    Raises:
        EnvironmentProblem: The folder can't be written to, or holds files of these names that are not a report.
    """
    from sophia_galore.report.draw_comparison import draw_categories, draw_losses

    _refuse_foreign_files(folder)
    document = build_document(comparison)
    page, text, data = (folder / name for name in (REPORT_HTML, REPORT_MD, REPORT_JSON))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        pictures = {}
        with styled():
            for picture, draw in ((LOSSES, draw_losses), (CATEGORIES, draw_categories)):
                figure = draw(comparison.runs)
                save(figure, folder / picture.name)
                pictures[picture.name] = as_svg(figure)
        page.write_text(to_html(document, pictures), encoding="utf-8")
        text.write_text(to_markdown(document), encoding="utf-8")
        write_json(data, comparison.report().to_json())
    except OSError as error:
        cause = f"The report can't be written to {folder}: {error.strerror or error}"
        raise EnvironmentProblem(cause, "Check permissions and free space, or choose another --output.") from None
    return [page, text, data]


def _refuse_foreign_files(folder: Path) -> None:
    """Refuse to replace files that have a report's names but are not an earlier report."""
    found = [name for name in REPORT_FILES if (folder / name).exists()]
    if not found or Report.find(folder / REPORT_JSON):
        return
    raise EnvironmentProblem(
        f"{folder / found[0]} exists and does not belong to a report of this program, so it is not replaced.",
        "Choose another --output, or move that file.",
    )
