"""What evaluations say: the best one, how long there was no improvement, and when a run ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from sophia_galore.records.metrics import Evaluation, evaluations_of
from sophia_galore.records.run import StoppingLimits
from sophia_galore.records.run import TrainerState as OurState
from sophia_galore.train.progress import (
    best_of,
    early_stop_reason,
    num_without_improvement,
    stops_early,
    trainer_state,
)


def measured(*losses: float, first_step: int = 0) -> list[Evaluation]:
    """One evaluation every ten steps."""
    return [Evaluation(step=10 * (first_step + place), loss=loss) for place, loss in enumerate(losses)]


# Losses, threshold -> evaluations without an improvement at the end.
COUNTS: list[tuple[list[float], float, int]] = [
    ([], 0.0, 0),
    ([3.0], 0.0, 0),
    ([3.0, 2.0, 1.0], 0.0, 0),
    ([3.0, 2.0, 2.0], 0.0, 1),  # equal is no improvement
    ([3.0, 3.5, 3.2], 0.0, 2),  # better than the one before, not better than the lowest
    ([3.0, 3.5, 2.9], 0.0, 0),
    ([3.0, 2.9, 2.8], 0.5, 2),
    ([3.0, 2.4, 2.3], 0.5, 1),
    ([3.0, 2.75, 2.5, 2.25], 0.25, 3),  # by no more than the threshold: as Hugging Face has it
    ([3.0, 2.5, 3.0, 2.0], 0.25, 0),
]


def limits(patience: int, threshold: float = 0.0) -> StoppingLimits:
    return StoppingLimits(early_stopping_patience=patience, early_stopping_threshold=threshold)


@pytest.mark.parametrize(("losses", "threshold", "count"), COUNTS)
def test_evaluations_without_improvement(losses: list[float], threshold: float, count: int) -> None:
    assert num_without_improvement(measured(*losses), threshold) == count


@pytest.mark.parametrize(("losses", "threshold", "count"), [case for case in COUNTS if case[0]])
def test_it_is_what_hugging_faces_callback_counts(
    losses: list[float], threshold: float, count: int, tmp_path: Path
) -> None:
    """Given the same losses, the first of which it takes for the first to improve on."""
    arguments = TrainingArguments(str(tmp_path), metric_for_best_model="eval_loss", greater_is_better=False)
    callback, state = EarlyStoppingCallback(1, threshold), TrainerState()
    for loss in losses:
        callback.on_evaluate(arguments, state, TrainerControl(), {"eval_loss": loss})
        state.best_metric = loss if state.best_metric is None else min(state.best_metric, loss)
    assert callback.early_stopping_patience_counter == count


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ([], None),
        ([1.0], None),  # the untrained model is no result
        ([1.0, 3.0, 2.0, 2.5], Evaluation(step=20, loss=2.0)),
        ([4.0, 2.0, 3.0, 2.0], Evaluation(step=10, loss=2.0)),  # of equal ones the first
    ],
)
def test_the_best_one(losses: list[float], best: Evaluation | None) -> None:
    assert best_of(measured(*losses)) == best


def test_patience() -> None:
    losses = measured(3.0, 2.0, 2.1, 2.2)
    assert not stops_early(losses, None)
    assert not stops_early(losses, limits(3))
    assert stops_early(losses, limits(2))
    assert stops_early(losses, limits(1))
    said = early_stop_reason(losses, limits(2, 0.01), 90)
    for part in ("after step 30 of 90", "2 evaluations", "by more than 0.01", "2.0000 after step 10", "patience: 2"):
        assert part in said


def test_trainer_state_says_it_in_hugging_faces_words(tmp_path: Path) -> None:
    losses = measured(3.0, 2.0, 2.5)

    def state(losses: list[Evaluation], patience: StoppingLimits | None) -> OurState:
        at = {"step": 20, "num_steps": 90, "steps_per_epoch": 30}
        return trainer_state([], losses, patience, tmp_path / "checkpoint-10", **at)

    early = state(losses, limits(1, 0.1))
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps(early.to_json()))
    read = TrainerState.load_from_json(str(path))
    assert (read.best_metric, read.best_global_step) == (2.0, 10)
    assert read.best_model_checkpoint == str(tmp_path / "checkpoint-10")
    callback = EarlyStoppingCallback.from_state(read.stateful_callbacks["EarlyStoppingCallback"])
    assert (callback.early_stopping_patience, callback.early_stopping_threshold) == (1, 0.1)
    assert callback.early_stopping_patience_counter == 1
    assert early.ended_early and OurState.read(path) == early
    assert not state(losses[:2], limits(1)).ended_early
    assert not state(losses, None).ended_early
    assert not OurState(global_step=1, max_steps=2).ended_early  # of an earlier version


def test_records_give_the_evaluations_back() -> None:
    records = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 1, "eval_loss": 0.1 + 0.2}]
    assert evaluations_of(json.loads(json.dumps(records))) == [
        Evaluation(step=0, loss=3.0),
        Evaluation(step=1, loss=0.1 + 0.2),
    ]
