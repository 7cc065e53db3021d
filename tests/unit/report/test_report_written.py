"""The files of a report: Markdown, page and JSON say the same; each is drawn for any kind of run."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from made_runs import write_run
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.report.comparison import compare_runs
from sophia_galore.report.document import Bullets, Code, Document, Paragraph, Section, Table, to_html, to_markdown
from sophia_galore.report.run import Run, read_run
from sophia_galore.report.write import write_report

HOSTILE = '<script>alert("1 & 2")</script>'
PAGE = Document(
    HOSTILE,
    [Paragraph(HOSTILE), Bullets([HOSTILE], warning=True)],
    [Section(HOSTILE, [Table(["a|b", HOSTILE], [[HOSTILE, "1|2"]]), Code([HOSTILE])])],
)


class Tags(HTMLParser):
    """What elements a page opens and closes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_text_is_text_whatever_it_holds() -> None:
    tags = Tags(to_html(PAGE, {}))
    assert tags.open == []
    assert "script" not in {tag for tag, _ in tags.seen}
    markdown = to_markdown(PAGE)
    (row,) = [line for line in markdown.splitlines() if line.startswith("| <script>")]
    assert row.endswith(r"| 1\|2 |")
    assert f"- **Warning:** {HOSTILE}" in markdown


def several(folder: Path) -> list[Run]:
    runs = []
    for name, more in (("galore", {}), ("adamw", {"losses": (3.0, 2.8, 2.6, 2.5), "evals": {0: 3.1, 2: 2.5, 4: 2.3}})):
        for seed in (1, 2):
            config = {"optimizer": {"type": name}}
            made = write_run(folder / f"{name}{seed}", seed=seed, config=config, **more)  # type: ignore[arg-type]
            runs.append(read_run(made, name=name))
    return runs


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    page, text, data = write_report(compare_runs(several(tmp_path / "runs")), tmp_path / "report")
    tags = Tags(page.read_text(encoding="utf-8"))
    sources = [attributes.get("src") or attributes.get("href") or "" for tag, attributes in tags.seen if tag != "meta"]
    assert all(source.startswith("data:") for source in sources if source)
    assert sum(source.startswith("data:image/svg+xml") for source in sources) == 2
    assert "script" not in {tag for tag, _ in tags.seen}
    assert not re.search(r"url\((?!data:)|@import", page.read_text(encoding="utf-8"))
    for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", text.read_text(encoding="utf-8")):
        assert (text.parent / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads(data.read_text(encoding="utf-8"))["summary"][0]["name"] == "galore"


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    runs = several(tmp_path / "runs")
    for place in ("a", "b"):
        write_report(compare_runs(runs, command="c"), tmp_path / place)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["losses.png", "memory-by-category.png", "report.html", "report.json", "report.md"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_tables_hold_the_numbers(tmp_path: Path) -> None:
    _, text, _ = write_report(
        compare_runs(several(tmp_path / "runs"), command="sophia-galore compare x"), tmp_path / "out"
    )
    markdown = text.read_text(encoding="utf-8")
    assert "| galore | galore | 2 | 2.6000 ± 0.0000 | 2.4000 ± 0.0000 | - |" in markdown
    assert "| adamw | galore | 2 | 2.5000 ± 0.0000 | 2.3000 ± 0.0000 | -0.1000 ± 0.0000 |" in markdown
    assert "| galore | 900 MiB | 901 MiB | 1,800 MiB | 250 MiB | 100% |" in markdown
    assert "| galore | 4.0 ± 0.0 | 50.0 ± 0.0 |" in markdown
    assert "| optimizer.type | galore | adamw |" in markdown
    assert "Lowest eval loss at the end: adamw, 2.3000 ± 0.0000 nats a token; against it galore +4.35%." in markdown
    assert "2 cores, a processor, threads: 2" in markdown
    assert "sophia-galore compare x\nsophia-galore train --config galore1.yaml\n" in markdown


KINDS: dict[str, dict[str, Any]] = {
    "nothing yet": {"losses": [], "evals": {}, "finished": False},
    "one step": {"losses": [3.0], "evals": {}, "finished": False},
    "without evaluations": {"evals": {}},
    "not finite": {"losses": [3.0, float("nan"), float("inf"), 2.0], "evals": {0: float("nan"), 4: 2.0}},
    "many steps": {"losses": [3.0] * 40, "evals": {0: 3.0, 40: 2.0}, "plan": {"num_steps": 40, "steps_per_epoch": 20}},
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_run_can_be_reported(kind: str, tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", **KINDS[kind]))
    page, text, data = write_report(compare_runs([run]), tmp_path / "out")
    assert text.read_text(encoding="utf-8").startswith("# Run: run\n")
    assert Tags(page.read_text(encoding="utf-8")).open == []
    assert json.loads(data.read_text(encoding="utf-8"))["runs"][0]["name"] == "run"


def test_pictures_are_well_formed_and_name_every_run(tmp_path: Path) -> None:
    from sophia_galore.report.draw_comparison import draw_categories, draw_losses, line_styles
    from sophia_galore.report.style import as_svg, styled

    runs = [read_run(write_run(tmp_path / f"run{number}")) for number in range(9)]
    assert len(set(line_styles([run.name for run in runs]).values())) == 9  # more than there are colours
    with styled():
        figure = draw_losses(runs)
        legend = {text.get_text() for text in figure.legends[0].get_texts()}
        assert legend == {run.name for run in runs}
        for drawing in (figure, draw_categories(runs)):
            ElementTree.fromstring(as_svg(drawing))


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="can't be written"):
        write_report(compare_runs([run]), tmp_path / "file" / "out")
