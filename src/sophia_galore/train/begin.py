"""How a run begins: anew, or from which checkpoint. The first process decides for all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sophia_galore.config import RunConfig
from sophia_galore.distributed.launch import launcher
from sophia_galore.distributed.processes import num_restarts
from sophia_galore.errors import CheckpointError
from sophia_galore.records import files
from sophia_galore.records.run import Environment
from sophia_galore.train.checkpoint import Checkpoint, checkpoints, find_checkpoint
from sophia_galore.train.folder import finish_replacing
from sophia_galore.train.result import RunResult, finished_result
from sophia_galore.train.run_date import fill_date


@dataclass(frozen=True)
class Start:
    """How the user started a run.

    Args:
        resume: Continue from a checkpoint.
        resume_from: The checkpoint; None: the newest complete one in the run's folder.
        command: The command line, for the run's records.
        config_file: The file of the configuration, which must not be moved.
    """

    resume: bool = False
    resume_from: Path | None = None
    command: str = ""
    config_file: Path | None = None


@dataclass(frozen=True)
class Beginning:
    """How a run begins.

    Args:
        config: The configuration, with the date of the run in its folder's name.
        checkpoint: The checkpoint to resume from, verified; None: the run begins anew.
        finished: The result, if the run is finished already.
    """

    config: RunConfig
    checkpoint: Checkpoint | None
    finished: RunResult | None


def begin(config: RunConfig, start: Start) -> Beginning:
    """Find out how a run begins.

    Args:
        config: The configuration.
        start: How the user started it.

    Raises:
        UserError: There is no such checkpoint.
    """
    if num_restarts() and (own := _own_run(config)):
        return Beginning(own, find_checkpoint(Path(own.run_folder), None), None)
    config = fill_date(config, resume=start.resume, resume_from=start.resume_from)
    folder = Path(config.run_folder)
    finish_replacing(folder)
    if not start.resume:
        return Beginning(config, None, None)
    if not start.resume_from and (finished := finished_result(folder, config)):
        return Beginning(config, None, finished)
    return Beginning(config, find_checkpoint(folder, start.resume_from), None)


def _own_run(config: RunConfig) -> RunConfig | None:
    """Return the configuration of the run that the same launcher started before a failure, if it has a checkpoint."""
    try:
        config = fill_date(config, resume=True)
    except CheckpointError:
        return None
    folder = Path(config.run_folder)
    environment = Environment.find(folder / files.ENVIRONMENT)
    return config if environment and environment.launcher == launcher() and checkpoints(folder) else None
