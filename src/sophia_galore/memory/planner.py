"""Forecasts the memory of one model under many configurations, without weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch

from sophia_galore.config import RunConfig
from sophia_galore.config.check import check
from sophia_galore.config.dump import changed, flatten
from sophia_galore.config.schema_data import DataConfig
from sophia_galore.config.size import bytes_in_words
from sophia_galore.data.batches import pad_token
from sophia_galore.data.dataset import Dataset, load_data
from sophia_galore.data.read import is_here
from sophia_galore.distributed.owned_states import owners_of
from sophia_galore.engine.observe import Category
from sophia_galore.engine.passes import FullGradients
from sophia_galore.errors import ConfigError
from sophia_galore.memory.budget import Budget, budget_of
from sophia_galore.memory.forecast import Forecast, ModelTrace, naming_unpredictable, trace_model
from sophia_galore.memory.ladder import forms_apart
from sophia_galore.memory.transfers import USUAL, transfers_of
from sophia_galore.memory.workload import Workload, largest_workload, workload_of_data
from sophia_galore.model.shapes import find_shape
from sophia_galore.model.skeleton import build_skeleton, load_tokenizer
from sophia_galore.model.streams import count_streams
from sophia_galore.plan.decisions import Decisions, decide_step, num_idle_layers
from sophia_galore.plan.detect import detect_bitsandbytes, model_facts, parameter_facts, planned_device
from sophia_galore.plan.facts import Facts, MemoryFacts
from sophia_galore.plan.placements import Parts, Streamed, choose, device_bytes, parts_of
from sophia_galore.plan.plan import count_steps
from sophia_galore.plan.route import Route
from sophia_galore.plan.rules import RULES
from sophia_galore.plan.verdicts import decide

_CPU = torch.device("cpu")
# A simulation does not depend on these keys, so one serves for all of their values.
_WITHOUT_EFFECT = (
    "memory.limit",
    "memory.reserve",
    "memory.placement",
    "memory.resident_layers",
    "memory.host_limit",
    "memory.prefetch",
    "engine.keep_layers",
    "training.gradient_checkpointing",
)
# Layers without activation checkpointing only save time and must not make a run fail, so this share of the memory is
# left free: more than any forecast error that was seen.
_MARGIN = 0.01
# Without memory.host_limit: the share of the host's memory that weights and states may take beside a GPU. The rest is
# for the system, Python and libraries.
_HOST_SHARE = 0.75


@dataclass(frozen=True)
class MemoryEstimate:
    """The forecast memory of a run, and the available memory.

    Args:
        forecast: The forecast.
        budget: The available memory; None without a limit.
        full_gradients: Which full gradients may be in memory together.
        streamed: What lives elsewhere than on the device.
        host_limit_bytes: What that may take of the host's memory; None: as much as it needs.
        input_bytes: Bytes of the layer inputs of the largest step that wait in host memory.
    """

    forecast: Forecast
    budget: Budget | None
    streamed: Streamed
    full_gradients: FullGradients = "layer"
    host_limit_bytes: int | None = None
    input_bytes: int = 0

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory."""
        return self.streamed.bytes_in("host") + self.input_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the run fits, on the device and on the host; None without a limit."""
        if self.budget is None:
            return None
        return self.budget.fits(self.forecast.peak_bytes) and not self.host_excess_bytes

    @property
    def host_excess_bytes(self) -> int:
        """Bytes beyond the limit of the host's memory."""
        limit = self.host_limit_bytes
        return 0 if limit is None else max(0, self.host_bytes - limit)

    def sentence(self) -> str:
        """Return the estimate as a sentence for the user."""
        there = "" if self.budget is None else f", of {bytes_in_words(self.budget.tensor_bytes)} that there are"
        return f"Expected: {bytes_in_words(self.forecast.peak_bytes)} of tensors at most{there}."

    def facts(self, routes: Sequence[Route]) -> MemoryFacts:
        """Return the estimate as facts for the rules.

        Args:
            routes: One for each parameter.
        """
        return MemoryFacts(
            self.forecast.peak_bytes,
            self.budget.limit_bytes if self.budget else None,
            self.budget.reserve_bytes if self.budget else 0,
            self.streamed.sentence(),
            self.host_excess_bytes,
            transfers_of(self.streamed, routes, 1, USUAL).disk_written_bytes,
            self.full_gradients,
        )


