"""Runs of the same name over several seeds as one: means, spreads, and differences within a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from sophia_galore.report.result import Result, Spread, spread


@dataclass(frozen=True)
class Group:
    """The runs of one name.

    Args:
        name: Their name.
        optimizer: What trained them.
        seeds: In the order of the runs.
        eval_loss: By epoch.
        final_eval_loss: Of the final model: after the last epoch, or of the best one, where that was asked for.
        difference: Of the final model's loss from that of the first group with the same seed, in nats a token. What
            seeds have in common (the examples, their order) is not in its spread; None for the first group.
        peak_allocated_bytes: Most bytes of live tensors at once.
        peak_reserved_bytes: Most bytes that the allocator held.
        peak_process_bytes: Largest resident size of the process.
        seconds_per_epoch: Time in optimizer steps.
        tokens_per_second: Tokens over that time.
        trained_fraction: Share of the parameters that are trained.
        state_bytes: What the optimizer keeps.
    """

    name: str
    optimizer: str
    seeds: tuple[int, ...]
    eval_loss: tuple[Spread | None, ...]
    final_eval_loss: Spread | None
    difference: Spread | None
    peak_allocated_bytes: Spread | None
    peak_reserved_bytes: Spread | None
    peak_process_bytes: Spread | None
    seconds_per_epoch: Spread | None
    tokens_per_second: Spread | None
    trained_fraction: float
    state_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "seeds": list(self.seeds), "eval_loss": [_plain(loss) for loss in self.eval_loss]}


def summary(results: Sequence[Result]) -> list[Group]:
    """Results by name, in the order of their first appearance.

    Args:
        results: One a run.
    """
    by_name: dict[str, list[Result]] = {}
    for result in results:
        by_name.setdefault(result.name, []).append(result)
    first = next(iter(by_name.values()), [])
    return [_group(group, [] if group is first else first) for group in by_name.values()]


def _group(results: Sequence[Result], against: Sequence[Result]) -> Group:
    finals, reached = _final_losses(results), _final_losses(against)
    differences = [loss - reached[seed] for seed, loss in finals.items() if seed in reached]

    def over_seeds(field: str) -> Spread | None:
        return spread([getattr(result, field) for result in results])

    return Group(
        name=results[0].name,
        optimizer=results[0].optimizer,
        seeds=tuple(result.seed for result in results),
        eval_loss=tuple(spread(losses) for losses in zip_longest(*(result.eval_loss for result in results))),
        final_eval_loss=spread(list(finals.values())),
        difference=spread(differences),
        peak_allocated_bytes=over_seeds("peak_allocated_bytes"),
        peak_reserved_bytes=over_seeds("peak_reserved_bytes"),
        peak_process_bytes=over_seeds("peak_process_bytes"),
        seconds_per_epoch=over_seeds("seconds_per_epoch"),
        tokens_per_second=over_seeds("tokens_per_second"),
        trained_fraction=results[0].trained_fraction,
        state_bytes=results[0].state_bytes,
    )


def _final_losses(results: Sequence[Result]) -> dict[int, float]:
    """The final models' eval losses by seed."""
    # A run that is still under way has fewer epochs; its last one is not the others' last.
    found = {result.seed: result.final_eval_loss for result in results if result.finished}
    return {seed: loss for seed, loss in found.items() if loss is not None}


def _plain(value: Spread | None) -> dict[str, Any] | None:
    return asdict(value) if value else None
