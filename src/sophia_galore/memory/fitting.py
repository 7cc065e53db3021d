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
from sophia_galore.memory.planner import Planner


@dataclass(frozen=True)
class Try:
    """A configuration that was tried.

    Args:
        name: Name of the setting that was changed.
        changes: The changed keys with their values.
        peak_bytes: Peak memory, or only weights and states if these do not fit already.
        is_known: Whether `peak_bytes` is the peak; False: the peak is higher.
        fits: Whether it is within the limit.
        slowdown: Expected time for a token, relative to the settings that were asked for.
    """

    name: str
    changes: Mapping[str, Any]
    peak_bytes: int
    is_known: bool
    fits: bool
    slowdown: float


@dataclass(frozen=True)
class Fit:
    """The result of the search.

    Args:
        tries: All tried configurations in order, the first one as asked.
        config: The configuration that fits; None if none does.
        changes: Its differences from what was asked for.
        forecast: Its forecast or, if none fits, that of the smallest one.
    """

    tries: tuple[Try, ...]
    config: RunConfig | None
    changes: Mapping[str, Any]
    forecast: Forecast


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
    fits = budget.fits(search.needed)
    if fits:
        search.ascend(fills=fills)
    found = search.config
    return Fit(tuple(search.tries), found if fits else None, _difference(config, found), search.forecast(found))


class _Search:
    """A configuration that is changed step by step; steps that help are recorded."""

    def __init__(self, planner: Planner, asked: RunConfig, budget: Budget) -> None:
        self._planner, self._asked, self._budget = planner, asked, budget
        self._taken: dict[Rung, Changes] = {}
        self.tries: list[Try] = []
        self._take("as asked", asked, {}, *self._need(asked))

    def descend(self, rungs: tuple[Rung, ...]) -> None:
        """Reduce memory until the run fits."""
        for rung, changes in self._steps(rungs):
            if self._budget.fits(self.needed):
                return
            candidate = changed(self.config, changes)
            try:
                needed, is_known = self._need(candidate)
            except UserError:
                continue  # it contradicts another setting
            if not is_known or needed < self.needed:
                self._take(rung.name, candidate, changes, needed, is_known)
                self._taken[rung] = {**self._taken.get(rung, {}), **changes}

    def ascend(self, *, fills: bool) -> None:
        """Undo changes that are not needed, and use the memory that is left for speed."""
        values = flatten(self._asked)
        # The last change was needed, or the search would have stopped before it.
        for rung, changes in list(self._taken.items())[:-1]:
            richer = changed(self.config, {key: values[key] for key in changes})
            if self._budget.fits(self._need(richer)[0]):
                self._take_richer(f"{rung.name} (back)", richer)
        if not fills:
            return
        most, wanted = self._planner.most_kept_layers(self.config, self._budget), self.config.engine.keep_layers
        if self.config.training.gradient_checkpointing and (wanted == "auto" or most > wanted):
            self._take_richer("kept layers (rest)", changed(self.config, {"engine.keep_layers": most}))

    def forecast(self, config: RunConfig) -> Forecast:
        """Return the forecast; for keep_layers=auto, with activation checkpointing in all layers."""
        is_open = config.training.gradient_checkpointing and config.engine.keep_layers == "auto"
        return self._planner.forecast(config, 0 if is_open else self._planner.keep_layers(config))

    def _need(self, config: RunConfig) -> tuple[int, bool]:
        """Return the peak and True or, if weights and states alone do not fit, their bytes and False."""
        standing = self._planner.standing_bytes(config)
        if not self._budget.fits(standing):
            return standing, False
        return self.forecast(config).peak_bytes, True

    def _steps(self, rungs: tuple[Rung, ...]) -> Iterator[tuple[Rung, Changes]]:
        """Yield all changes of each rung in turn."""
        config = self._asked
        for rung in rungs:
            while (changes := rung.step(config)) is not None:
                yield rung, changes
                config = changed(config, changes)

    def _take_richer(self, name: str, config: RunConfig) -> None:
        self._take(name, config, _difference(self.config, config), self.forecast(config).peak_bytes, True)

    def _take(self, name: str, config: RunConfig, changes: Mapping[str, Any], needed: int, is_known: bool) -> None:
        self.config, self.needed = config, needed
        factor = slowdown(self._asked, config, self._planner.num_layers)
        self.tries.append(Try(name, changes, needed, is_known, self._budget.fits(needed), factor))


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
