"""A run as its folder tells it: what was asked, what was planned, what happened, and with what."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sophia_galore.errors import UserError
from sophia_galore.report.memory_report import MEMORY_FILE, MemoryReport, read_memory_report
from sophia_galore.report.records import METRICS_FILE, Metrics, read_metrics

PLAN_FILE = "plan.json"
CONFIG_FILE = "run_config.yaml"
ENVIRONMENT_FILE = "environment.json"
MODEL_FILE = "model.safetensors"


@dataclass(frozen=True)
class Run:
    """Everything that a report needs to know of one run.

    Args:
        name: What it is called among the runs that it is compared with.
        folder: Where it lies.
        config: What was asked, by dotted key.
        plan: What was planned, as in `plan.json`.
        metrics: Steps and evaluations, as far as it came.
        memory: Where its memory went; None while it is running.
        environment: Machine, versions and command; {} in runs of version 0.4 and before.
        failure: How it ended, if it failed.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: Metrics
    memory: MemoryReport | None
    environment: Mapping[str, Any]
    failure: str = ""

    @property
    def seed(self) -> int:
        """`training.seed`."""
        return int(self.config.get("training.seed", 0))

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        return self.metrics.train[-1].step if self.metrics.train else 0

    @property
    def num_steps(self) -> int:
        """Steps that were planned."""
        return int(self.plan["num_steps"])

    @property
    def finished(self) -> bool:
        """Whether all of them are done, or it ended early, and the model is written."""
        return (self.step >= self.num_steps or self.ended_early) and (self.folder / MODEL_FILE).is_file()

    @property
    def ended_early(self) -> bool:
        """Whether its patience was used up before all steps were done (`training.early_stopping_patience`)."""
        patience = self.config.get("training.early_stopping_patience")
        if patience is None or not self.metrics.eval or self.step >= self.num_steps:
            return False
        last = self.metrics.eval[-1]
        return last.step == self.step and last.waited is not None and last.waited >= patience


def read_run(folder: Path, *, name: str = "", failure: str = "") -> Run:
    """Read what a run has left so far, finished or not.

    Args:
        folder: The run's folder.
        name: What to call it; "": as the folder.
        failure: How it ended, if it failed.

    Raises:
        UserError: It is no run's folder, or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder.", "Name the folder of a run (training.output_dir).")
    plan = _json(folder / PLAN_FILE)
    needed = ("num_steps", "steps_per_epoch", "optimizer", "trained_fraction", "bytes", "data_fingerprint", "routes")
    if missing := [key for key in needed if key not in plan]:
        raise UserError(f"{folder / PLAN_FILE} lacks '{missing[0]}'", "Restore the file, or train again.")
    return Run(
        name=name or folder.name,
        folder=folder,
        config=_flat(_yaml(folder / CONFIG_FILE)),
        plan=plan,
        metrics=read_metrics(folder) if (folder / METRICS_FILE).exists() else Metrics((), ()),
        memory=read_memory_report(folder) if (folder / MEMORY_FILE).exists() else None,
        environment=_json(folder / ENVIRONMENT_FILE) if (folder / ENVIRONMENT_FILE).exists() else {},
        failure=failure,
    )


def begun(folder: Path) -> str:
    """When a run was started, as a text that sorts by time; "" where that is not known."""
    path = folder / ENVIRONMENT_FILE
    return str(_json(path).get("started", "")) if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} can't be read", "Name the folder of a run (training.output_dir).") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}", "Restore the file, or train again.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what a run writes", "Restore the file, or train again.")
    return found


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{path} can't be read", "Name the folder of a run (training.output_dir).") from None
    except YAMLError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not what a run writes", "Restore the file, or train again.")
    return found


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat
