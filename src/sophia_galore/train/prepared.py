"""A run before its first step: without weights, and with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sophia_galore.config import RunConfig
from sophia_galore.data.dataset import Dataset
from sophia_galore.data.feed import Feed
from sophia_galore.distributed.processes import Processes
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.stepper import Stepper
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.memory.planner import MemoryEstimate, Planner
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.folder_layout import FolderLayout
from sophia_galore.model.source_files import SourceFiles
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.plan.placements import Streamed
from sophia_galore.plan.plan import RunPlan
from sophia_galore.streaming.streams import Streams
from sophia_galore.train.checkpoint import Checkpoint
from sophia_galore.train.signals import StopRequest
from sophia_galore.weights.store import WeightStore


@dataclass(frozen=True)
class Prepared:
    """A run before any weight is loaded.

    Args:
        config: The run's configuration.
        plan: The plan.
        checkpoint: The checkpoint to resume from, or None.
        folder: The folder of weights and tokenizer: the model's, or a checkpoint.
        model_config: The model's Hugging Face configuration.
        tokenizer: Its tokenizer.
        architecture: Its parts, on the meta device.
        generation_config: Its generation settings, or None.
        source: Its files beside the weights.
        layout: What the tensors of its folder are in it.
        dataset: The tokenised data.
        device: The device of the arithmetic.
        compute_dtype: The precision of the arithmetic.
        planner: Predicts the memory of this and other configurations.
        estimate: The predicted memory; None without memory.predict.
        streamed: What lives elsewhere than on the device.
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
    layout: FolderLayout
    dataset: Dataset
    device: torch.device
    compute_dtype: torch.dtype
    planner: Planner
    estimate: MemoryEstimate | None
    streamed: Streamed

    @property
    def stop_ids(self) -> list[int] | None:
        """The tokens that end an answer of the trained model; None: those of the base model."""
        return list(self.generation_config.eos_token_id) if self.plan.chat_format.end_ids else None


@dataclass(frozen=True)
class Loaded:
    """A run with weights, before its first step.

    Args:
        prepared: The prepared run.
        streams: Lends what lives elsewhere than on the device; None: nothing does.
        store: The weights.
        optimizer: The optimizer with its state.
        engine: Computes gradients.
        stepper: Takes steps.
        feed: The training batches.
        eval_feed: The evaluation batches.
        monitor: Measures memory.
        stop: Whether the user asked the run to stop.
        processes: The processes of the run.
    """

    prepared: Prepared
    streams: Streams | None
    store: WeightStore
    optimizer: ParamOptimizer
    engine: LayerwiseEngine
    stepper: Stepper
    feed: Feed
    eval_feed: Feed
    monitor: MemoryMonitor
    stop: StopRequest
    processes: Processes
