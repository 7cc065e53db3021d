"""Forecasts for one subject under many configurations, and what follows from them before a run begins."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sophia_galore.config import RunConfig
from sophia_galore.config.dump import flatten
from sophia_galore.config.size import bytes_in_words
from sophia_galore.errors import ConfigError
from sophia_galore.memory.budget import Budget, budget_of
from sophia_galore.memory.estimate import Estimate, Forecast
from sophia_galore.memory.subject import Subject
from sophia_galore.plan.decisions import num_idle_layers, standing_bytes
from sophia_galore.plan.facts import MemoryFacts

# What no estimate depends on, so that one serves for all of their values.
_WITHOUT_EFFECT = ("memory.limit", "memory.reserve", "engine.keep_layers", "training.gradient_checkpointing")
# What is kept for speed alone shall not be what makes a run fail: a share that is above any error of a forecast seen.
_MARGIN = 0.01


@dataclass
class Planner:
    """Knows what configurations need, and remembers it: many limits ask for the same ones.

    Args:
        subject: What memory is planned for.
    """

    subject: Subject
    _known: dict[str, Estimate] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.subject.layer_names)

    def forecast(self, config: RunConfig, keep_layers: int) -> Forecast:
        """What a configuration needs.

        Args:
            config: The configuration.
            keep_layers: So many layers keep their graphs, whatever the configuration says.
        """
        return self._estimate(config, keeps=keep_layers > 0).forecast(keep_layers)

    def standing_bytes(self, config: RunConfig) -> int:
        """What stays for the whole run, which is arithmetic.

        Raises:
            UserError: Something speaks against the configuration.
        """
        return sum(standing_bytes(self.subject.decide(config).routes).values())

    def budget(self, config: RunConfig) -> Budget | None:
        """What a configuration may take; None: there is no limit."""
        return budget_of(config, self.subject.facts.device)

    def keep_layers(self, config: RunConfig) -> int:
        """How many layers keep their graphs.

        Args:
            config: What was asked.

        Raises:
            ConfigError: As many as there is room for, but nothing says how much that is.
        """
        asked = config.engine.keep_layers
        if not config.training.gradient_checkpointing:
            return self._num_active_layers(config)
        if asked != "auto":
            return min(asked, self._num_active_layers(config)) if asked else 0
        budget = self.budget(config)
        if budget is None:
            raise ConfigError(
                "engine.keep_layers: auto keeps as many graphs as memory.limit leaves room for, but there is no limit.",
                "Set memory.limit, such as 4GiB, or say how many layers.",
            )
        return self.most_kept_layers(config, budget)

    def most_kept_layers(self, config: RunConfig, budget: Budget) -> int:
        """How many layers can keep their graphs, with a margin; 0 also where even none is too much."""
        return self._estimate(config, keeps=True).most_kept_layers(int(budget.tensor_bytes * (1 - _MARGIN)))

    def _num_active_layers(self, config: RunConfig) -> int:
        """Layers that are gone back through: the others have no use for a graph."""
        if config.training.trainable is None:
            return self.num_layers
        return self.num_layers - num_idle_layers(self.subject.decide(config), self.subject.layer_names)

    def _estimate(self, config: RunConfig, *, keeps: bool) -> Estimate:
        values = {name: value for name, value in flatten(config).items() if name not in _WITHOUT_EFFECT}
        key = f"{keeps} {values}"
        if key not in self._known:
            self._known[key] = self.subject.estimate(config, keeps=keeps)
        return self._known[key]


@dataclass(frozen=True)
class Outlook:
    """What a run is expected to need, and what there is.

    Args:
        forecast: What it needs.
        budget: What there is; None: there is no limit.
    """

    forecast: Forecast
    budget: Budget | None

    @property
    def fits(self) -> bool | None:
        """Whether there is enough; None: there is no limit."""
        return None if self.budget is None else self.budget.fits(self.forecast.peak_bytes)

    def sentence(self) -> str:
        """The same for the user."""
        needed = bytes_in_words(self.forecast.peak_bytes)
        if self.budget is None:
            return f"Expected: {needed} of tensors at most."
        return f"Expected: {needed} of tensors at most, of {bytes_in_words(self.budget.tensor_bytes)} that there are."

    def facts(self) -> MemoryFacts:
        """The same as what verdicts look at."""
        if self.budget is None:
            return MemoryFacts(self.forecast.peak_bytes)
        return MemoryFacts(self.forecast.peak_bytes, self.budget.limit_bytes, self.budget.reserve_bytes)


def look_ahead(planner: Planner, config: RunConfig) -> Outlook | None:
    """The outlook of a configuration as it is; None where layers compute in bitsandbytes' own way, which is not known.

    Raises:
        UserError: Something speaks against it.
    """
    if replace(planner.subject.facts, config=config).freezes_layers:
        return None
    return Outlook(planner.forecast(config, planner.keep_layers(config)), planner.budget(config))
