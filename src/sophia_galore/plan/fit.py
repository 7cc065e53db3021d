"""Settings with which a run fits into a limit: down the ladder until it does, and back up where there is room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.config.dump import changed, flatten
from sophia_galore.errors import UserError
from sophia_galore.plan.forecast import Forecast
from sophia_galore.plan.ladder import RUNGS, SHORTER, Changes, Rung
from sophia_galore.plan.planner import Planner
from sophia_galore.plan.reserve import Budget
from sophia_galore.plan.slowdown import slowdown


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


@dataclass(frozen=True)
class Fitter:
    """Finds settings.

    Args:
        planner: Knows what settings need.
    """

    planner: Planner

    def fit(self, config: RunConfig, budget: Budget, *, may_shorten: bool = False, fills: bool = True) -> Fit:
        """Find settings that fit.

        Args:
            config: What was asked.
            budget: What there is.
            may_shorten: Whether examples may be made shorter, in the end.
            fills: Whether what is left is used for kept graphs, which takes another look.

        Raises:
            UserError: Something speaks against what was asked.
        """
        asked, taken = config, dict[Rung, Changes]()
        needed, is_known = self._needed(config, budget)
        tries = [self._try("as asked", asked, config, {}, needed, budget, is_known=is_known)]
        for rung, changes in self._descend(config, may_shorten):
            if budget.fits(needed):
                break
            candidate = changed(config, changes)
            try:
                less, is_known = self._needed(candidate, budget)
            except UserError:
                continue  # another setting that was asked for forbids it
            if is_known and less >= needed:
                continue
            config, needed = candidate, less
            taken[rung] = {**taken.get(rung, {}), **changes}
            tries.append(self._try(rung.name, asked, config, changes, needed, budget, is_known=is_known))
        if not budget.fits(needed):
            return Fit(tuple(tries), None, _difference(asked, config), self._forecast(config))
        for name, richer in self._ascend(asked, config, budget, taken, fills=fills):
            difference = _difference(config, richer)
            config = richer
            tries.append(self._try(name, asked, config, difference, self._forecast(config).peak_bytes, budget))
        return Fit(tuple(tries), config, _difference(asked, config), self._forecast(config))

    def _needed(self, config: RunConfig, budget: Budget) -> tuple[int, bool]:
        """What settings need, and whether that is all; where what stays is too much already, nothing is simulated."""
        standing = self.planner.standing_bytes(config)
        if not budget.fits(standing):
            return standing, False
        return self._forecast(config).peak_bytes, True

    def _forecast(self, config: RunConfig) -> Forecast:
        """What settings need; with auto, before any graph is kept."""
        is_open = config.training.gradient_checkpointing and config.engine.keep_layers == "auto"
        return self.planner.forecast(config, 0 if is_open else self.planner.keep_layers(config))

    def _descend(self, config: RunConfig, may_shorten: bool) -> Iterator[tuple[Rung, Changes]]:
        """Rung after rung, each for as long as it has something to offer."""
        for rung in (*RUNGS, SHORTER) if may_shorten else RUNGS:
            while (changes := rung.step(config)) is not None:
                yield rung, changes
                config = changed(config, changes)

    def _ascend(
        self, asked: RunConfig, config: RunConfig, budget: Budget, taken: Mapping[Rung, Changes], *, fills: bool
    ) -> Iterator[tuple[str, RunConfig]]:
        """Take back what turned out not to be needed, and use what is left for speed."""
        values = flatten(asked)
        # The last one was needed, or the way down would have ended before it.
        for rung, changes in list(taken.items())[:-1]:
            richer = changed(config, {key: values[key] for key in changes})
            if budget.fits(self._needed(richer, budget)[0]):
                yield f"{rung.name} (back)", richer
                config = richer
        if not fills:
            return
        most = self.planner.most_kept_layers(config, budget)
        wanted = config.engine.keep_layers
        if config.training.gradient_checkpointing and (wanted == "auto" or most > wanted):
            yield "kept layers (rest)", changed(config, {"engine.keep_layers": most})

    def _try(
        self,
        name: str,
        asked: RunConfig,
        config: RunConfig,
        changes: Mapping[str, Any],
        needed: int,
        budget: Budget,
        *,
        is_known: bool = True,
    ) -> Try:
        factor = slowdown(asked, config, self.planner.num_layers)
        return Try(name, changes, needed, is_known, budget.fits(needed), factor)


def _difference(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    old, new = flatten(before), flatten(after)
    return {key: new[key] for key in new if new[key] != old[key]}
