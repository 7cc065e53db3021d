"""Figures: drawn for every kind of run, from nothing recorded to everything, the same bytes each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sophia_galore.errors import UserError
from sophia_galore.records.memory import MemoryReport
from sophia_galore.records.metrics import Metrics, read_metrics
from sophia_galore.report.draw_loss import draw_loss, smooth
from sophia_galore.report.draw_memory import draw_memory
from sophia_galore.report.plots import plot_loss, plot_memory
from sophia_galore.report.style import mebibytes

MIB = 2**20
PNG = b"\x89PNG\r\n\x1a\n"


def lines(
    steps: int, *, evals: bool = True, rate: float | None = 1e-3, size: int | None = 900 * MIB
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"step": 0, "epoch": 0, "eval_loss": 4.0}] if evals else []
    for step in range(1, steps + 1):
        sizes = {"allocated_bytes": size, "reserved_bytes": size}
        found.append({"step": step, "loss": 4 - step / (steps + 1), "learning_rate": rate} | sizes)
    if evals and steps:
        found.append({"step": steps, "epoch": 1, "eval_loss": 3.0})
    return found


REPORT: dict[str, Any] = {
    "device": "cpu",
    "measured_by": "tensor storages",
    "peak_allocated_bytes": 900 * MIB,
    "peak_reserved_bytes": None,
    "peak_process_bytes": 1500 * MIB,
    "phases": {"forward": 700 * MIB, "backward": 900 * MIB},
    "categories": {"weights": 500 * MIB, "optimizer_state": 300 * MIB, "activations": 100 * MIB},
    "steps": [],
}

METRICS: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "one step": lines(1, evals=False),
    "one evaluation": [{"step": 0, "epoch": 0, "eval_loss": 4.0}],
    "no evaluation": lines(30, evals=False),
    "no rate": lines(5, rate=None),
    "rate of zero": lines(5, rate=0.0),
    "no sizes": lines(5, size=None),
    "full": lines(200),
    "not finite": [*lines(12), {"step": 13, "loss": float("nan")}, {"step": 14, "loss": float("inf")}],
    "nothing finite": [{"step": 1, "loss": float("nan")}],
    "many evaluations": [{"step": step, "eval_loss": 3.0} for step in range(60)],
}

REPORTS: dict[str, dict[str, Any]] = {
    "empty": {},
    "nulls": dict.fromkeys(REPORT),
    "full": REPORT,
    "zeros": REPORT | {"phases": {"forward": 0}, "categories": {"weights": 0}},
    "many": REPORT
    | {
        "phases": {f"phase {i}": i for i in range(30)},
        "categories": {f"a_very_long_name_{i}" * 3: i for i in range(30)},
    },
    "one step": REPORT
    | {"steps": [{"step": 1, "allocated_bytes": None, "reserved_bytes": None, "process_bytes": 5 * MIB}]},
}


def write(folder: Path, metrics: list[dict[str, Any]], report: dict[str, Any] | None = None) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    if report is not None:
        (folder / "memory_report.json").write_text(json.dumps(report))
    return folder


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("name", METRICS)
def test_the_loss_of_any_run_can_be_drawn(tmp_path: Path, name: str) -> None:
    path = plot_loss(write(tmp_path, METRICS[name]))
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize("metrics", ["nothing", "one step", "no sizes", "full"])
@pytest.mark.parametrize("report", REPORTS)
def test_the_memory_of_any_run_can_be_drawn(tmp_path: Path, metrics: str, report: str) -> None:
    path = plot_memory(write(tmp_path, METRICS[metrics], REPORTS[report]))
    assert path == tmp_path / "memory.png"
    assert path.read_bytes().startswith(PNG)


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path, METRICS["full"], REPORT)
    first = (plot_loss(tmp_path).read_bytes(), plot_memory(tmp_path).read_bytes())
    assert (plot_loss(tmp_path).read_bytes(), plot_memory(tmp_path).read_bytes()) == first


def test_the_users_own_matplotlib_settings_change_nothing(tmp_path: Path) -> None:
    import matplotlib

    write(tmp_path, METRICS["full"])
    first = plot_loss(tmp_path).read_bytes()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        assert plot_loss(tmp_path).read_bytes() == first
        assert matplotlib.rcParams["font.size"] == 30


def test_memory_needs_no_step_records(tmp_path: Path) -> None:
    (tmp_path / "memory_report.json").write_text(json.dumps(REPORT))
    assert plot_memory(tmp_path).exists()


def test_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        plot_loss(tmp_path)
    with pytest.raises(UserError, match=r"memory_report\.json"):
        plot_memory(tmp_path)


def test_the_memory_figure_says_sizes_and_shares(tmp_path: Path) -> None:
    write(tmp_path, [], REPORT)
    said = texts(draw_memory(MemoryReport.read(tmp_path / "memory_report.json"), Metrics()))
    for words in (
        "900 MiB tensors",
        "1,500 MiB process",
        "optimizer state",
        "500 MiB  (56 %)",
        "cpu",
        "tensor storages",
    ):
        assert words in said


def test_the_loss_figure_says_where_it_began_and_ended(tmp_path: Path) -> None:
    said = texts(draw_loss(read_metrics(write(tmp_path, METRICS["full"]))))
    assert "200 steps" in said
    assert "4.000 → 3.000" in said
    said = texts(draw_loss(read_metrics(write(tmp_path, METRICS["not finite"]))))
    assert "2 not finite" in said


def test_many_categories_are_summed_up_without_losing_any(tmp_path: Path) -> None:
    write(tmp_path, [], {"categories": {f"c{i}": 100 * MIB for i in range(20)}})
    said = texts(draw_memory(MemoryReport.read(tmp_path / "memory_report.json"), Metrics()))
    assert said.count("100 MiB  (5 %)") == 8
    assert "1,200 MiB  (60 %)" in said


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 MiB"), (1, "< 0.1 MiB"), (MIB, "1.0 MiB"), (12.4 * MIB, "12 MiB"), (2**31, "2,048 MiB")]
)
def test_sizes_are_readable(size: float, text: str) -> None:
    assert mebibytes(size) == text


def test_smoothing_keeps_level_and_direction() -> None:
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    noisy = [step + (1 if step % 2 else -1) for step in range(200)]
    trend = smooth(noisy)
    assert len(trend) == 200
    # No lag: away from the ends the trend of a straight line is that line (worst seen 0.0055, so 0.02).
    assert max(abs(trend[step] - step) for step in range(80, 120)) < 0.02
    assert smooth([1.0]) == [1.0]


def test_reading_records_does_not_import_matplotlib() -> None:
    code = "import sys, sophia_galore.report.plots; sys.exit('matplotlib' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environment).returncode == 0
