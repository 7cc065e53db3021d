"""Finds settings that fit into a memory limit: reduces memory until the run fits, then uses what is left for speed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.config.dump import changed, flatten
from sophia_galore.config.size import bytes_in_words
from sophia_galore.engine.probe import WHAT_HELPS
from sophia_galore.errors import UserError
from sophia_galore.memory.budget import Budget
from sophia_galore.memory.forecast import Forecast
from sophia_galore.memory.ladder import RUNGS, SHORTER, Changes, Rung, slowdown
from sophia_galore.memory.out_of_memory import with_usual_remedies
from sophia_galore.memory.planner import MemoryEstimate, Planner


@dataclass(frozen=True)
class Need:
    """The memory that a configuration needs.

    Args:
        peak_bytes: Peak memory on the device, or only what stays there all the time if that does not fit already.
        is_known: Whether `peak_bytes` is the peak; False: the peak is higher.
        host_bytes: Bytes of weights and states in host memory.
        device_excess_bytes: Bytes beyond the device's limit.
        host_excess_bytes: Bytes beyond the host's limit.
    """

    peak_bytes: int
    is_known: bool
    host_bytes: int
    device_excess_bytes: int
    host_excess_bytes: int

    @property
    def excess_bytes(self) -> int:
        """Bytes beyond both limits."""
        return self.device_excess_bytes + self.host_excess_bytes

    def is_less_than(self, other: Need) -> bool:
        """Return whether it comes nearer to fitting: on the device first, since the host takes what leaves it."""
        there = (other.device_excess_bytes, other.host_excess_bytes)
        return (self.device_excess_bytes, self.host_excess_bytes) < there


@dataclass(frozen=True)
class Try:
    """A configuration that was tried.

    Args:
        name: Name of the setting that was changed.
        changes: The changed keys with their values.
        need: The memory that it needs.
        fits: Whether that is within the limits.
        slowdown: Expected time for a token, relative to the settings that were asked for.
    """

    name: str
    changes: Mapping[str, Any]
    need: Need
    fits: bool
    slowdown: float


@dataclass(frozen=True)
class Fit:
    """The result of the search.

    Args:
        tries: All tried configurations in order, the first one as asked.
        config: The configuration that fits; None if none does.
        changes: Its differences from what was asked for.
        estimate: Its memory or, if none fits, that of the smallest one.
    """

    tries: tuple[Try, ...]
    config: RunConfig | None
    changes: Mapping[str, Any]
    estimate: MemoryEstimate

    @property
    def forecast(self) -> Forecast:
        """The memory on the device."""
        return self.estimate.forecast


def find_settings(
    planner: Planner, config: RunConfig, budget: Budget, *, may_shorten: bool = False, fills: bool = True
) -> Fit:
    """Find settings that fit.

    Args:
        planner: Forecasts the memory of configurations.
        config: The configuration.
        budget: The available memory.
        may_shorten: Whether examples may be shortened as the last resort.
        fills: Whether the memory that is left is used for layers without activation checkpointing.

    Raises:
        UserError: The configuration is refused.
    """
    search = _Search(planner, config, budget)
    search.descend((*RUNGS, SHORTER) if may_shorten else RUNGS)
    fits = not search.need.excess_bytes
    if fits:
        search.ascend(fills=fills)
    found = search.config
    return Fit(tuple(search.tries), found if fits else None, _difference(config, found), search.estimate(found))


class _Search:
    """A configuration that is changed step by step; steps that help are recorded."""

    def __init__(self, planner: Planner, asked: RunConfig, budget: Budget) -> None:
        self._planner, self._asked, self._budget = planner, asked, budget
        self._taken: dict[Rung, Changes] = {}
        self.tries: list[Try] = []
        self._take("as asked", asked, {}, self._need(asked))

    def descend(self, rungs: tuple[Rung, ...]) -> None:
        """Reduce memory until the run fits."""
        for rung, changes in self._steps(rungs):
            if not self.need.excess_bytes:
                return
            candidate = changed(self.config, changes)
            try:
                need = self._need(candidate)
            except UserError:
                continue  # it contradicts another setting
            if not (need.is_known and self.need.is_known) or need.is_less_than(self.need):
                self._take(rung.name, candidate, changes, need)
                self._taken[rung] = {**self._taken.get(rung, {}), **changes}

    def ascend(self, *, fills: bool) -> None:
        """Undo changes that are not needed, and use the memory that is left for speed."""
        values = flatten(self._asked)
        # The last change was needed, or the search would have stopped before it. The costliest of the others is undone
        # first, while there is room.
        for rung, changes in reversed(list(self._taken.items())[:-1]):
            if self.config.memory.placement == "disk" and not rung.costs_time_only:
                continue  # more bytes would be read and written in each step
            richer = changed(self.config, {key: values[key] for key in changes})
            try:
                need = self._need(richer)
            except UserError:
                continue  # it contradicts a setting that was changed since
            if not need.excess_bytes and _difference(self.config, richer):
                self._take_richer(f"{rung.name} (back)", richer)
        if not fills or self._planner.streamed(_alone(self.config)).units:
            return
        most, wanted = self._planner.most_kept_layers(self.config, self._budget), self.config.engine.keep_layers
        if self.config.training.gradient_checkpointing and (wanted == "auto" or most > wanted):
            self._take_richer("kept layers (rest)", changed(self.config, {"engine.keep_layers": most}))

    def estimate(self, config: RunConfig) -> MemoryEstimate:
        """Return the memory of a configuration; for keep_layers=auto, with activation checkpointing in all layers."""
        config = _alone(config)
        streamed = self._planner.streamed(config)
        is_open = config.training.gradient_checkpointing and config.engine.keep_layers == "auto"
        kept = 0 if is_open else self._planner.keep_layers(config, streamed)
        forecast = self._planner.forecast(config, kept, streamed)
        return MemoryEstimate(
            forecast,
            self._budget,
            streamed,
            self._planner.full_gradients(config),
            self._planner.host_limit_bytes(config),
            self._planner.input_bytes(config),
        )

    def _need(self, config: RunConfig) -> Need:
        config = _alone(config)
        streamed = self._planner.streamed(config)
        peak = self._planner.standing_bytes(config, streamed)
        if is_known := self._budget.fits(peak):
            peak = self.estimate(config).forecast.peak_bytes
        host = streamed.bytes_in("host") + self._planner.input_bytes(config)
        limit = self._planner.host_limit_bytes(config)
        over = 0 if limit is None else max(0, host - limit)
        return Need(peak, is_known, host, max(0, peak - self._budget.tensor_bytes), over)

    def _steps(self, rungs: tuple[Rung, ...]) -> Iterator[tuple[Rung, Changes]]:
        """Yield all changes of each rung in turn."""
        config = self._asked
        for rung in rungs:
            if rung.uses_host and self._planner.host_limit_bytes(config) == 0:
                continue
            while (changes := rung.step(config)) is not None:
                yield rung, changes
                config = changed(config, changes)

    def _take_richer(self, name: str, config: RunConfig) -> None:
        self._take(name, config, _difference(self.config, config), self._need(config))

    def _take(self, name: str, config: RunConfig, changes: Mapping[str, Any], need: Need) -> None:
        self.config, self.need = config, need
        factor = slowdown(self._asked, config, self._planner.num_layers)
        self.tries.append(Try(name, changes, need, not need.excess_bytes, factor))


def _alone(config: RunConfig) -> RunConfig:
    """Return a configuration with placement device for auto: the search itself tries where else weights may live."""
    return changed(config, {"memory.placement": "device"}) if config.memory.placement == "auto" else config


def advice(planner: Planner, config: RunConfig) -> str:
    """Return what to change after memory ran out.

    Args:
        planner: Forecasts the memory of configurations.
        config: The configuration.
    """
    budget = planner.budget(config)
    if budget is None:
        return WHAT_HELPS
    found = find_settings(planner, config, budget, fills=False)  # the user is waiting
    needed = bytes_in_words(found.forecast.peak_bytes)
    if found.config is None:
        enough = bytes_in_words(found.forecast.peak_bytes + budget.reserve_bytes)
        return (
            f"No settings fit into memory.limit: with {as_overrides(found.changes)} {needed} would still be needed. "
            f"Raise memory.limit to {enough} or more, lower training.max_length, or take a smaller model."
        )
    if not found.changes:
        return with_usual_remedies(
            f"By the plan {needed} are enough, so something else takes memory: set memory.reserve"
        )
    return f"These settings are expected to fit, with {needed}: {as_overrides(found.changes)}."


def as_overrides(changes: Mapping[str, Any]) -> str:
    """Return settings as overrides for the command line.

    Args:
        changes: Values by dotted key.
    """
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())


def _difference(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    old, new = flatten(before), flatten(after)
    return {key: new[key] for key in new if new[key] != old[key]}
