"""The result of a run, returned by `train` or read from its folder."""

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
    """The result of a run.

    Args:
        folder: The run's folder.
        state: The steps and evaluations.
        memory: The memory report.
        saved: The checkpoint to resume from if the run was stopped; None: it ended, early or not.
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
        """Whether the run ended; if not, it was stopped and can be resumed."""
        return self.saved is None

    @property
    def early(self) -> bool:
        """Whether the run ended before its last planned step."""
        return self.state.has_steps_left

    @property
    def evaluations(self) -> list[Evaluation]:
        """All evaluations of the run."""
        return self.state.evaluations

    @property
    def exported(self) -> Exported | None:
        """The final model, if it was chosen by its eval loss."""
        return self.state.exported

    @property
    def how_it_ended(self) -> str:
        """How a finished run ended, as a phrase after "is finished:"."""
        return f"it ended early, after step {self.step}" if self.early else f"all of its {self.step} steps are done"


def find_config(folder: Path) -> RunConfig | None:
    """Load the configuration of the run in a folder; None if there is none, or this version can't read it.

    Args:
        folder: The run's folder.
    """
    path = folder / files.CONFIG
    try:
        return load_config(path) if path.is_file() else None
    except UserError:
        return None


def finished_result(folder: Path, config: RunConfig) -> RunResult | None:
    """Read the result of a run that finished with exactly this configuration.

    Args:
        folder: The run's folder.
        config: The configuration now.

    Returns:
        The result, or None if the run is not finished or was another one.
    """
    if find_config(folder) != config:
        return None
    state = TrainerState.find(folder / files.TRAINER_STATE)
    memory = MemoryReport.find(folder / files.MEMORY_REPORT)
    if state is None or memory is None or not files.holds_final_model(folder):
        return None
    return None if state.has_steps_left and not state.ended_early else RunResult(folder, state, memory)
