"""What carries a run from what was asked to its steps: first without weights, then with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sophia_galore.config import RunConfig
from sophia_galore.data.dataset import Dataset
from sophia_galore.data.feed import Feed
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.stepper import Stepper
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.memory.planner import MemoryEstimate, Planner
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.source_files import SourceFiles
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.plan.plan import RunPlan
from sophia_galore.train.checkpoint import Checkpoint
from sophia_galore.train.signals import StopRequest
from sophia_galore.weights.store import WeightStore


@dataclass(frozen=True)
class Prepared:
    """A run before any weight is loaded.

    Args:
        config: What was asked.
        plan: What will be done.
        checkpoint: Where the run goes on from, if it does.
        folder: The folder that weights and tokenizer are read from: the model's, or a checkpoint.
        model_config: The model's Hugging Face configuration.
        tokenizer: Its tokenizer.
        architecture: Its parts, on the meta device.
        generation_config: Its generation settings, or None.
        source: Its files beside the weights.
        dataset: The tokenised data.
        device: Where the arithmetic runs.
        compute_dtype: Its precision.
        planner: Knows what this and other configurations need.
        estimate: What the run is expected to need; None: that was not asked for.
    """

    config: RunConfig
    plan: RunPlan
    checkpoint: Checkpoint | None
    folder: Path
    model_config: Any
    tokenizer: Any
    architecture: Architecture
    generation_config: Any
    source: SourceFiles
    dataset: Dataset
    device: torch.device
    compute_dtype: torch.dtype
    planner: Planner
    estimate: MemoryEstimate | None

    @property
    def stop_ids(self) -> list[int] | None:
        """The tokens at which the trained model's answers end; None: those of its source."""
        return list(self.generation_config.eos_token_id) if self.plan.chat_format.end_ids else None


@dataclass(frozen=True)
class Loaded:
    """A run before its first step: what was prepared, and its live parts.

    Args:
        prepared: What will be done.
        store: The weights.
        optimizer: The optimizer with its state.
        engine: Finds gradients.
        stepper: Takes steps.
        feed: The training examples on their way to the steps.
        eval_feed: The evaluation examples.
        monitor: Watches the engine's memory.
        stop: Whether the user asked the run to stop.
    """

    prepared: Prepared
    store: WeightStore
    optimizer: ParamOptimizer
    engine: LayerwiseEngine
    stepper: Stepper
    feed: Feed
    eval_feed: Feed
    monitor: MemoryMonitor
    stop: StopRequest
