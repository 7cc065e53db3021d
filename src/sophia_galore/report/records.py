"""What happened at each step, read back from `metrics.jsonl`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sophia_galore.errors import UserError
from sophia_galore.report.json_fields import number, optional_bytes, optional_number, whole_number

METRICS_FILE = "metrics.jsonl"
_WAITED = "evaluations_without_improvement"


@dataclass(frozen=True)
class TrainLine:
    """One optimizer step.

    Args:
        step: Counted from 1.
        epoch: Passes over the data so far.
        loss: Mean over the counted tokens of the effective batch, before the step.
        learning_rate: Rate of the step.
        grad_norm: Norm of the whole gradient.
        tokens: Tokens seen in the step.
        tokens_per_second: Speed of the step.
        allocated_bytes: Peak of live tensors; None where it was not measured.
        reserved_bytes: Peak of what the allocator held; None where it was not measured.
    """

    step: int
    epoch: float | None
    loss: float
    learning_rate: float | None
    grad_norm: float | None
    tokens: float | None
    tokens_per_second: float | None
    allocated_bytes: int | None
    reserved_bytes: int | None


@dataclass(frozen=True)
class EvalLine:
    """One evaluation, after `step` optimizer steps.

    Args:
        step: How many.
        epoch: Passes over the data so far.
        eval_loss: Mean loss, in nats a token.
        waited: Evaluations in a row, this one the last, that brought no improvement; None: nobody counted.
    """

    step: int
    epoch: float | None
    eval_loss: float
    waited: int | None = None


@dataclass(frozen=True)
class ExportLine:
    """Which model was written in the end, where that was chosen by its eval loss.

    Args:
        step: Optimizer steps that it has seen.
        eval_loss: Its loss.
    """

    step: int
    eval_loss: float


@dataclass(frozen=True)
class Metrics:
    """All steps and evaluations of a run, each in the order of the steps, and which model was written, if that was
    chosen.
    """

    train: tuple[TrainLine, ...]
    eval: tuple[EvalLine, ...]
    exported: ExportLine | None = None


def read_metrics(run_dir: Path) -> Metrics:
    """Reads the records of a run, also of one that is still going or was killed.

    A run that was resumed from a checkpoint repeats the steps after it; of a step that is there
    twice, the later line counts, and what came after its first occurrence is forgotten.

    Args:
        run_dir: Folder of the run.

    Returns:
        Steps and evaluations.

    Raises:
        UserError: If there are no records, or a line other than a half-written last one is broken.
    """
    path = Path(run_dir) / METRICS_FILE
    train: list[TrainLine] = []
    evals: list[EvalLine] = []
    exported: ExportLine | None = None
    for where, record in _records(path):
        step = whole_number(record, "step", where)
        epoch = optional_number(record, "epoch", where)
        if "eval_loss" in record:
            evals = [line for line in evals if line.step != step]
            waited = whole_number(record, _WAITED, where) if _WAITED in record else None
            evals.append(EvalLine(step, epoch, number(record, "eval_loss", where), waited))
        elif "exported_step" in record:
            loss = number(record, "exported_eval_loss", where)
            exported = ExportLine(whole_number(record, "exported_step", where), loss)
        else:
            exported = None
            if train and train[-1].step >= step:
                train = [line for line in train if line.step < step]
                evals = [line for line in evals if line.step < step]
            train.append(_train_line(record, step, epoch, where))
    return Metrics(tuple(train), tuple(sorted(evals, key=lambda line: line.step)), exported)


def _train_line(record: dict[str, Any], step: int, epoch: float | None, where: str) -> TrainLine:
    return TrainLine(
        step=step,
        epoch=epoch,
        loss=number(record, "loss", where),
        learning_rate=optional_number(record, "learning_rate", where),
        grad_norm=optional_number(record, "grad_norm", where),
        tokens=optional_number(record, "tokens", where),
        tokens_per_second=optional_number(record, "tokens_per_second", where),
        allocated_bytes=optional_bytes(record, "allocated_bytes", where),
        reserved_bytes=optional_bytes(record, "reserved_bytes", where),
    )


def _records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The JSON objects of the file, each with its place."""
    try:
        # A kill can cut a character in two; that line is broken, not the file.
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        cause = f"{path} can't be read, so there is nothing to show of this run"
        raise UserError(cause, "Name the folder of a run (training.output_dir) that has made a step.") from None
    lines = [(index, line) for index, line in enumerate(text.split("\n"), start=1) if line.strip()]
    records: list[tuple[str, dict[str, Any]]] = []
    for index, line in lines:
        where = f"{path.name}:{index}"
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append((where, record))
        elif index != lines[-1][0]:
            cause = f"{path}:{index}: this line is no JSON object: {line[:60]!r}"
            raise UserError(cause, "Only the last line may be broken (by a kill); restore the file or remove the line.")
    return records
