"""Settings with which a run fits into a limit: down the ladder until it does, and back up where there is room."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.config.change import changed
from sophia_galore.config.dump import flatten
from sophia_galore.errors import UserError
from sophia_galore.plan.forecast import Estimate, Forecast
from sophia_galore.plan.ladder import RUNGS, SHORTER, Changes, Rung
from sophia_galore.plan.reserve import Budget
from sophia_galore.plan.slowdown import slowdown
from sophia_galore.plan.subject import Subject

# What no forecast depends on, so that one serves for all limits.
_WITHOUT_EFFECT = ("memory.limit", "memory.reserve", "memory.on_oom", "engine.keep_layers")


@dataclass(frozen=True)
class Try:
    """Settings that were tried.

    Args:
        name: What was changed, in words.
        changes: The keys that it changed, with their values.
        peak_bytes: What would be needed.
        fits: Whether that is within the limit.
        slowdown: How many times as long a token is expected to take as with the settings that were asked for.
    """

    name: str
    changes: Mapping[str, Any]
    peak_bytes: int
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


@dataclass
class Fitter:
    """Finds settings; remembers what settings need, since many limits ask for the same ones.

    Args:
        subject: What memory is planned for.
    """

    subject: Subject
    _known: dict[str, Estimate] = field(default_factory=dict)

    def fit(self, config: RunConfig, budget: Budget, *, may_shorten: bool = False) -> Fit:
        """Find settings that fit.

        Args:
            config: What was asked.
            budget: What there is.
            may_shorten: Whether examples may be made shorter, in the end.

        Raises:
            UserError: Something speaks against what was asked.
        """
        asked, taken = config, dict[Rung, Changes]()
        forecast = self.forecast(config)
        tries = [self._try("as asked", asked, config, {}, forecast, budget)]
        for rung, changes in self._descend(config, may_shorten):
            if budget.fits(forecast.peak_bytes):
                break
            candidate = changed(config, changes)
            try:
                lighter = self.forecast(candidate)
            except UserError:
                continue  # another setting that was asked for forbids it
            if lighter.peak_bytes >= forecast.peak_bytes:
                continue
            config, forecast = candidate, lighter
            taken[rung] = {**taken.get(rung, {}), **changes}
            tries.append(self._try(rung.name, asked, config, changes, forecast, budget))
        if not budget.fits(forecast.peak_bytes):
            return Fit(tuple(tries), None, _difference(asked, config), forecast)
        for name, richer in self._ascend(asked, config, budget, taken):
            difference = _difference(config, richer)
            config, forecast = richer, self.forecast(richer)
            tries.append(self._try(name, asked, config, difference, forecast, budget))
        return Fit(tuple(tries), config, _difference(asked, config), forecast)

    def forecast(self, config: RunConfig) -> Forecast:
        """What settings need; `engine.keep_layers` counts as 0 where it is auto."""
        kept = config.engine.keep_layers
        if not config.training.gradient_checkpointing:
            kept = 10**9
        return self._estimate(config).forecast(kept if isinstance(kept, int) else 0)

    def _estimate(self, config: RunConfig) -> Estimate:
        key = repr({name: value for name, value in flatten(config).items() if name not in _WITHOUT_EFFECT})
        if key not in self._known:
            self._known[key] = self.subject.estimate(config, keeps=True)
        return self._known[key]

    def _descend(self, config: RunConfig, may_shorten: bool) -> Iterator[tuple[Rung, Changes]]:
        """Rung after rung, each for as long as it has something to offer."""
        for rung in (*RUNGS, SHORTER) if may_shorten else RUNGS:
            while (changes := rung.step(config)) is not None:
                yield rung, changes
                config = changed(config, changes)

    def _ascend(
        self, asked: RunConfig, config: RunConfig, budget: Budget, taken: Mapping[Rung, Changes]
    ) -> Iterator[tuple[str, RunConfig]]:
        """Take back what turned out not to be needed, and use what is left for speed."""
        values = flatten(asked)
        # The last one was needed, or the way down would have ended before it.
        for rung, changes in list(taken.items())[:-1]:
            richer = changed(config, {key: values[key] for key in changes})
            if budget.fits(self.forecast(richer).peak_bytes):
                yield f"{rung.name}, back", richer
                config = richer
        most = self._estimate(config).most_kept_layers(budget.tensor_bytes)
        wanted = config.engine.keep_layers
        if config.training.gradient_checkpointing and (wanted == "auto" or most > wanted):
            yield "kept layers, what is left", changed(config, {"engine.keep_layers": most})

    def _try(
        self,
        name: str,
        asked: RunConfig,
        config: RunConfig,
        changes: Mapping[str, Any],
        forecast: Forecast,
        budget: Budget,
    ) -> Try:
        num_layers = len(self.subject.layer_names)
        return Try(
            name, changes, forecast.peak_bytes, budget.fits(forecast.peak_bytes), slowdown(asked, config, num_layers)
        )


def _difference(before: RunConfig, after: RunConfig) -> dict[str, Any]:
    old, new = flatten(before), flatten(after)
    return {key: new[key] for key in new if new[key] != old[key]}