@dataclass(frozen=True)
class Planner:
    """Forecasts the memory of configurations of one model. Decisions and simulations are cached: many calls share them.

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
    _decided: dict[str, Decisions] = field(default_factory=dict, init=False)

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
        key = str(flatten(config))
        if key not in self._decided:
            self._decided[key] = decide_step(replace(self.facts, config=config))
        return self._decided[key]

    def estimate(self, config: RunConfig) -> MemoryEstimate | None:
        """Return the estimate of a configuration; None with bitsandbytes, whose memory is unknown.

        Raises:
            UserError: The configuration is refused.
        """
        if replace(self.facts, config=config).freezes_layers:
            return None
        config = self._settled(config)
        streamed = self.streamed(config)
        return MemoryEstimate(
            self.forecast(config, self.keep_layers(config, streamed), streamed),
            self.budget(config),
            streamed,
            self.full_gradients(config),
            self.host_limit_bytes(config),
            self.input_bytes(config),
        )

    def streamed(self, config: RunConfig) -> Streamed:
        """Return what lives elsewhere than on the device.

        Raises:
            UserError: The configuration is refused.
        """
        stays = config.memory.placement == "device" or self._shards_state(config)
        if stays or replace(self.facts, config=config).freezes_layers:
            return Streamed(self.parts)
        budget = self.budget(config) if config.memory.predict else None
        if budget is None and config.memory.placement == "auto":
            return Streamed(self.parts)
        config = self._settled(config)
        num_kept = self._num_kept(config)

        @cache
        def coming_and_going_bytes() -> int:
            """Return the bytes at the peak that do not stay, which are the same wherever weights live."""
            return self.forecast(config, num_kept).peak_bytes - self.standing_bytes(config, Streamed(self.parts))

        def fits(streamed: Streamed) -> bool:
            assert budget is not None
            standing = self.standing_bytes(config, streamed)
            # What stays may be too much already, which is known without a simulation.
            return budget.fits(standing) and budget.fits(standing + coming_and_going_bytes())

        return choose(
            self.decide(config),
            self.parts,
            fits=None if budget is None else fits,
            host_bytes=self._host_room_bytes(config),
            num_kept=num_kept,
        )

    def input_bytes(self, config: RunConfig) -> int:
        """Return the bytes of the layer inputs of the largest step that wait in host memory."""
        if config.memory.activations != "host":
            return 0
        # The first layer's input stays with the embedding.
        return self._bytes_of_inputs(config) * (self.num_layers - 1)

    def host_limit_bytes(self, config: RunConfig) -> int | None:
        """Return what weights and states may take of the host's memory; None: as much as they need."""
        asked = config.memory.host_limit
        if asked is not None:
            return asked
        if not self.facts.device.is_cpu:
            return int(_HOST_SHARE * psutil.virtual_memory().total)
        asks = config.memory.placement == "host" or config.memory.activations == "host"
        return None if asks or config.memory.placement == "disk" else 0

    def _host_room_bytes(self, config: RunConfig) -> int | None:
        """Return what is left of that for units; with placement auto on a CPU, nothing without memory.host_limit."""
        limit = self.host_limit_bytes(config)
        if self.facts.device.is_cpu and config.memory.host_limit is None and config.memory.placement == "auto":
            return 0
        return None if limit is None else max(0, limit - self.input_bytes(config))

    def forecast(self, config: RunConfig, keep_layers: int, streamed: Streamed | None = None) -> Forecast:
        """Return the forecast of a configuration.

        Args:
            config: The configuration; engine.full_gradients: auto counts as layer.
            keep_layers: Number of layers without activation checkpointing; overrides the configuration.
            streamed: What lives elsewhere than on the device; None: nothing. Overrides the configuration.

        Raises:
            UserError: The configuration is refused.
        """
        standing = self._standing(config, streamed or Streamed(self.parts))
        return self._trace(config, keep_layers).forecast(keep_layers, standing)

    def standing_bytes(self, config: RunConfig, streamed: Streamed) -> int:
        """Return the bytes that stay on the device for the whole run.

        Args:
            config: The configuration.
            streamed: What lives elsewhere.

        Raises:
            UserError: The configuration is refused.
        """
        return sum(self._standing(config, streamed).values())

    def budget(self, config: RunConfig) -> Budget | None:
        """Return the available memory; None without a limit."""
        return budget_of(config, self.facts.device)

    @property
    def parts(self) -> Parts:
        """The parts of the model that can stream."""
        return parts_of(self.facts.parameters, self.layer_names)

    def full_gradients(self, config: RunConfig) -> FullGradients:
        """Return which full gradients may be in memory together.

        Args:
            config: The configuration. For auto it is `matrix` if the forecast with `layer` does not fit and the
                optimizer needs no more of the full gradients than products; with placement auto, if it does not fit
                with all weights on the device.
        """
        asked = config.engine.full_gradients
        if asked != "auto":
            return asked
        budget = self.budget(config) if config.memory.predict and forms_apart(config) else None
        if budget is None or replace(self.facts, config=config).freezes_layers:
            return "layer"
        is_open = config.training.gradient_checkpointing and config.engine.keep_layers == "auto"
        together = self.forecast(config, 0 if is_open else self.keep_layers(config), self._least(config))
        return "layer" if budget.fits(together.peak_bytes) else "matrix"

    def keep_layers(self, config: RunConfig, streamed: Streamed | None = None) -> int:
        """Return how many layers run without activation checkpointing.

        Args:
            config: The configuration.
            streamed: What lives elsewhere than on the device; None: nothing.

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
        if streamed is not None and streamed.units:
            return 0  # the memory that is left keeps layers on the device
        return self.most_kept_layers(config, budget)

    def most_kept_layers(self, config: RunConfig, budget: Budget) -> int:
        """Return how many layers can run without activation checkpointing, with a margin; 0 also if nothing fits."""
        trace = self._trace(config, self._num_active_layers(config))
        return trace.most_kept_layers(int(budget.tensor_bytes * (1 - _MARGIN)))

    def _bytes_of_inputs(self, config: RunConfig) -> int:
        """Return the bytes of one layer's inputs over the largest step."""
        tokens = sum(batch.input_ids.numel() for batch in self.workload(config).train)
        width = int(self.model_config.hidden_size) * count_streams(self.model_config)
        return tokens * width * self.decide(config).compute_dtype.itemsize

    def _standing(self, config: RunConfig, streamed: Streamed) -> dict[Category, int]:
        """Return the bytes that stay on the device for the whole run, by category."""
        routes = self.decide(config).routes
        found = device_bytes(routes, streamed)
        if self._shards_state(config):
            found |= _largest_shard(routes, self.facts.num_processes)
        if config.memory.activations != "device":
            # Those of one layer are always on their way out or in.
            found["activations"] = self._bytes_of_inputs(config)
        return found

    def _shards_state(self, config: RunConfig) -> bool:
        return config.distributed.shard_state and self.facts.num_processes > 1

    def _settled(self, config: RunConfig) -> RunConfig:
        """Return a configuration in which engine.full_gradients is decided."""
        return changed(config, {"engine.full_gradients": self.full_gradients(config)})

    def _least(self, config: RunConfig) -> Streamed:
        """Return what streams if as little as can be stays on the device, but nothing with placement auto."""
        if config.memory.placement not in ("host", "disk"):
            return Streamed(self.parts)
        return choose(
            self.decide(config),
            self.parts,
            fits=lambda _: False,
            host_bytes=None,
            num_kept=self._num_kept(config),
        )

    def _num_kept(self, config: RunConfig) -> int:
        """Return how many layers keep their graphs for certain; those of keep_layers: auto come after all else."""
        if not config.training.gradient_checkpointing:
            return self._num_active_layers(config)
        asked = config.engine.keep_layers
        return 0 if asked == "auto" else min(asked, self._num_active_layers(config))

    def _num_active_layers(self, config: RunConfig) -> int:
        """Return the number of layers that have a backward."""
        if config.training.trainable is None:
            return self.num_layers
        return self.num_layers - num_idle_layers(self.decide(config), self.layer_names)

    def _trace(self, config: RunConfig, keep_layers: int) -> ModelTrace:
        values = {name: value for name, value in flatten(config).items() if name not in _WITHOUT_EFFECT}
        values["engine.full_gradients"] = values["engine.full_gradients"].replace("auto", "layer")
        key = f"{keep_layers > 0} {values}"
        if key not in self._traces or not self._traces[key].covers(keep_layers):
            with naming_unpredictable(self.model_config.model_type):
                self._traces[key] = trace_model(
                    self.decide(config),
                    self.model_config,
                    self.layer_names,
                    self.workload(config),
                    num_steps=self.num_steps(config),
                    keep_layers=keep_layers,
                )
        return self._traces[key]


