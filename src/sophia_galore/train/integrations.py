"""The trackers: start a run in each of them, send numbers, end it.

Three use the callbacks of Hugging Face's Trainer, so that curves have its names: `train/loss`, `eval/loss`,
`train/learning_rate`. A callback never gets the model, so it can neither upload it nor hook into it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from sophia_galore.config.field_types import TrackerName

PROJECT = "sophia-galore"
"""The project of all runs, unless the tracker's environment variable names another."""


@dataclass(frozen=True)
class RunStart:
    """What a tracker needs to start a run.

    Args:
        folder: The run's folder; its name is the run's name.
        settings: Configuration and plan, by dotted key, as plain data.
        after_step: The step of the checkpoint that the run resumes from; 0: a new run.
        tracker_id: The tracker's id of this run if the run resumes; empty: the run is new to the tracker.
    """

    folder: Path
    settings: Mapping[str, Any]
    after_step: int
    tracker_id: str = ""


@dataclass(frozen=True)
class TrackedRun:
    """A run in a tracker.

    Args:
        tell: Takes a step and its numbers.
        end: Ends the run; takes whether it failed.
        name: The tracker's id of the run, to continue it later; empty: none is needed.
        is_new: Whether the tracker lacks the earlier steps.
    """

    tell: Callable[[int, Mapping[str, float]], None]
    end: Callable[[bool], None]
    name: str = ""
    is_new: bool = True


def begin_tensorboard(run: RunStart) -> TrackedRun:
    """Event files in the run's folder. When it goes on, what was written of steps that are taken again disappears."""
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    folder = run.folder / "tensorboard"
    goes_on = run.after_step > 0 and folder.exists()
    writer = SummaryWriter(str(folder), purge_step=run.after_step + 1 if goes_on else None)
    trainer = _TrainerCallback(TensorBoardCallback(writer), run, run.settings)
    return TrackedRun(trainer.tell, lambda failed: trainer.end(), is_new=not goes_on)


def begin_wandb(run: RunStart) -> TrackedRun:
    """A run of Weights & Biases, with its local files in the run's folder. One that is open already is written to."""
    import wandb
    from transformers.integrations import WandbCallback

    ours = None
    if wandb.run is None:
        ours = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.folder.name,
            id=run.tracker_id or None,
            resume="allow" if run.tracker_id else None,
            dir=os.environ.get("WANDB_DIR", str(run.folder)),
            # Else what is printed is uploaded, and with it what the model says and was taught.
            settings=None if "WANDB_CONSOLE" in os.environ else wandb.Settings(console="off"),
        )
    # They ask for the model: for its files, and for hooks in it.
    with _unset("WANDB_LOG_MODEL", "WANDB_WATCH"):
        trainer = _TrainerCallback(WandbCallback(), run, run.settings)

    def end(failed: bool) -> None:
        trainer.end()
        if ours is not None:
            ours.finish(exit_code=int(failed))

    return TrackedRun(trainer.tell, end, name=ours.id if ours else "", is_new=not run.tracker_id)


def begin_mlflow(run: RunStart) -> TrackedRun:
    """A run of MLflow, in a database in the run's folder or where MLFLOW_TRACKING_URI says."""
    import mlflow
    from transformers.integrations import MLflowCallback

    # By the variable, which can be taken back, and which the processes that MLflow starts see.
    is_local = not mlflow.is_tracking_uri_set()
    folder = (run.folder / "mlflow").absolute()
    if is_local:
        folder.mkdir(exist_ok=True)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"

    def away() -> None:
        if is_local:
            os.environ.pop("MLFLOW_TRACKING_URI", None)

    ours = None
    try:
        if mlflow.active_run() is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            experiment = mlflow.get_experiment_by_name(name)
            # Where nothing is said, artifacts have a place in the folder that the program runs in, made at once.
            place = folder.as_uri() if is_local else None
            experiment_id = experiment.experiment_id if experiment else mlflow.create_experiment(name, place)
            ours = mlflow.start_run(run.tracker_id or None, experiment_id=experiment_id, run_name=run.folder.name)
        # What a run was begun with can't be changed in it, such as the steps of one that goes on.
        fixed = mlflow.active_run().data.params
        settings = {key: value for key, value in run.settings.items() if key not in fixed}
        trainer = _TrainerCallback(MLflowCallback(), run, settings)
    except BaseException:
        away()
        raise

    def end(failed: bool) -> None:
        try:
            trainer.end()
            if ours is not None:
                mlflow.end_run("FAILED" if failed else "FINISHED")
        finally:
            away()

    return TrackedRun(trainer.tell, end, name=ours.info.run_id if ours else "", is_new=not run.tracker_id)


def begin_trackio(run: RunStart) -> TrackedRun:
    """A run of Trackio, in its folder on this machine (TRACKIO_DIR).

    By its own few calls: Trainer's callback finds a run by its name alone, so that a new one would go on with another
    of that name, counts its points itself instead of taking the step, and makes a Space when it ends on one.
    """
    import trackio
    from transformers.integrations.integration_utils import rewrite_logs

    name = run.tracker_id
    if not name:
        try:
            taken = {each.name for each in trackio.Api().runs(PROJECT)}
        except ValueError:
            taken = set()  # the first run of all
        # A run is found again by its name, which has to be its own.
        names = chain([run.folder.name], (f"{run.folder.name}-{number}" for number in count(2)))
        name = next(each for each in names if each not in taken)
    # A Space would be made, public for most people, and waited for.
    with _unset("TRACKIO_SPACE_ID"):
        followed = trackio.init(
            PROJECT,
            name=name,
            config=dict(run.settings),
            resume="allow" if run.tracker_id else "never",
            embed=False,
        )

    def tell(step: int, numbers: Mapping[str, float]) -> None:
        followed.log({**rewrite_logs(numbers), "train/global_step": step}, step=step)

    return TrackedRun(tell, lambda failed: trackio.finish(), name=name, is_new=not run.tracker_id)


BEGIN: dict[TrackerName, Callable[[RunStart], TrackedRun]] = {
    "tensorboard": begin_tensorboard,
    "trackio": begin_trackio,
    "wandb": begin_wandb,
    "mlflow": begin_mlflow,
}
"""The function that starts a run in each tracker."""


class _TrainerCallback:
    """One of Trainer's callbacks, called as Trainer calls it.

    Args:
        callback: The callback.
        run: The run that begins.
        settings: What the tracker shows as the run's hyper-parameters.
    """

    def __init__(self, callback: Any, run: RunStart, settings: Mapping[str, Any]) -> None:
        from transformers import TrainerControl, TrainerState, TrainingArguments

        class Arguments(TrainingArguments):  # type: ignore[misc]
            """The fields that a callback may read, and our settings as what it shows."""

            def __post_init__(self) -> None:
                """Nothing: it would set up a device and processes, and we have ours."""

            def to_dict(self) -> dict[str, Any]:
                return dict(settings)

        self._callback = callback
        self._arguments = Arguments(output_dir=str(run.folder), run_name=run.folder.name)
        self._state, self._control = TrainerState(global_step=run.after_step), TrainerControl()
        self._callback.on_train_begin(self._arguments, self._state, self._control)

    def tell(self, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._state.global_step = step
        self._callback.on_log(self._arguments, self._state, self._control, logs=dict(numbers))

    def end(self) -> None:
        """End the run."""
        self._callback.on_train_end(self._arguments, self._state, self._control)


@contextmanager
def _unset(*names: str) -> Iterator[None]:
    """Unset environment variables inside a context."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
