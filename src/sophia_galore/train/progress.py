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

_CALLBACK, _COUNTER = "EarlyStoppingCallback", "early_stopping_patience_counter"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Args:
        step: Optimizer steps before it; 0: of the model as it was given.
        loss: Mean loss on the evaluation examples, in nats a token.
    """

    step: int
    loss: float


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


def evaluations_of(records: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """The evaluations among a run's records, in their order.

    Args:
        records: Lines of `metrics.jsonl`, or of the history in `trainer_state.json`.
    """
    return [Evaluation(record["step"], record["eval_loss"]) for record in records if "eval_loss" in record]


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


def patience_is_used_up(evaluations: Sequence[Evaluation], patience: Patience | None) -> bool:
    """Whether a run ends now, whatever steps are left.

    Args:
        evaluations: So far, in their order.
        patience: None: never.
    """
    return patience is not None and num_without_improvement(evaluations, patience.threshold) >= patience.evaluations


def waiting(evaluations: Sequence[Evaluation], patience: Patience | None) -> dict[str, int]:
    """What the record of an evaluation says of patience; {} where nothing depends on it.

    Args:
        evaluations: The evaluation itself last.
        patience: When the run ends early; None: never.
    """
    if patience is None:
        return {}
    return {"evaluations_without_improvement": num_without_improvement(evaluations, patience.threshold)}


def why_it_ends(evaluations: Sequence[Evaluation], patience: Patience, num_steps: int) -> str:
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


def trainer_words(
    evaluations: Sequence[Evaluation], patience: Patience | None, checkpoint: Path | None
) -> dict[str, Any]:
    """What `trainer_state.json` says of this, in Hugging Face's words.

    Args:
        evaluations: So far.
        patience: When the run ends early; None: never.
        checkpoint: Where the best model lies; None: it was not kept.
    """
    best = best_of(evaluations)
    words: dict[str, Any] = {
        "best_metric": best.loss if best else None,
        "best_global_step": best.step if best else None,
        "best_model_checkpoint": str(checkpoint) if checkpoint else None,
    }
    if patience is not None:
        args = {"early_stopping_patience": patience.evaluations, "early_stopping_threshold": patience.threshold}
        count = num_without_improvement(evaluations, patience.threshold)
        words["stateful_callbacks"] = {_CALLBACK: {"args": args, "attributes": {_COUNTER: count}}}
    return words


def ended_early(trainer_state: Mapping[str, Any]) -> bool:
    """Whether a run's patience was used up, by its `trainer_state.json`."""
    callback = (trainer_state.get("stateful_callbacks") or {}).get(_CALLBACK)
    if callback is None:
        return False
    return bool(callback["attributes"][_COUNTER] >= callback["args"]["early_stopping_patience"])
