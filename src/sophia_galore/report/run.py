"""A run as read from its folder: configuration, plan, metrics, memory and environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sophia_galore.errors import UserError
from sophia_galore.records import files
from sophia_galore.records.memory import MemoryReport
from sophia_galore.records.metrics import Metrics, read_metrics
from sophia_galore.records.run import Environment, PlanRecord


@dataclass(frozen=True)
class Run:
    """What a report needs to know about one run.

    Args:
        name: Its name in the comparison.
        folder: Its folder.
        config: The configuration, by dotted key.
        plan: The plan.
        metrics: Steps and evaluations so far.
        memory: The memory report; None while it is running.
        environment: Machine, versions and command; empty in runs of version 0.4 and before.
        failure: Why it failed; "" if it did not.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    plan: PlanRecord
    metrics: Metrics
    memory: MemoryReport | None
    environment: Environment
    failure: str = ""

    @property
    def label(self) -> str:
        """Name and seed: `galore, seed 42`."""
        return f"{self.name}, seed {self.seed}"

    @property
    def seed(self) -> int:
        """`training.seed`."""
        return int(self.config.get("training.seed", 0))

    @property
    def step(self) -> int:
        """The last step that was recorded."""
        return self.metrics.train[-1].step if self.metrics.train else 0

    @property
    def loss_before(self) -> float | None:
        """Eval loss before the first step; None if it was not measured."""
        return next((line.loss for line in self.metrics.eval if line.step == 0), None)

    @property
    def finished(self) -> bool:
        """Whether it ended, after all steps or early, and the model is written."""
        return (self.step >= self.plan.num_steps or self.ended_early) and files.holds_final_model(self.folder)

    @property
    def ended_early(self) -> bool:
        """Whether it stopped before the last step because of `training.early_stopping_patience`."""
        patience = self.config.get("training.early_stopping_patience")
        if patience is None or not self.metrics.eval or self.step >= self.plan.num_steps:
            return False
        last = self.metrics.eval[-1]
        return last.step == self.step and last.without_improvement is not None and last.without_improvement >= patience


def read_run(folder: Path, *, name: str = "", failure: str = "") -> Run:
    """Read a run, finished or not.

    Args:
        folder: The run's folder.
        name: Its name; "": the name of the folder.
        failure: Why it failed; "" if it did not.

    Raises:
        UserError: The folder is not a run's, or a file in it is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.", "Name the folder of a run (training.output_dir).")
    plan = PlanRecord.read(folder / files.PLAN)
    memory, environment = folder / files.MEMORY_REPORT, folder / files.ENVIRONMENT
    return Run(
        name=name or folder.name,
        folder=folder,
        config=_flat(_yaml(folder / files.CONFIG)),
        plan=plan,
        metrics=read_metrics(folder) if (folder / files.METRICS).exists() else Metrics(),
        memory=MemoryReport.read(memory) if memory.exists() else None,
        environment=Environment.read(environment) if environment.exists() else Environment(),
        failure=failure,
    )


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
    """Return nested values by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return flat
