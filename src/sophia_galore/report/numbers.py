"""The numbers by which runs are compared: of each run, and over several seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from statistics import mean, stdev

from sophia_galore.records.report import GroupNumbers, RunNumbers, Spread
from sophia_galore.report.run import Run

_OVER_SEEDS = (
    "peak_allocated_bytes",
    "peak_reserved_bytes",
    "peak_process_bytes",
    "seconds_per_epoch",
    "tokens_per_second",
)
"""Fields of a run of which a group has mean and deviation."""


def run_numbers(run: Run) -> RunNumbers:
    """Return the numbers of a run, from its records."""
    timed = [(line.tokens, seconds) for line, seconds in zip(run.metrics.train, step_seconds(run), strict=True)]
    seconds = sum(taken for _, taken in timed if taken is not None)
    timed_tokens = sum(count or 0 for count, taken in timed if taken is not None)
    epochs = sum(taken is not None for _, taken in timed) / run.plan.steps_per_epoch
    memory, standing, exported = run.memory, run.plan.standing_bytes, run.metrics.exported
    return RunNumbers(
        name=run.name,
        optimizer=run.plan.optimizer,
        seed=run.seed,
        eval_loss=_by_epoch(run),
        peak_allocated_bytes=memory.peak_allocated_bytes if memory else _highest(run, "allocated_bytes"),
        peak_process_bytes=memory.peak_process_bytes if memory else None,
        seconds_per_epoch=round(seconds / epochs, 3) if epochs else None,
        tokens_per_second=round(timed_tokens / seconds, 3) if seconds else None,
        trained_fraction=run.plan.trained_fraction,
        state_bytes=standing.get("optimizer state", 0) + standing.get("projections", 0),
        peak_reserved_bytes=memory.peak_reserved_bytes if memory else _highest(run, "reserved_bytes"),
        eval_loss_before=run.loss_before,
        step=run.step,
        num_steps=run.plan.num_steps,
        finished=run.finished,
        failure=run.failure,
        tokens=sum(line.tokens or 0 for line in run.metrics.train),
        ended_early=run.ended_early,
        exported_step=exported.exported_step if exported else None,
        exported_eval_loss=exported.loss if exported else None,
        waiting_share=_waiting_share(run),
    )


def _waiting_share(run: Run) -> float | None:
    parts = [
        (line.waiting_share * taken, taken)
        for line, taken in zip(run.metrics.train, step_seconds(run), strict=True)
        if line.waiting_share is not None and taken
    ]
    return round(sum(waited for waited, _ in parts) / sum(taken for _, taken in parts), 4) if parts else None


def step_seconds(run: Run) -> list[float | None]:
    """Return the seconds that each recorded step took; None where the records do not say."""
    return [
        line.tokens / line.tokens_per_second if line.tokens is not None and line.tokens_per_second else None
        for line in run.metrics.train
    ]


def group_by_name(runs: Sequence[RunNumbers]) -> list[GroupNumbers]:
    """Return the numbers of the runs of each name, over their seeds, in the order in which the names first appear.

    Args:
        runs: The numbers of each run.
    """
    by_name: dict[str, list[RunNumbers]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    first = next(iter(by_name.values()), [])
    return [_group(group, [] if group is first else first) for group in by_name.values()]


def _group(runs: Sequence[RunNumbers], against: Sequence[RunNumbers]) -> GroupNumbers:
    finals, reached = _final_losses(runs), _final_losses(against)
    return GroupNumbers(
        name=runs[0].name,
        optimizer=runs[0].optimizer,
        seeds=[run.seed for run in runs],
        eval_loss=[_spread(losses) for losses in zip_longest(*(run.eval_loss for run in runs))],
        final_eval_loss=_spread(list(finals.values())),
        difference=_spread([loss - reached[seed] for seed, loss in finals.items() if seed in reached]),
        trained_fraction=runs[0].trained_fraction,
        state_bytes=runs[0].state_bytes,
        **{field: _spread([getattr(run, field) for run in runs]) for field in _OVER_SEEDS},
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    """Return mean and sample deviation of the known values; None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(mean=mean(known), deviation=stdev(known) if len(known) > 1 else None)


def _final_losses(runs: Sequence[RunNumbers]) -> dict[int, float]:
    """Return the final models' eval losses by seed."""
    # The last epoch of a run that is still running is not the last epoch of the others.
    found = {run.seed: run.final_eval_loss for run in runs if run.finished}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def _by_epoch(run: Run) -> list[float]:
    """Return the last eval loss of each epoch."""
    last = {math.ceil(line.step / run.plan.steps_per_epoch): line.loss for line in run.metrics.eval if line.step}
    return [last[epoch] for epoch in sorted(last)]


def _highest(run: Run, field: str) -> int | None:
    return max((size for line in run.metrics.train if (size := getattr(line, field)) is not None), default=None)
