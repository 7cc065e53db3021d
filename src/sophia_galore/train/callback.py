"""Callbacks: methods that a run calls at its events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sophia_galore.config.schema_data import DataConfig
from sophia_galore.data.dataset import Dataset
from sophia_galore.plan.plan import RunPlan


class Callback:
    """Does nothing; subclasses override the methods for the events they need."""

    def say(self, text: str) -> None:
        """A sentence for the user."""

    def data_read(self, asked: DataConfig, dataset: Dataset) -> None:
        """The data were read and tokenised."""

    def planned(self, plan: RunPlan) -> None:
        """The plan is made."""

    def examples(self, rendered: list[list[tuple[str, bool]]]) -> None:
        """Training examples as segments of text, each with whether its loss counts."""

    def opened(self, folder: Path, *, after_step: int, records: Sequence[dict[str, Any]]) -> None:
        """The run's folder is ready, an earlier run was moved aside, and the first step comes next.

        Args:
            folder: The run's folder.
            after_step: The step of the checkpoint that the run resumes from; 0: a new run.
            records: The lines of `metrics.jsonl` up to that step.
        """

    def recorded(self, record: dict[str, Any]) -> None:
        """A line was written to `metrics.jsonl`."""

    def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
        """A step is done."""

    def evaluated(self, step: int, eval_loss: float) -> None:
        """An evaluation is done."""

    def answered(self, when: str, answers: list[tuple[str, str]]) -> None:
        """The sample questions were answered, `when` "before" or "after" training."""

    def closed(self, *, failed: bool) -> None:
        """The run is over: finished, stopped or failed."""


class Callbacks(Callback):
    """Calls several callbacks, in order.

    Args:
        callbacks: The callbacks.
    """

    def __init__(self, *callbacks: Callback) -> None:
        self._callbacks = callbacks


def _call_each(name: str) -> Callable[..., None]:
    def call(self: Callbacks, *given: Any, **named: Any) -> None:
        for each in self._callbacks:
            getattr(each, name)(*given, **named)

    return call


for _name in [name for name in vars(Callback) if not name.startswith("_")]:
    setattr(Callbacks, _name, _call_each(_name))
