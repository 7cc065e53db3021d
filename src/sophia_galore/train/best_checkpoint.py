"""The checkpoint of the lowest eval loss: find it, keep it, load its weights.

A checkpoint is written at each new lowest loss and kept until the next one is complete. It is found again from the
run's records and the checkpoints on disk, so a run may resume from any checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from sophia_galore.config import RunConfig
from sophia_galore.errors import CheckpointError
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.folder_layout import find_layout
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.records.files import TRAINER_STATE, checkpoint_folder
from sophia_galore.records.metrics import Evaluation
from sophia_galore.records.run import TrainerState
from sophia_galore.train.checkpoint import Checkpoint, find_checkpoint, is_checkpoint
from sophia_galore.train.progress import best_of
from sophia_galore.weights.saved import SavedWeight, saved_weights
from sophia_galore.weights.store import WeightStore


class BestCheckpoint:
    """The checkpoint of the lowest eval loss so far.

    Args:
        folder: The run's folder.
        evaluations: Evaluations before the first step that this process takes.
        say: Takes sentences for the user.
        is_wanted: `training.load_best_model`; if false, no checkpoint is kept for its loss.
    """

    def __init__(
        self, folder: Path, evaluations: Iterable[Evaluation], say: Callable[[str], None], *, is_wanted: bool = True
    ) -> None:
        self._folder, self._say, self._is_wanted = folder, say, is_wanted
        self._kept = [one for one in evaluations if is_wanted and _was_saved(folder, one)]

    @property
    def best(self) -> Evaluation | None:
        """The evaluation of the best model that has a checkpoint; None if no model has one."""
        return best_of(self._kept)

    @property
    def steps(self) -> set[int]:
        """The step whose checkpoint must not be deleted; empty if there is none."""
        return {self.best.step} if self.best else set()

    @property
    def path(self) -> Path | None:
        """The folder of the best checkpoint; None if there is none."""
        return checkpoint_folder(self._folder, self.best.step) if self.best else None

    def is_new(self, step: int, evaluations: Sequence[Evaluation]) -> bool:
        """Return whether the model after a step has the lowest eval loss so far and has to be saved.

        Args:
            step: The step that was just done, above 0.
            evaluations: All evaluations so far.
        """
        if not self._is_wanted or not evaluations or evaluations[-1].step != step:
            return False
        return self.best is None or evaluations[-1].loss < self.best.loss

    def saving(self, step: int, evaluations: Sequence[Evaluation]) -> None:
        """Note that a checkpoint of the model after a step is about to be written.

        Args:
            step: The step.
            evaluations: All evaluations so far.
        """
        if self.is_new(step, evaluations):
            self._kept.append(evaluations[-1])
            self._say(f"The lowest eval loss so far, {evaluations[-1].loss:.4f}: this checkpoint is kept.")

    def restore(
        self,
        store: WeightStore,
        optimizer: ParamOptimizer,
        evaluations: Sequence[Evaluation],
        *,
        last_step: int,
        architecture: Architecture,
    ) -> Evaluation | None:
        """Load the best weights at the end of a run.

        Args:
            store: The weights after the last step.
            optimizer: The run's optimizer.
            evaluations: All evaluations of the run.
            last_step: The last step.
            architecture: The skeleton of the model.

        Returns:
            The evaluation of the loaded weights; None if the weights after the last step stay.
        """
        if not self._is_wanted:
            return None
        while (best := self.best) is not None:
            try:
                if best.step != last_step:
                    found = find_checkpoint(self._folder, checkpoint_folder(self._folder, best.step))
                    # One that was converted may have the tensors of the source.
                    layout = find_layout(found.folder, architecture)
                    load_weights(found, store, optimizer, layout.reading.read)
            except CheckpointError as error:
                self._say(f"The best model can't be loaded: {error.cause}")
                self._kept.remove(best)
                continue
            self._say(
                f"The final model is the best one, that after step {best.step}: eval loss {best.loss:.4f} "
                "(training.load_best_model)."
            )
            better = [one for one in evaluations if one.loss < best.loss and one.step == 0]
            if better:
                self._say(f"The untrained model had a lower one, {better[0].loss:.4f}: training did not improve on it.")
            return best
        self._say("No checkpoint of an evaluated model is left: the final model is the one after the last step.")
        return None


def open_best(
    config: RunConfig,
    checkpoint: Checkpoint | None,
    evaluations: Sequence[Evaluation],
    folder: Path,
    say: Callable[[str], None],
) -> BestCheckpoint:
    """Find the best checkpoint of a run that starts or resumes.

    Args:
        config: The run's configuration.
        checkpoint: The checkpoint to resume from; if it lies in another folder, the best checkpoint is copied.
        evaluations: Evaluations up to that checkpoint.
        folder: The run's folder.
        say: Takes sentences for the user.
    """
    if not config.training.load_best_model:
        return BestCheckpoint(folder, evaluations, say, is_wanted=False)
    if checkpoint and checkpoint.folder.parent.resolve() != folder.resolve():
        copy_best(evaluations, checkpoint.folder.parent, folder)
    kept, lowest = BestCheckpoint(folder, evaluations, say), best_of(evaluations)
    if lowest is not None and kept.best != lowest:
        say(
            f"The lowest eval loss so far, {lowest.loss:.4f} after step {lowest.step}, has no checkpoint: the final "
            "model will be the best one of those that have one."
        )
    return kept


def copy_best(evaluations: Iterable[Evaluation], source: Path, folder: Path) -> None:
    """Copy the best checkpoint of a run that resumes in another folder.

    Args:
        evaluations: Evaluations up to the checkpoint to resume from.
        source: The run's old folder.
        folder: The run's new folder.
    """
    best = BestCheckpoint(source, evaluations, lambda sentence: None).path
    if best is None or is_checkpoint(folder / best.name):
        return
    beside = folder / f".{best.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(best, beside)
    beside.rename(folder / best.name)


def load_weights(
    checkpoint: Checkpoint,
    store: WeightStore,
    optimizer: ParamOptimizer,
    read: Callable[[Iterable[SavedWeight]], Iterator[SavedWeight]] = iter,
) -> None:
    """Replace a run's weights by those of a checkpoint, exactly and without a second copy in memory.

    Args:
        checkpoint: A checkpoint of the same run.
        store: The run's weights.
        optimizer: The run's optimizer; if its state holds updates that are not in the weights yet, it is loaded too.
        read: Makes the model's weights from those of the checkpoint.
    """
    if any(spec.subspace and spec.subspace.folds_late for spec in optimizer.specs.values()):
        optimizer.states.load(checkpoint.optimizer_state())
    trained = {name for name, weight in store.items() if not weight.held_by_module}  # what a module holds is frozen
    for saved in read(saved_weights(checkpoint.folder)):
        # The optimizer's state holds the updates that are not in the codes yet.
        if saved.name in trained:
            with store.borrow(saved.name) as weights:
                saved.copy_into(weights[saved.name])


def _was_saved(folder: Path, evaluation: Evaluation) -> bool:
    """Return whether the checkpoint of this step holds the model of this evaluation, and not one of another run."""
    path = checkpoint_folder(folder, evaluation.step)
    state = TrainerState.find(path / TRAINER_STATE) if is_checkpoint(path) else None
    known = state.evaluations if state else []
    return any((each.step, each.loss) == (evaluation.step, evaluation.loss) for each in known)
