"""Forecasts the memory of one model under many configurations, without weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch

from sophia_galore.config import RunConfig
from sophia_galore.config.check import check
from sophia_galore.config.dump import changed, flatten
from sophia_galore.config.schema_data import DataConfig
from sophia_galore.config.size import bytes_in_words
from sophia_galore.data.batches import pad_token
from sophia_galore.data.dataset import Dataset, load_data
from sophia_galore.data.read import is_here
from sophia_galore.engine.passes import FullGradients
from sophia_galore.errors import ConfigError
from sophia_galore.memory.budget import Budget, budget_of
from sophia_galore.memory.forecast import Forecast, ModelTrace, trace_model
from sophia_galore.memory.ladder import forms_apart
from sophia_galore.memory.workload import Workload, largest_workload, workload_of_data
from sophia_galore.model.shapes import find_shape
from sophia_galore.model.skeleton import build_skeleton, load_tokenizer
from sophia_galore.plan.decisions import Decisions, decide_step, num_idle_layers, standing_bytes
from sophia_galore.plan.detect import detect_bitsandbytes, model_facts, parameter_facts, planned_device
from sophia_galore.plan.facts import Facts, MemoryFacts
from sophia_galore.plan.plan import count_steps
from sophia_galore.plan.rules import RULES
from sophia_galore.plan.verdicts import decide

_CPU = torch.device("cpu")
# A simulation does not depend on these keys, so one serves for all of their values.
_WITHOUT_EFFECT = ("memory.limit", "memory.reserve", "engine.keep_layers", "training.gradient_checkpointing")
# Layers without activation checkpointing only save time and must not make a run fail, so this share of the memory is
# left free: more than any forecast error that was seen.
_MARGIN = 0.01


@dataclass(frozen=True)
class MemoryEstimate:
    """The forecast memory of a run, and the available memory.

    Args:
        forecast: The forecast.
        budget: The available memory; None without a limit.
        full_gradients: Which full gradients may be in memory together.
    """

    forecast: Forecast
    budget: Budget | None
    full_gradients: FullGradients = "layer"

    @property
    def fits(self) -> bool | None:
        """Whether the run fits; None without a limit."""
        return None if self.budget is None else self.budget.fits(self.forecast.peak_bytes)

    def sentence(self) -> str:
        """Return the estimate as a sentence for the user."""
        there = "" if self.budget is None else f", of {bytes_in_words(self.budget.tensor_bytes)} that there are"
        return f"Expected: {bytes_in_words(self.forecast.peak_bytes)} of tensors at most{there}."

    def facts(self) -> MemoryFacts:
        """Return the estimate as facts for the rules."""
        needed, apart = self.forecast.peak_bytes, self.full_gradients
        if self.budget is None:
            return MemoryFacts(needed, full_gradients=apart)
        return MemoryFacts(needed, self.budget.limit_bytes, self.budget.reserve_bytes, apart)


@dataclass(frozen=True)
class Planner:
    """Forecasts the memory of configurations of one model. Simulations are cached, since many limits share them.

    Args:
        facts: The machine, the model and its parameters; each call replaces the configuration.
        model_config: The model's Hugging Face configuration.
        layer_names: Its layers, as prefixes of their parameters' names without the final dot.
        workload: Returns the micro-batches of the largest step of a configuration.
        num_steps: Returns the steps of a configuration's run.
        source: Where the model's shapes come from.
    """

    facts: Facts
    model_config: Any
    layer_names: tuple[str, ...]
    workload: Callable[[RunConfig], Workload]
    num_steps: Callable[[RunConfig], int]
    source: str
    _traces: dict[str, ModelTrace] = field(default_factory=dict, init=False)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.layer_names)

    def decide(self, config: RunConfig) -> Decisions:
        """Return the decisions about a configuration's step.

        Raises:
            UserError: The configuration is refused.
        """
        check(config)
        return decide_step(replace(self.facts, config=config))

    def estimate(self, config: RunConfig) -> MemoryEstimate | None:
        """Return the estimate of a configuration; None with bitsandbytes, whose memory is unknown.

        Raises:
            UserError: The configuration is refused.
        """
        if replace(self.facts, config=config).freezes_layers:
            return None
        full_gradients = self.full_gradients(config)
        config = changed(config, {"engine.full_gradients": full_gradients})
        return MemoryEstimate(self.forecast(config, self.keep_layers(config)), self.budget(config), full_gradients)

    def forecast(self, config: RunConfig, keep_layers: int) -> Forecast:
        """Return the forecast of a configuration.

        Args:
            config: The configuration; engine.full_gradients: auto counts as layer.
            keep_layers: Number of layers without activation checkpointing; overrides the configuration.

        Raises:
            UserError: The configuration is refused.
        """
        return self._trace(config, with_kept=keep_layers > 0).forecast(keep_layers)

    def standing_bytes(self, config: RunConfig) -> int:
        """Return the bytes that stay in memory for the whole run.

        Raises:
            UserError: The configuration is refused.
        """
        return sum(standing_bytes(self.decide(config).routes).values())

    def budget(self, config: RunConfig) -> Budget | None:
        """Return the available memory; None without a limit."""
        return budget_of(config, self.facts.device)

    def full_gradients(self, config: RunConfig) -> FullGradients:
        """Return which full gradients may be in memory together.

        Args:
            config: The configuration. For auto it is `matrix` if the forecast with `layer` does not fit and the
                optimizer needs no more of the full gradients than products.
        """
        asked = config.engine.full_gradients
        if asked != "auto":
            return asked
        budget = self.budget(config) if config.memory.predict and forms_apart(config) else None
        if budget is None or replace(self.facts, config=config).freezes_layers:
            return "layer"
        is_open = config.training.gradient_checkpointing and config.engine.keep_layers == "auto"
        together = self.forecast(config, 0 if is_open else self.keep_layers(config))
        return "layer" if budget.fits(together.peak_bytes) else "matrix"

    def keep_layers(self, config: RunConfig) -> int:
        """Return how many layers run without activation checkpointing.

        Args:
            config: The configuration.

        Raises:
            ConfigError: engine.keep_layers is auto, but there is no limit.
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
        """Return how many layers can run without activation checkpointing, with a margin; 0 also if nothing fits."""
        return self._trace(config, with_kept=True).most_kept_layers(int(budget.tensor_bytes * (1 - _MARGIN)))

    def _num_active_layers(self, config: RunConfig) -> int:
        """Return the number of layers that have a backward."""
        if config.training.trainable is None:
            return self.num_layers
        return self.num_layers - num_idle_layers(self.decide(config), self.layer_names)

    def _trace(self, config: RunConfig, *, with_kept: bool) -> ModelTrace:
        values = {name: value for name, value in flatten(config).items() if name not in _WITHOUT_EFFECT}
        values["engine.full_gradients"] = values["engine.full_gradients"].replace("auto", "layer")
        key = f"{with_kept} {values}"
        if key not in self._traces:
            self._traces[key] = trace_model(
                self.decide(config),
                self.model_config,
                self.layer_names,
                self.workload(config),
                num_steps=self.num_steps(config),
                with_kept=with_kept,
            )
        return self._traces[key]


