"""What a run reached and what it took, in the numbers that runs are compared by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean, stdev
from typing import Any

from sophia_galore.report.run import Run


@dataclass(frozen=True)
class Result:
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
    eval_loss: tuple[float, ...]
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
    ended_early: bool = False
    exported_step: int | None = None
    exported_eval_loss: float | None = None

    @property
    def final_eval_loss(self) -> float | None:
        """Eval loss of the final model; of a run that is not finished, the last one; None: it was not evaluated."""
        if self.exported_eval_loss is not None:
            return self.exported_eval_loss
        return self.eval_loss[-1] if self.eval_loss else None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "eval_loss": list(self.eval_loss)}


def result_of(run: Run) -> Result:
    """The numbers of a run, from its records."""
    timed = [(line.tokens, seconds) for line, seconds in zip(run.metrics.train, step_seconds(run), strict=True)]
    tokens = sum(line.tokens or 0 for line in run.metrics.train)
    seconds = sum(taken for _, taken in timed if taken is not None)
    timed_tokens = sum(count or 0 for count, taken in timed if taken is not None)
    epochs = sum(taken is not None for _, taken in timed) / int(run.plan["steps_per_epoch"])
    before = [line.eval_loss for line in run.metrics.eval if line.step == 0]
    memory, sizes = run.memory, run.plan["bytes"]
    return Result(
        name=run.name,
        optimizer=str(run.plan["optimizer"]),
        seed=run.seed,
        eval_loss=_by_epoch(run),
        peak_allocated_bytes=memory.peak_allocated_bytes if memory else _highest(run, "allocated_bytes"),
        peak_process_bytes=memory.peak_process_bytes if memory else None,
        seconds_per_epoch=round(seconds / epochs, 3) if epochs else None,
        tokens_per_second=round(timed_tokens / seconds, 3) if seconds else None,
        trained_fraction=float(run.plan["trained_fraction"]),
        state_bytes=int(sizes.get("optimizer state", 0)) + int(sizes.get("projections", 0)),
        peak_reserved_bytes=memory.peak_reserved_bytes if memory else _highest(run, "reserved_bytes"),
        eval_loss_before=before[0] if before else None,
        step=run.step,
        num_steps=run.num_steps,
        finished=run.finished,
        failure=run.failure,
        tokens=int(tokens),
        ended_early=run.ended_early,
        exported_step=run.metrics.exported.step if run.metrics.exported else None,
        exported_eval_loss=run.metrics.exported.eval_loss if run.metrics.exported else None,
    )


def step_seconds(run: Run) -> list[float | None]:
    """How long each recorded step took; None where that is not in the records."""
    return [
        line.tokens / line.tokens_per_second if line.tokens is not None and line.tokens_per_second else None
        for line in run.metrics.train
    ]


def _by_epoch(run: Run) -> tuple[float, ...]:
    """The last evaluation within each epoch."""
    steps_per_epoch = int(run.plan["steps_per_epoch"])
    last = {math.ceil(line.step / steps_per_epoch): line.eval_loss for line in run.metrics.eval if line.step}
    return tuple(last[epoch] for epoch in sorted(last))


def _highest(run: Run, field: str) -> int | None:
    sizes = [size for line in run.metrics.train if (size := getattr(line, field)) is not None]
    return max(sizes, default=None)


@dataclass(frozen=True)
class Spread:
    """A number over several seeds.

    Args:
        mean: Their mean.
        deviation: Their sample standard deviation; None for a single one.
    """

    mean: float
    deviation: float | None


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and deviation of what was measured; None if nothing was."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(mean(known), stdev(known) if len(known) > 1 else None)