def _largest_shard(routes: Sequence[Route], num_processes: int) -> dict[Category, int]:
    """Return the bytes of the states in the process that has most of them, by category."""
    owners = owners_of((route.spec for route in routes if route.spec), num_processes)
    shards = [[route for route in routes if owners.get(route.name) == rank] for rank in range(num_processes)]
    most = max(shards, key=lambda shard: sum(route.state_bytes + route.projection_bytes for route in shard))
    return {
        "optimizer state": sum(route.state_bytes for route in most),
        "projections": sum(route.projection_bytes for route in most),
    }


def find_planner(config: RunConfig, say: Callable[[str], None], *, reads_data: bool, num_processes: int = 1) -> Planner:
    """Make a planner without a run: only the model's configuration is downloaded, and no GPU is needed.

    Args:
        config: The configuration; `training.device` may name a GPU that this machine does not have.
        say: Takes lines for the user.
        reads_data: Whether to forecast for the longest training examples, if data and tokenizer are on this machine;
            else for examples of `training.max_length`.
        num_processes: Processes that share an effective batch; the plan is for one of them.

    Raises:
        UserError: The model is unknown, or the run is refused.
    """
    check(config)
    facts = Facts(config, device=planned_device(config.training.device), num_processes=num_processes)
    if facts.freezes_layers:
        facts = replace(facts, bitsandbytes=detect_bitsandbytes(_CPU))
    decide(RULES, facts)

    shape = find_shape(config.model, say)
    model = model_facts(shape.config, name=shape.name)
    trust = config.model.trust_remote_code
    architecture = build_skeleton(shape.config, _CPU, trust_remote_code=trust)
    facts = replace(facts, model=model, parameters=parameter_facts(architecture))
    vocab_size = architecture.embed.num_embeddings

    def workload(asked: RunConfig) -> Workload:
        return largest_workload(asked, vocab_size, num_processes)

    if reads_data and shape.folder is not None and all(is_here(source.path) for source in config.data.train_sources):
        tokenizer = load_tokenizer(shape.folder, trust_remote_code=trust)
        pad_id = pad_token(tokenizer)

        @cache  # many configurations share the same data
        def read(data: DataConfig, max_length: int, seed: int) -> Dataset:
            cache_dir = Path(config.model.cache_dir)
            return load_data(data, max_length=max_length, seed=seed, tokenizer=tokenizer, cache_dir=cache_dir)

        def workload(asked: RunConfig) -> Workload:
            dataset = read(asked.data, asked.training.max_length, asked.training.seed)
            return workload_of_data(asked, dataset, count_steps(asked, dataset)[1], pad_id, num_processes)

    return Planner(facts, shape.config, architecture.layer_names, workload, _asked_steps, shape.source)


def _asked_steps(config: RunConfig) -> int:
    """Return the steps of a run without known data: `training.max_steps`, or enough to include every refresh."""
    return config.training.max_steps or 10**9
