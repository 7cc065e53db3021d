"""Send the records of `metrics.jsonl` to trackers; a tracker that fails is dropped, and the run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.config.dump import flatten
from sophia_galore.config.field_types import TrackerName
from sophia_galore.errors import short
from sophia_galore.plan.plan import RunPlan
from sophia_galore.records import files
from sophia_galore.records.schema import write_json
from sophia_galore.train.callback import Callback
from sophia_galore.train.integrations import BEGIN, RunStart, TrackedRun

# Values of the plan that trackers show beside the configuration.
_PLANNED = (
    "model_source",
    "device",
    "compute_dtype",
    "learning_rate",
    "dense_learning_rate",
    "num_parameters",
    "num_trained_parameters",
    "num_train_examples",
    "num_eval_examples",
    "num_steps",
    "data_fingerprint",
)


class Trackers(Callback):
    """Sends every record to the trackers of `training.report_to`.

    Trackers start when the run's folder is ready, since some write into it. The id that each tracker gives the run is
    kept in that folder, so that a resumed run is the same run there. A tracker that is added at a resume gets the
    earlier records too.

    Args:
        config: The run's configuration.
        say: Takes sentences for the user.
    """

    def __init__(self, config: RunConfig, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say
        self._plan: RunPlan | None = None
        self._open: dict[TrackerName, TrackedRun] = {}

    def planned(self, plan: RunPlan) -> None:
        """Keep the plan, for the trackers."""
        self._plan = plan

    def opened(self, folder: Path, *, after_step: int, records: Sequence[dict[str, Any]]) -> None:
        """Start or continue the run in each tracker."""
        path = folder / files.TRACKERS
        with self._surviving(*self._config.training.report_to):
            # Of a new run nothing is known, whatever lies in the folder.
            known = json.loads(path.read_text(encoding="utf-8")) if after_step and path.exists() else {}
            settings = self._settings()
            for name in self._config.training.report_to:
                with self._surviving(name):
                    begin = RunStart(folder, settings, after_step, tracker_id=known.get(name, ""))
                    self._open[name] = BEGIN[name](begin)
            called = {name: tracked.name for name, tracked in self._open.items() if tracked.name}
            if known | called != known:
                write_json(path, known | called)
        for record in records:
            self._tell(record, [name for name, tracked in self._open.items() if tracked.is_new])

    def recorded(self, record: dict[str, Any]) -> None:
        """Send the record to every tracker."""
        self._tell(record, list(self._open))

    def closed(self, *, failed: bool) -> None:
        """End the run in every tracker."""
        for name in list(self._open):
            with self._surviving(name):
                self._open[name].end(failed)
        self._open.clear()

    def _settings(self) -> dict[str, Any]:
        """Return the configuration and the plan as JSON values."""
        planned = {f"plan.{key}": getattr(self._plan, key) for key in _PLANNED} if self._plan else {}
        settings: dict[str, Any] = json.loads(json.dumps(flatten(self._config) | planned))
        return settings

    def _tell(self, record: Mapping[str, Any], trackers: Sequence[TrackerName]) -> None:
        numbers = {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}
        for name in trackers:
            if name in self._open:
                with self._surviving(name):
                    self._open[name].tell(record["step"], numbers)

    @contextmanager
    def _surviving(self, *trackers: TrackerName) -> Iterator[None]:
        """Report an error inside the context and drop its trackers; the run goes on."""
        try:
            yield
        except Exception as error:  # whatever a tracker raises, it is no reason to lose a run
            for name in trackers:
                if tracked := self._open.pop(name, None):
                    # Otherwise the next run in this process would continue it.
                    with suppress(Exception):
                        tracked.end(True)
            self._say(
                f"{', '.join(trackers)} can't be told more: {short(error)}. The run goes on without, and "
                f"{files.METRICS} has every record."
            )
