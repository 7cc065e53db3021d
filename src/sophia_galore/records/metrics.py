"""`metrics.jsonl`: a line for each optimizer step, each evaluation, and the choice of the final model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from sophia_galore.errors import UserError
from sophia_galore.records.files import METRICS
from sophia_galore.records.schema import Number, Record, Size, Whole


class Line(Record):
    """What all lines have.

    Args:
        step: Optimizer steps that are done.
        epoch: Passes over the data so far.
    """

    step: Whole
    epoch: Number | None = None


class TrainStep(Line):
    """One optimizer step, counted from 1.

    Args:
        loss: Mean over the counted tokens of the effective batch, before the step.
        learning_rate: Rate of the step.
        grad_norm: Norm of the whole gradient.
        tokens: Tokens seen in the step.
        tokens_per_second: Speed of the step.
        waiting_share: Share of the step's time, from 0 to 1, in which the computation waited for weights that live
            elsewhere; None: none do.
        summed_bytes: Bytes of the gradients that were summed over processes; None: there is one process.
        aux_loss: The loss that spreads tokens evenly over experts, times its coefficient; not part of `loss`. None: the
            model asks for none.
        router_entropy: Mean entropy of the routers' probabilities, in nats; None: there are no experts.
        largest_expert_share: The largest share of a layer's choices that fell on one expert.
        idle_experts: Experts of all layers without a token in this step, which took no step.
        tokens_per_expert: For each expert, the tokens that went to it, summed over the layers.
        allocated_bytes: Peak of live tensors; None where it was not measured.
        reserved_bytes: Peak of what the allocator held; None where it was not measured.
        process_bytes: Resident size of the process after the step.
    """

    loss: Number
    learning_rate: Number | None = None
    grad_norm: Number | None = None
    tokens: Whole | None = None
    tokens_per_second: Number | None = None
    waiting_share: Number | None = None
    summed_bytes: Size = None
    aux_loss: Number | None = None
    router_entropy: Number | None = None
    largest_expert_share: Number | None = None
    idle_experts: Whole | None = None
    tokens_per_expert: tuple[Whole, ...] | None = None
    allocated_bytes: Size = None
    reserved_bytes: Size = None
    process_bytes: Size = None


class Evaluation(Line):
    """One evaluation after `step` optimizer steps; 0: of the model as it was given.

    Args:
        loss: Mean loss on the evaluation examples, in nats a token.
        without_improvement: Evaluations in a row, this one the last, without an improvement; None: not counted.
    """

    loss: Number = Field(alias="eval_loss")
    without_improvement: Whole | None = Field(default=None, alias="evaluations_without_improvement")


class Exported(Line):
    """Which model was written in the end, where it was chosen by its eval loss.

    Args:
        exported_step: Optimizer steps that it has seen.
        loss: Its eval loss.
    """

    exported_step: Whole
    loss: Number = Field(alias="exported_eval_loss")


@dataclass(frozen=True)
class Metrics:
    """All steps and evaluations of a run in their order, and which model was written, if that was chosen."""

    train: tuple[TrainStep, ...] = ()
    eval: tuple[Evaluation, ...] = ()
    exported: Exported | None = None


def use_of_experts(lines: Iterable[TrainStep]) -> tuple[float, float] | None:
    """Return how steps used experts: the largest share of a layer's choices that one got, and how many had no token.

    Args:
        lines: The steps.

    Returns:
        The largest share of all steps, and the mean number of idle experts of a step; None: there are no experts.
    """
    with_experts = [line for line in lines if line.tokens_per_expert]
    if not with_experts:
        return None
    largest = max(line.largest_expert_share or 0.0 for line in with_experts)
    return largest, sum(line.idle_experts or 0 for line in with_experts) / len(with_experts)


def evaluations_of(lines: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """The evaluations among the lines of `metrics.jsonl`, or of the history in `trainer_state.json`."""
    return [Evaluation.of(line, METRICS) for line in lines if "eval_loss" in line]


def exported_of(lines: Iterable[Mapping[str, Any]]) -> Exported | None:
    """Which model was written in the end, by the same lines; None: they do not say."""
    found = [Exported.of(line, METRICS) for line in lines if "exported_step" in line]
    return found[-1] if found else None


def read_metrics(run_folder: Path) -> Metrics:
    """Read the records of a run, also of one that is still going or was killed.

    A run that was resumed from a checkpoint repeats the steps after it. Of a step that is there twice, the later line
    counts, and what came after its first occurrence is forgotten.

    Args:
        run_folder: Folder of the run.

    Raises:
        UserError: There are no records, or a line other than a half-written last one is broken.
    """
    train: list[TrainStep] = []
    evals: list[Evaluation] = []
    exported: Exported | None = None
    for where, line in _lines(run_folder / METRICS):
        if "eval_loss" in line:
            evaluation = Evaluation.of(line, where)
            evals = [each for each in evals if each.step != evaluation.step] + [evaluation]
        elif "exported_step" in line:
            exported = Exported.of(line, where)
        else:
            step, exported = TrainStep.of(line, where), None
            if train and train[-1].step >= step.step:
                train = [each for each in train if each.step < step.step]
                evals = [each for each in evals if each.step < step.step]
            train.append(step)
    return Metrics(tuple(train), tuple(sorted(evals, key=lambda each: each.step)), exported)


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The JSON objects of the file, each with its place."""
    try:
        # A kill can cut a character in two; then that line is broken, not the file.
        text = path.read_bytes().decode("utf-8", errors="replace")
    except OSError:
        cause = f"{path} can't be read, so there is nothing to show of this run"
        raise UserError(cause, "Name the folder of a run (training.output_dir) that has made a step.") from None
    lines = [(index, line) for index, line in enumerate(text.split("\n"), start=1) if line.strip()]
    found: list[tuple[str, dict[str, Any]]] = []
    for index, line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            found.append((f"{path}:{index}", record))
        elif index != lines[-1][0]:
            cause = f"{path}:{index}: this line is no JSON object: {line[:60]!r}"
            raise UserError(cause, "Only the last line may be broken (by a kill); restore the file or remove the line.")
    return found
