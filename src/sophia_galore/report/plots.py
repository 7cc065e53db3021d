"""Writes figures: the loss and the memory of a run, and the memory of a planned step."""

from __future__ import annotations

from pathlib import Path

from sophia_galore.records.files import EXPERTS_PICTURE, LOSS_PICTURE, MEMORY_PICTURE, MEMORY_REPORT, METRICS
from sophia_galore.records.memory import MemoryReport, Timeline
from sophia_galore.records.metrics import Metrics, read_metrics
from sophia_galore.report.style import save, styled


def plot_loss(run_dir: Path) -> Path:
    """Draw training loss, evaluation loss and learning rate over the steps.

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
        return save(draw_loss(metrics), run_dir / LOSS_PICTURE)


def plot_memory(run_dir: Path) -> Path:
    """Draw the peak by phase and by category, memory over the steps and, if it was recorded, one step in detail.

    Args:
        run_dir: Folder of the run, which holds `memory_report.json` and, with steps, `metrics.jsonl`.

    Returns:
        The written `memory.png` in the same folder.

    Raises:
        UserError: If the report is missing or broken.
        EnvironmentProblem: If the figure can't be written.
    """
    report = MemoryReport.read(run_dir / MEMORY_REPORT)
    metrics = read_metrics(run_dir) if (run_dir / METRICS).exists() else Metrics()
    from sophia_galore.report.draw_memory import draw_memory

    with styled():
        return save(draw_memory(report, metrics), run_dir / MEMORY_PICTURE)


def plot_experts(run_dir: Path) -> Path | None:
    """Draw how tokens were dealt to experts.

    Args:
        run_dir: Folder of the run, which holds `metrics.jsonl`.

    Returns:
        The written `experts.png` in the same folder; None: the model has no experts.

    Raises:
        UserError: If the records are missing or broken.
        EnvironmentProblem: If the figure can't be written.
    """
    metrics = read_metrics(run_dir)
    from sophia_galore.report.draw_experts import draw_experts, has_experts

    if not has_experts(metrics):
        return None
    with styled():
        return save(draw_experts(metrics), run_dir / EXPERTS_PICTURE)


def plot_timeline(
    timeline: Timeline, path: Path, *, title: str, limit_bytes: int | None, predicted_peak_bytes: int | None
) -> Path:
    """Draw the memory within one step.

    Args:
        timeline: The step; not empty.
        path: The PNG to write.
        title: Headline of the figure.
        limit_bytes: The memory limit; None without one.
        predicted_peak_bytes: Peak to mark as predicted; None without one.

    Returns:
        `path`.

    Raises:
        EnvironmentProblem: If the figure can't be written.
    """
    from sophia_galore.report.draw_timeline import timeline_figure

    bounds = {"limit_bytes": limit_bytes, "predicted_peak_bytes": predicted_peak_bytes}
    with styled():
        return save(timeline_figure(timeline, title=title, **bounds), path)
