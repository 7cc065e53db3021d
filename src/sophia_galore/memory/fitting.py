"""Settings with which a run fits into a limit: down the ladder until it does, and back up where there is room."""

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
from sophia_galore.memory.out_of_memory import or_what_helps
from sophia_galore.memory.planner import Planner


@dataclass(frozen=True)
class Try:
    """Settings that were tried.

    Args:
        name: What was changed, in words.
        changes: The keys that it changed, with their values.
        peak_bytes: What would be needed; what stays alone, where that is too much already.
        is_known: Whether it was found out; False: more than `peak_bytes` is needed.
        fits: Whether that is within the limit.
        slowdown: How many times as long a token is expected to take as with the settings that were asked for.
    """

    name: str
    changes: Mapping[str, Any]
    peak_bytes: int
    is_known: bool
    fits: bool
    slowdown: float


@dataclass(frozen=True)
class Fit:
    """What was found.

    Args:
        tries: In the order in which they were made, the first being what was asked for.
        config: Settings that fit; None: none do.
        changes: What they change of what was asked for.
        forecast: Of these settings or, if none fit, of those that need least.
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
        planner: Knows what settings need.
        config: What was asked.
        budget: What there is.
        may_shorten: Whether examples may be made shorter, in the end.
        fills: Whether what is left is used for layers without activation checkpointing, which takes another look.

    Raises:
        UserError: Something speaks against what was asked.
    """
    search = _Search(planner, config, budget)
    search.descend((*RUNGS, SHORTER) if may_shorten else RUNGS)
    fits = budget.fits(search.needed)
    if fits:
        search.ascend(fills=fills)
    found = search.config
    return Fit(tuple(search.tries), found if fits else None, _difference(config, found), search.forecast(found))


class _Search:
    """Settings that are changed step by step; each step that helps is noted."""

    def __init__(self, planner: Planner, asked: RunConfig, budget: Budget) -> None:
        self._planner, self._asked, self._budget = planner, asked, budget
        self._taken: dict[Rung, Changes] = {}
        self.tries: list[Try] = []
        self._take("as asked", asked, {}, *self._need(asked))

    def descend(self, rungs: tuple[Rung, ...]) -> None:
        """Need less, until it fits."""
        for rung, changes in self._steps(rungs):
            if self._budget.fits(self.needed):
                return
            candidate = changed(self.config, changes)
            try:
                needed, is_known = self._need(candidate)
            except UserError:
                continue  # another setting that was asked for forbids it
            if not is_known or needed < self.needed:
                self._take(rung.name, candidate, changes, needed, is_known)
                self._taken[rung] = {**self._taken.get(rung, {}), **changes}

    def ascend(self, *, fills: bool) -> None:
        """Take back what turned out not to be needed, and use what is left for speed."""
        values = flatten(self._asked)
        # The last one was needed, or the way down would have ended before it.
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
        """What settings need; with auto, where all layers use activation checkpointing."""
        is_open = config.training.gradient_checkpointing and config.engine.keep_layers == "auto"
        return self._planner.forecast(config, 0 if is_open else self._planner.keep_layers(config))

    def _need(self, config: RunConfig) -> tuple[int, bool]:
        """What settings need, and whether that is all; where what stays is too much already, nothing is simulated."""
        standing = self._planner.standing_bytes(config)
        if not self._budget.fits(standing):
            return standing, False
        return self.forecast(config).peak_bytes, True

    def _steps(self, rungs: tuple[Rung, ...]) -> Iterator[tuple[Rung, Changes]]:
        """Rung after rung, each for as long as it has something to offer."""
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
    """What to change after memory ran out.

    Args:
        planner: Knows what settings need.
        config: What was asked.
    """
    budget = planner.budget(config)
    if budget is None:
        return WHAT_HELPS
    found = find_settings(planner, config, budget, fills=False)  # somebody waits
    needed = bytes_in_words(found.forecast.peak_bytes)
    if found.config is None:
        enough = bytes_in_words(found.forecast.peak_bytes + budget.reserve_bytes)
        return (
            f"No settings fit into memory.limit: with {in_words(found.changes)} {needed} would still be needed. Raise "
            f"memory.limit to {enough} or more, lower training.max_length, or take a smaller model."
        )
    if not found.changes:
        return or_what_helps(f"By the plan {needed} are enough, so something else takes memory: set memory.reserve")
    return f"These settings are expected to fit, with {needed}: {in_words(found.changes)}."


def in_words(changes: Mapping[str, Any]) -> str:
    """Settings as the command line takes them.

    Args:
        changes: Values by dotted key.
    """
    values = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changes.items()}
    return " ".join(f"{key}={value}" for key, value in values.items())


def _difference(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    old, new = flatten(before), flatten(after)
    return {key: new[key] for key in new if new[key] != old[key]}