def find_planner(config: RunConfig, say: Callable[[str], None], *, reads_data: bool) -> Planner:
    """Make a planner without a run: only the model's configuration is downloaded, and no GPU is needed.

    Args:
        config: The configuration; `training.device` may name a GPU that this machine does not have.
        say: Takes lines for the user.
        reads_data: Whether to forecast for the longest training examples, if data and tokenizer are on this machine;
            else for examples of `training.max_length`.

    Raises:
        UserError: The model is unknown, or the run is refused.
    """
    check(config)
    facts = Facts(config, device=planned_device(config.training.device))
    if facts.freezes_layers:
        facts = replace(facts, bitsandbytes=detect_bitsandbytes(_CPU))
    decide(RULES, facts)

    def refuse(model_config: Any) -> None:
        known = replace(facts, model=model_facts(model_config, name=config.model.name))
        if not known.is_buildable:
            decide(RULES, known)

    shape = find_shape(config.model, say, check=refuse)
    model = model_facts(shape.config, name=shape.name)
    trust = config.model.trust_remote_code
    architecture = build_skeleton(shape.config, _CPU, trust_remote_code=trust)
    facts = replace(facts, model=model, parameters=parameter_facts(architecture))
    vocab_size = architecture.embed.num_embeddings

    def workload(asked: RunConfig) -> Workload:
        return largest_workload(asked, vocab_size)

    if reads_data and shape.folder is not None and all(is_here(source.path) for source in config.data.train_sources):
        tokenizer = load_tokenizer(shape.folder, trust_remote_code=trust)
        pad_id = pad_token(tokenizer)

        @cache  # many configurations share the same data
        def read(data: DataConfig, max_length: int, seed: int) -> Dataset:
            return load_data(data, max_length=max_length, seed=seed, tokenizer=tokenizer)

        def workload(asked: RunConfig) -> Workload:
            dataset = read(asked.data, asked.training.max_length, asked.training.seed)
            return workload_of_data(asked, dataset, count_steps(asked, dataset)[1], pad_id)

    return Planner(facts, shape.config, architecture.layer_names, workload, _asked_steps, shape.source)


def _asked_steps(config: RunConfig) -> int:
    """Return the steps of a run without known data: `training.max_steps`, or enough to include every refresh."""
    return config.training.max_steps or 10**9
