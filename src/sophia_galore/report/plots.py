"""The two figures of a run: how the loss went, and where the memory went."""

from __future__ import annotations

from pathlib import Path

from sophia_galore.report.memory_report import read_memory_report
from sophia_galore.report.records import METRICS_FILE, Metrics, read_metrics
from sophia_galore.report.style import save, styled


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
    """Draws the peak by phase, what it consists of, and memory over the steps.

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
