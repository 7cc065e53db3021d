"""The date in the name of a run's folder: when the run was first started, also after a resume."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from sophia_galore.config import RunConfig
from sophia_galore.config.dump import changed
from sophia_galore.config.paths import dated, dates_of, has_date
from sophia_galore.errors import CheckpointError


def fill_date(
    config: RunConfig, *, resume: bool = False, resume_from: Path | None = None, now: datetime | None = None
) -> RunConfig:
    """Replace `{date}` in `training.output_dir` by a date.

    Args:
        config: The configuration; returned unchanged if it has no `{date}`.
        resume: Take the date of the newest existing folder.
        resume_from: The checkpoint or run's folder to resume from; its date is taken if the name fits.
        now: The date of a new run; None: now.

    Raises:
        CheckpointError: No folder fits.
    """
    template = config.training.output_dir
    if not has_date(template):
        return config
    when = now or datetime.now()
    if resume:
        found = dates_of(template, optimizer=config.optimizer.type, model=config.model.name)
        if resume_from is not None:
            wanted = (resume_from.resolve(), resume_from.resolve().parent)
            when = next((date for folder, date in found.items() if folder.resolve() in wanted), when)
        elif found:
            when = max(found.values())
        else:
            raise CheckpointError(
                f"No folder fits training.output_dir={template}, so there is no run to go on with.",
                "Start without --resume, or name the checkpoint: --resume=PATH.",
            )
    return changed(config, {"training.output_dir": dated(template, when)})
