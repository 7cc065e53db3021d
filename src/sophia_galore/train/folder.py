"""The run's folder: where everything about a run lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON document as people can read it."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def replace_files(folder: Path, write: Callable[[Path], None], *, last: str) -> None:
    """Let files appear in a folder whole, never half written.

    Args:
        folder: Where they belong; files of the same names are replaced.
        write: Writes the files into the folder it is given.
        last: Name of the file that comes last: whoever finds it finds all of them.
    """
    beside = folder / ".files.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    write(beside)
    for path in sorted(beside.iterdir(), key=lambda path: path.name == last):
        path.replace(folder / path.name)
    beside.rmdir()


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.previous-{number}")).exists():
        number += 1
    return aside
