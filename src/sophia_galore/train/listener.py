"""Who hears what happens in a run."""

from __future__ import annotations

from typing import Any

from sophia_galore.config.schema import DataConfig
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

    def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
        """A step is done."""

    def evaluated(self, step: int, eval_loss: float) -> None:
        """An evaluation is done."""

    def answered(self, when: str, answers: list[tuple[str, str]]) -> None:
        """The sample questions were answered, `when` "before" or "after" training."""
