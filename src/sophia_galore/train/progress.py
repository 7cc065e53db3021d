"""The best evaluation of a run, and early stopping.

Everything is computed from the eval losses so far. A checkpoint holds them, so a resumed run decides as one that was
never interrupted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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


def stopping_limits(config: RunConfig) -> StoppingLimits | None:
    """Return when a run ends early; None if it never does."""
    training = config.training
    if training.early_stopping_patience is None:
        return None
    return StoppingLimits(
        early_stopping_patience=training.early_stopping_patience,
        early_stopping_threshold=training.early_stopping_threshold,
    )


def best_of(evaluations: Iterable[Evaluation]) -> Evaluation | None:
    """Return the evaluation of the lowest loss after step 0; the first of equal ones, None if there is none.

    The evaluation before the first step does not count: it is not a result of the run.
    """
    return min((one for one in evaluations if one.step > 0), key=lambda one: one.loss, default=None)


def num_without_improvement(evaluations: Iterable[Evaluation], threshold: float) -> int:
    """Count the last evaluations in a row without an improvement.

    Counts as Hugging Face's EarlyStoppingCallback does, except that an evaluation before the first step counts as the
    first one to improve on.

    Args:
        evaluations: Evaluations in order.
        threshold: The loss must fall below the lowest one so far by more than this.
    """
    lowest, count = float("inf"), 0
    for one in evaluations:
        count = 0 if lowest - one.loss > threshold else count + 1
        lowest = min(lowest, one.loss)
    return count


def stops_early(evaluations: Sequence[Evaluation], limits: StoppingLimits | None) -> bool:
    """Return whether a run ends now, before its last step.

    Args:
        evaluations: All evaluations so far, in order.
        limits: When the run ends early; None: never.
    """
    if limits is None:
        return False
    return num_without_improvement(evaluations, limits.early_stopping_threshold) >= limits.early_stopping_patience


def last_evaluation(evaluations: Sequence[Evaluation], limits: StoppingLimits | None) -> Evaluation:
    """Return the last evaluation for the records; with early stopping, it holds the count without improvement.

    Args:
        evaluations: All evaluations so far, in order.
        limits: When the run ends early; None: never.
    """
    if limits is None:
        return evaluations[-1]
    count = num_without_improvement(evaluations, limits.early_stopping_threshold)
    return evaluations[-1].model_copy(update={"without_improvement": count})


def early_stop_reason(evaluations: Sequence[Evaluation], limits: StoppingLimits, num_steps: int) -> str:
    """Say when and why a run ended early.

    Args:
        evaluations: All evaluations of the run.
        limits: The limits that were reached.
        num_steps: Number of planned steps.
    """
    lowest, threshold = min(evaluations, key=lambda one: one.loss), limits.early_stopping_threshold
    count = num_without_improvement(evaluations, threshold)
    by = f" by more than {threshold:g}" if threshold else ""
    since = f"{count} evaluations" if count > 1 else "an evaluation"
    return (
        f"after step {evaluations[-1].step} of {num_steps}, since {since} brought no improvement{by} on the eval loss "
        f"of {lowest.loss:.4f} after step {lowest.step} "
        f"(training.early_stopping_patience: {limits.early_stopping_patience})"
    )


def trainer_state(
    records: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    limits: StoppingLimits | None,
    checkpoint: Path | None,
    *,
    step: int,
    num_steps: int,
    steps_per_epoch: int,
) -> TrainerState:
    """Return a run's state in the layout of Hugging Face's TrainerState.

    Args:
        records: The lines of `metrics.jsonl`.
        evaluations: All evaluations so far.
        limits: When the run ends early; None: never.
        checkpoint: The best checkpoint; None if there is none.
        step: The last step that was done.
        num_steps: Number of planned steps.
        steps_per_epoch: Steps of one pass over the data.
    """
    best = best_of(evaluations)
    stopping = {}
    if limits is not None:
        count = num_without_improvement(evaluations, limits.early_stopping_threshold)
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
