"""What the evaluations of a run say: which was the best, and whether it is time to end.

Everything follows from the losses that were measured so far, so a run that goes on from a checkpoint, which keeps its
records, knows as much as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.records.metrics import Evaluation
from sophia_galore.records.run import (
    HISTORY_KEYS,
    EarlyStopping,
    StatefulCallbacks,
    StoppingCount,
    StoppingLimits,
    TrainerState,
)


@dataclass(frozen=True)
class Patience:
    """When a run ends early.

    Args:
        evaluations: So many in a row without an improvement are enough.
        threshold: What the loss must fall by, below the lowest one before, to be an improvement.
    """

    evaluations: int
    threshold: float = 0.0


def patience_of(config: RunConfig) -> Patience | None:
    """When a run is to end early; None: never."""
    training = config.training
    if training.early_stopping_patience is None:
        return None
    return Patience(training.early_stopping_patience, training.early_stopping_threshold)


def best_of(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """The lowest loss of a model that was trained; of equal ones the first. None: there is none yet.

    The evaluation before the first step is left out: what it measured is not a result of the run.
    """
    return min((one for one in evaluations if one.step > 0), key=lambda one: one.loss, default=None)


def num_without_improvement(evaluations: Iterable[Evaluation], threshold: float) -> int:
    """How many evaluations in a row, the last ones, brought no improvement.

    As Hugging Face's EarlyStoppingCallback counts, but that the evaluation before the first step, where there is one,
    is the first to improve on.

    Args:
        evaluations: In their order.
        threshold: What the loss must fall by, below the lowest one before.
    """
    lowest, count = float("inf"), 0
    for one in evaluations:
        count = 0 if lowest - one.loss > threshold else count + 1
        lowest = min(lowest, one.loss)
    return count


def is_patience_used_up(evaluations: Sequence[Evaluation], patience: Patience | None) -> bool:
    """Whether a run ends now, whatever steps are left.

    Args:
        evaluations: So far, in their order.
        patience: None: never.
    """
    return patience is not None and num_without_improvement(evaluations, patience.threshold) >= patience.evaluations


def counted(evaluations: Sequence[Evaluation], patience: Patience | None) -> Evaluation:
    """The last evaluation, with what its record says of patience, where something depends on that.

    Args:
        evaluations: So far, in their order.
        patience: When the run ends early; None: never.
    """
    if patience is None:
        return evaluations[-1]
    count = num_without_improvement(evaluations, patience.threshold)
    return evaluations[-1].model_copy(update={"without_improvement": count})


def early_stop_reason(evaluations: Sequence[Evaluation], patience: Patience, num_steps: int) -> str:
    """When and why a run ended early, in words.

    Args:
        evaluations: Until then.
        patience: What was used up.
        num_steps: Steps that were planned.
    """
    lowest = min(evaluations, key=lambda one: one.loss)
    count = num_without_improvement(evaluations, patience.threshold)
    by = f" by more than {patience.threshold:g}" if patience.threshold else ""
    since = f"{count} evaluations" if count > 1 else "an evaluation"
    return (
        f"after step {evaluations[-1].step} of {num_steps}, since {since} brought no improvement{by} on the eval loss "
        f"of {lowest.loss:.4f} after step {lowest.step} (training.early_stopping_patience: {patience.evaluations})"
    )


def trainer_state(
    records: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    patience: Patience | None,
    checkpoint: Path | None,
    *,
    step: int,
    num_steps: int,
    steps_per_epoch: int,
) -> TrainerState:
    """How far a run is, in Hugging Face's words.

    Args:
        records: The lines of `metrics.jsonl`.
        evaluations: So far.
        patience: When the run ends early; None: never.
        checkpoint: Where the best model is; None: it was not kept.
        step: The last step that was done.
        num_steps: Steps that are planned.
        steps_per_epoch: Steps of one pass over the data.
    """
    best = best_of(evaluations)
    stopping = {}
    if patience is not None:
        limits = StoppingLimits(
            early_stopping_patience=patience.evaluations, early_stopping_threshold=patience.threshold
        )
        count = num_without_improvement(evaluations, patience.threshold)
        early = EarlyStopping(args=limits, attributes=StoppingCount(early_stopping_patience_counter=count))
        stopping = {"stateful_callbacks": StatefulCallbacks(early_stopping=early)}
    return TrainerState(
        global_step=step,
        epoch=step / steps_per_epoch,
        max_steps=num_steps,
        num_train_epochs=num_steps / steps_per_epoch,
        log_history=[{key: record[key] for key in HISTORY_KEYS if key in record} for record in records],
        best_metric=best.loss if best else None,
        best_global_step=best.step if best else None,
        best_model_checkpoint=str(checkpoint) if checkpoint else None,
        **stopping,
    )
