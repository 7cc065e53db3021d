"""Who hears what happens in a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sophia_galore.config.schema_data import DataConfig
from sophia_galore.data.dataset import Dataset
from sophia_galore.plan.plan import RunPlan


class Listener:
    """Hears everything, shows nothing; the command line overrides it."""

    def say(self, text: str) -> None:
        """A sentence for the user."""

    def data_read(self, asked: DataConfig, dataset: Dataset) -> None:
        """The data were read and tokenised."""

    def planned(self, plan: RunPlan) -> None:
        """The plan is made."""

    def examples(self, rendered: list[list[tuple[str, bool]]]) -> None:
        """Training examples as segments of text, each with whether its loss counts."""

    def opened(self, folder: Path, *, after_step: int, records: Sequence[dict[str, Any]]) -> None:
        """The run's folder is open, an earlier run is out of the way, and steps come next.

        Args:
            folder: The run's folder.
            after_step: The step that the run goes on after; 0: a new run.
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
        """The run whose folder was opened is over: done or stopped, or failed."""


class Listeners(Listener):
    """Several listeners as one: each hears everything.

    Args:
        listeners: The listeners, in the order in which they hear it.
    """

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def say(self, text: str) -> None:
        """A sentence for the user."""
        for each in self._listeners:
            each.say(text)

    def data_read(self, asked: DataConfig, dataset: Dataset) -> None:
        """The data were read and tokenised."""
        for each in self._listeners:
            each.data_read(asked, dataset)

    def planned(self, plan: RunPlan) -> None:
        """The plan is made."""
        for each in self._listeners:
            each.planned(plan)

    def examples(self, rendered: list[list[tuple[str, bool]]]) -> None:
        """Training examples as segments of text, each with whether its loss counts."""
        for each in self._listeners:
            each.examples(rendered)

    def opened(self, folder: Path, *, after_step: int, records: Sequence[dict[str, Any]]) -> None:
        """The run's folder is open, and steps come next."""
        for each in self._listeners:
            each.opened(folder, after_step=after_step, records=records)

    def recorded(self, record: dict[str, Any]) -> None:
        """A line was written to `metrics.jsonl`."""
        for each in self._listeners:
            each.recorded(record)

    def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
        """A step is done."""
        for each in self._listeners:
            each.stepped(record, num_steps=num_steps, seconds_left=seconds_left)

    def evaluated(self, step: int, eval_loss: float) -> None:
        """An evaluation is done."""
        for each in self._listeners:
            each.evaluated(step, eval_loss)

    def answered(self, when: str, answers: list[tuple[str, str]]) -> None:
        """The sample questions were answered, `when` "before" or "after" training."""
        for each in self._listeners:
            each.answered(when, answers)

    def closed(self, *, failed: bool) -> None:
        """The run is over."""
        for each in self._listeners:
            each.closed(failed=failed)
