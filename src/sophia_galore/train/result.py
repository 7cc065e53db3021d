"""How a run ended, as an object and as read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sophia_galore.config import RunConfig, load_config
from sophia_galore.errors import UserError
from sophia_galore.records import files
from sophia_galore.records.memory import MemoryReport
from sophia_galore.records.metrics import Evaluation, Exported
from sophia_galore.records.run import TrainerState


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Args:
        folder: The run's folder.
        state: What was done.
        memory: Where its memory went.
        saved: The checkpoint to go on from, if the run was stopped; None: it came to its end, early or not.
    """

    folder: Path
    state: TrainerState
    memory: MemoryReport
    saved: Path | None = None

    @property
    def step(self) -> int:
        """The last step that was done."""
        return self.state.global_step

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; otherwise it was stopped and can go on."""
        return self.saved is None

    @property
    def early(self) -> bool:
        """Whether steps are left."""
        return self.state.has_steps_left

    @property
    def evaluations(self) -> list[Evaluation]:
        """All of them."""
        return self.state.evaluations

    @property
    def exported(self) -> Exported | None:
        """The final model, if it was chosen by its eval loss."""
        return self.state.exported

    @property
    def how_it_ended(self) -> str:
        """How a finished run ended, in words that follow "it is finished:"."""
        return f"it ended early, after step {self.step}" if self.early else f"all of its {self.step} steps are done"


def find_config(folder: Path) -> RunConfig | None:
    """What was asked of the run in a folder; None if there is none, or it asks for what this version does not know.

    Args:
        folder: The run's folder.
    """
    path = folder / files.CONFIG
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
    if find_config(folder) != config:
        return None
    state = TrainerState.find(folder / files.TRAINER_STATE)
    memory = MemoryReport.find(folder / files.MEMORY_REPORT)
    if state is None or memory is None or not (folder / files.MODEL).is_file():
        return None
    return None if state.has_steps_left and not state.ended_early else RunResult(folder, state, memory)
