"""How a run ended, as an object and as read from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.config import RunConfig, load_config
from sophia_galore.errors import UserError
from sophia_galore.train import folder as names
from sophia_galore.train.progress import ended_early


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Args:
        folder: The run's folder.
        step: The last step that was done.
        finished: Whether the run came to its end, early or not; otherwise it was stopped and can go on.
        saved: The checkpoint to go on from, if the run was stopped.
        eval_losses: Step and loss of every evaluation, in nats a token.
        memory: The memory report.
        exported: Step and eval loss of the final model, if it was chosen by that.
        early: Whether steps are left.
    """

    folder: Path
    step: int
    finished: bool
    saved: Path | None
    eval_losses: list[tuple[int, float]]
    memory: dict[str, Any]
    exported: tuple[int, float] | None = None
    early: bool = False

    @property
    def how_it_ended(self) -> str:
        """How a finished run ended, in words that follow "it is finished:"."""
        return f"it ended early, after step {self.step}" if self.early else f"all of its {self.step} steps are done"


def eval_losses(lines: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Step and loss of every evaluation among a run's records."""
    return [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line]


def exported(lines: Iterable[Mapping[str, Any]]) -> tuple[int, float] | None:
    """Step and eval loss of the model that was written in the end, by a run's records; None: they do not say."""
    found = [(line["exported_step"], line["exported_eval_loss"]) for line in lines if "exported_step" in line]
    return found[-1] if found else None


def asked_of(folder: Path) -> RunConfig | None:
    """What was asked of the run in a folder; None if there is none, or it asks for what this version does not know.

    Args:
        folder: The run's folder.
    """
    path = folder / names.CONFIG
    try:
        return load_config(path) if path.is_file() else None
    except UserError:
        return None


def finished_result(folder: Path, config: RunConfig) -> RunResult | None:
    """The result of a run that was carried out to its end with this very configuration.

    Args:
        folder: The run's folder.
        config: What is asked now.

    Returns:
        The result, or None if the run is not finished or was another one.
    """
    if asked_of(folder) != config:
        return None
    try:
        state = json.loads((folder / names.TRAINER_STATE).read_text(encoding="utf-8"))
        memory = json.loads((folder / names.MEMORY_REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    early = state["global_step"] < state["max_steps"]
    if (early and not ended_early(state)) or not (folder / names.MODEL).is_file():
        return None
    return RunResult(
        folder=folder,
        step=state["global_step"],
        finished=True,
        saved=None,
        eval_losses=eval_losses(state["log_history"]),
        memory=memory,
        exported=exported(state["log_history"]),
        early=early,
    )
