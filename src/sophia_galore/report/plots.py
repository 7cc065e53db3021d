"""The figures: how the loss of a run went, where its memory went, and where that of a plan would go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sophia_galore.errors import UserError
from sophia_galore.report.json_fields import FOREIGN
from sophia_galore.report.memory_report import read_memory_report
from sophia_galore.report.records import METRICS_FILE, Metrics, read_metrics
from sophia_galore.report.style import save, styled
from sophia_galore.report.timeline import timeline_of


def plot_loss(run_dir: Path) -> Path:
    """Draws training loss, evaluation loss and learning rate over the steps.

    Args:
        run_dir: Folder of the run, which holds `metrics.jsonl`.

    Returns:
        The written `loss.png` in the same folder.

    Raises:
        UserError: If the records are missing or broken.
        EnvironmentProblem: If the figure can't be written.
    """
    metrics = read_metrics(run_dir)
    from sophia_galore.report.draw_loss import draw_loss

    with styled():
        return save(draw_loss(metrics), Path(run_dir) / "loss.png")


def plot_memory(run_dir: Path) -> Path:
    """Draws the peak by phase, what it consists of, and memory over the steps; above them one step, if it was followed.

    Args:
        run_dir: Folder of the run, which holds `memory_report.json` and, with steps, `metrics.jsonl`.

    Returns:
        The written `memory.png` in the same folder.

    Raises:
        UserError: If the report is missing or broken.
        EnvironmentProblem: If the figure can't be written.
    """
    report = read_memory_report(run_dir)
    has_metrics = (Path(run_dir) / METRICS_FILE).exists()
    metrics = read_metrics(run_dir) if has_metrics else Metrics((), ())
    from sophia_galore.report.draw_memory import draw_memory

    with styled():
        return save(draw_memory(report, metrics), Path(run_dir) / "memory.png")


def plot_timeline(
    timeline: Mapping[str, Any],
    path: Path,
    *,
    title: str,
    limit_bytes: int | None,
    predicted_peak_bytes: int | None,
) -> Path:
    """Draws the memory of one step from moment to moment.

    Args:
        timeline: `{"step": 2, "points": [{"phase": "forward", "categories": {"weights": 5}}, ...]}`, sizes in bytes;
            points that were measured have a `time_s`.
        path: The PNG to write.
        title: Headline of the figure.
        limit_bytes: What may be allocated; None without a limit.
        predicted_peak_bytes: Peak to mark as predicted; None without one.

    Returns:
        `path`.

    Raises:
        UserError: If the timeline is none, or nothing is allocated in it.
        EnvironmentProblem: If the figure can't be written.
    """
    found = timeline_of(timeline, "timeline")
    if found is None:
        raise UserError("The timeline has no point at which something is allocated", FOREIGN)
    from sophia_galore.report.draw_timeline import timeline_figure

    with styled():
        figure = timeline_figure(found, title=title, limit_bytes=limit_bytes, predicted_peak_bytes=predicted_peak_bytes)
        return save(figure, Path(path))
