"""The date in the name of a run's folder: that of the run's beginning, also when it goes on."""

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
    """A configuration whose `training.output_dir` has a date in place of `{date}`.

    Args:
        config: What was asked; one without `{date}` comes back unchanged.
        resume: Whether a run goes on: the one whose folder has the latest date.
        resume_from: The checkpoint or run's folder that was named; if it fits, its date is taken.
        now: The date of a run that begins; None: now.

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
