"""The run's folder: where everything about a run lies."""

from __future__ import annotations

from pathlib import Path

from sophia_galore.errors import EnvironmentProblem

METRICS = "metrics.jsonl"
PLAN = "plan.json"
CONFIG = "run_config.yaml"
ANSWERS = "answers.json"
MEMORY_REPORT = "memory_report.json"
TRAINER_STATE = "trainer_state.json"
MODEL = "model.safetensors"


def open_run_folder(folder: Path, *, resume: bool) -> Path | None:
    """Make the run's folder; an earlier run in it is moved aside, never written over.

    Args:
        folder: The run's folder.
        resume: Whether the run in it goes on.

    Returns:
        Where the earlier run was moved to, or None.

    Raises:
        EnvironmentProblem: The folder can't be made or written to.
    """
    try:
        moved = None
        if not resume and (folder / METRICS).exists():
            moved = _free_name(folder)
            folder.rename(moved)
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
        return moved
    except OSError as error:
        raise EnvironmentProblem(
            f"The output folder {folder} can't be written to: {error.strerror or error}.",
            "Choose another training.output_dir.",
        ) from error


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.previous-{number}")).exists():
        number += 1
    return aside
