"""`report.json`: the numbers of each run, those of the runs of one name over their seeds, and warnings."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sophia_galore.records.schema import Record

WarningKind = Literal[
    "identical",
    "overlap",
    "repetition",
    "too low",
    "rerouted",
    "data",
    "budget",
    "ended early",
    "machine",
    "unfinished",
]


class Spread(Record):
    """A number over several seeds.

    Args:
        mean: Their mean.
        deviation: Their sample standard deviation; None for a single one.
    """

    mean: int | float
    deviation: float | None


class RunNumbers(Record):
    """The numbers of one run; what was not measured is None.

    Args:
        name: What the run is called.
        optimizer: What trained it, which is not always what was asked for.
        seed: `training.seed`.
        eval_loss: After each epoch, in nats a token; of an epoch that was evaluated several times, the last.
        peak_allocated_bytes: Most bytes of live tensors at once.
        peak_process_bytes: Largest resident size of the process.
        seconds_per_epoch: Time in optimizer steps, without evaluations; of a run of less than an epoch, as much as a
            whole one would take.
        tokens_per_second: All tokens over the time in optimizer steps.
        waiting_share: Share of that time in which the computation waited for weights that live elsewhere; None: none
            do.
        trained_fraction: Share of the parameters that are trained, from 0 to 1.
        state_bytes: What the optimizer keeps: moments and bases.
        peak_reserved_bytes: Most bytes that the allocator held.
        eval_loss_before: Before the first step.
        step: How far the run came.
        num_steps: Steps that were planned.
        finished: Whether it came to its end.
        failure: How it ended, if it failed.
        tokens: Tokens that it was trained on.
        ended_early: Whether that was before all steps were done, since the eval loss did not improve any more.
        exported_step: Steps that the final model has seen, if it was chosen by its eval loss.
        exported_eval_loss: Its eval loss.
    """

    name: str
    optimizer: str
    seed: int
    eval_loss: list[float]
    peak_allocated_bytes: int | None
    peak_process_bytes: int | None
    seconds_per_epoch: float | None
    tokens_per_second: float | None
    trained_fraction: float
    state_bytes: int
    peak_reserved_bytes: int | None
    eval_loss_before: float | None
    step: int
    num_steps: int
    finished: bool
    failure: str
    tokens: int
    ended_early: bool
    exported_step: int | None
    exported_eval_loss: float | None
    waiting_share: float | None = None

    @property
    def final_eval_loss(self) -> float | None:
        """Eval loss of the final model; of a run that is not finished, the last one; None: it was not evaluated."""
        if self.exported_eval_loss is not None:
            return self.exported_eval_loss
        return self.eval_loss[-1] if self.eval_loss else None


class GroupNumbers(Record):
    """The numbers of `RunNumbers` for the runs of one name, over their seeds.

    Args:
        seeds: In the order of the runs.
        final_eval_loss: Of the final model: after the last epoch, or of the best one, where that was asked for.
        difference: Of the final model's loss from that of the first group with the same seed, in nats a token. What
            seeds have in common (the examples, their order) is not in its spread; None for the first group.
    """

    name: str
    optimizer: str
    seeds: list[int]
    eval_loss: list[Spread | None]
    final_eval_loss: Spread | None
    difference: Spread | None
    peak_allocated_bytes: Spread | None
    peak_reserved_bytes: Spread | None
    peak_process_bytes: Spread | None
    seconds_per_epoch: Spread | None
    tokens_per_second: Spread | None
    trained_fraction: float
    state_bytes: int


class RunWarning(Record):
    """A reason to doubt the numbers of runs.

    Args:
        kind: The kind of the warning.
        runs: Labels of the runs that it concerns.
        message: Cause and consequence, in a sentence or two.
    """

    kind: WarningKind
    runs: list[str]
    message: str


class Report(Record):
    """The whole file.

    Args:
        runs: The numbers of each run, with its folder and command.
        summary: The runs of one name over their seeds.
        warnings: Reasons to doubt the numbers.
        machine: Of the first run.
        versions: Of the first run.
        data_fingerprint: Of the data of all runs; None if they are not the same.
        date: When the first run was started, UTC.
        command: What the report or the comparison was made by.
    """

    runs: list[dict[str, Any]]
    summary: list[GroupNumbers]
    warnings: list[RunWarning]
    machine: dict[str, Any] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    data_fingerprint: str | None = None
    date: str = ""
    command: str = ""
