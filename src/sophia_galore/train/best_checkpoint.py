"""The checkpoint of the lowest eval loss: which one it is, and the way back to its weights.

A checkpoint is made at each new lowest loss, and stays until the next one is complete. Which one is the best follows
from the run's records and from what lies on the disk, so a run that goes on from any checkpoint finds it again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sophia_galore.config import RunConfig
from sophia_galore.errors import CheckpointError
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.records.files import TRAINER_STATE, checkpoint_folder
from sophia_galore.records.metrics import Evaluation
from sophia_galore.records.run import TrainerState
from sophia_galore.train.checkpoint import Checkpoint, find_checkpoint, is_checkpoint
from sophia_galore.train.progress import best_of
from sophia_galore.weights.files import read_weights
from sophia_galore.weights.store import WeightStore


class BestCheckpoint:
    """The best model of a run so far, among those whose checkpoint is there.

    Args:
        folder: The run's folder.
        evaluations: Those of the run so far, up to the step that it goes on after.
        say: Takes sentences for the user.
    """

    def __init__(self, folder: Path, evaluations: Iterable[Evaluation], say: Callable[[str], None]) -> None:
        self._folder, self._say = folder, say
        self._kept = [one for one in evaluations if _was_saved(folder, one)]

    @property
    def best(self) -> Evaluation | None:
        """Its evaluation; None: there is none."""
        return best_of(self._kept)

    @property
    def steps(self) -> set[int]:
        """The step whose checkpoint has to stay; empty: there is none."""
        return {self.best.step} if self.best else set()

    @property
    def path(self) -> Path | None:
        """Its checkpoint; None: there is none."""
        return checkpoint_folder(self._folder, self.best.step) if self.best else None

    def is_new(self, step: int, evaluations: Sequence[Evaluation]) -> bool:
        """Whether the model after a step is the best one, so that it has to be saved.

        Args:
            step: The step that was just done, above 0.
            evaluations: Of the run so far.
        """
        if not evaluations or evaluations[-1].step != step:
            return False
        return self.best is None or evaluations[-1].loss < self.best.loss

    def saving(self, step: int, evaluations: Sequence[Evaluation]) -> None:
        """A checkpoint of the model after a step is about to be made.

        Args:
            step: The step.
            evaluations: Of the run so far.
        """
        if self.is_new(step, evaluations):
            self._kept.append(evaluations[-1])
            self._say(f"The lowest eval loss so far, {evaluations[-1].loss:.4f}: this checkpoint is kept.")

    def go_back(
        self, store: WeightStore, optimizer: ParamOptimizer, evaluations: Sequence[Evaluation], *, last_step: int
    ) -> Evaluation | None:
        """Let the weights be the best ones, at the end of a run.

        Args:
            store: The run's weights, those after its last step.
            optimizer: The run's optimizer.
            evaluations: Of the whole run.
            last_step: That step.

        Returns:
            What the weights were measured with; None: they are the last ones, and that was not asked for.
        """
        while (best := self.best) is not None:
            try:
                if best.step != last_step:
                    found = find_checkpoint(self._folder, checkpoint_folder(self._folder, best.step))
                    restore(found, store, optimizer)
            except CheckpointError as error:
                self._say(f"The best model can't be taken: {error.cause}")
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


class LastKept(BestCheckpoint):
    """What stands in its place where the last model is the final one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, (), lambda sentence: None)

    def is_new(self, step: int, evaluations: Sequence[Evaluation]) -> bool:
        """No: nothing is saved for its loss."""
        return False

    def go_back(
        self, store: WeightStore, optimizer: ParamOptimizer, evaluations: Sequence[Evaluation], *, last_step: int
    ) -> Evaluation | None:
        """Nothing: the last weights are there."""
        return None


def open_best(
    config: RunConfig,
    checkpoint: Checkpoint | None,
    evaluations: Sequence[Evaluation],
    folder: Path,
    say: Callable[[str], None],
) -> BestCheckpoint:
    """What a run that begins or goes on knows of its best model.

    Args:
        config: What was asked.
        checkpoint: Where the run goes on from, if it does; if in another folder, the best model comes along.
        evaluations: Of the run until there.
        folder: The run's folder.
        say: Takes sentences for the user.
    """
    if not config.training.load_best_model:
        return LastKept(folder)
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
    """Copy the best checkpoint of a run that goes on in another folder into that one.

    Args:
        evaluations: Of the run, up to the step that it goes on after.
        source: The folder that it was in.
        folder: The folder that it is in now.
    """
    best = BestCheckpoint(source, evaluations, lambda sentence: None).path
    if best is None or is_checkpoint(folder / best.name):
        return
    beside = folder / f".{best.name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(best, beside)
    beside.rename(folder / best.name)


def restore(checkpoint: Checkpoint, store: WeightStore, optimizer: ParamOptimizer) -> None:
    """Put the weights of an earlier step in place of those that a run has now, exactly, without a second copy of them.

    Args:
        checkpoint: Of the same run.
        store: The run's weights; what is frozen is what it was.
        optimizer: The run's optimizer, whose state may hold updates that are not in the weights yet.
    """
    optimizer.load_named_state(checkpoint.optimizer_state())
    for _, name, saved in read_weights(checkpoint.folder):
        # Of updates that are not in the codes yet, the optimizer's state has the original.
        store[name].settled.copy_(saved.settled)


def _was_saved(folder: Path, evaluation: Evaluation) -> bool:
    """Whether a checkpoint is there of the very model that was measured, and not of another time at the same step."""
    path = checkpoint_folder(folder, evaluation.step)
    state = TrainerState.find(path / TRAINER_STATE) if is_checkpoint(path) else None
    known = state.evaluations if state else []
    return any((each.step, each.loss) == (evaluation.step, evaluation.loss) for each in known)
