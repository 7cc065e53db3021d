"""What tests of the planner share: planners of models without a folder, and configurations from dotted keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sophia_galore.config.dump import changed
from sophia_galore.config.schema import RunConfig
from sophia_galore.memory.planner import Planner
from sophia_galore.memory.workload import Workload, largest_workload
from sophia_galore.model.skeleton import build_skeleton
from sophia_galore.plan.detect import model_facts, parameter_facts
from sophia_galore.plan.facts import DeviceFacts, Facts
from tiny import VOCAB, tiny_config

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {
    "optimizer.galore.rank": 8,
    "optimizer.apollo.rank": 8,
    "optimizer.galore.update_proj_gap": 3,
    "training.max_length": 16,
    "training.gradient_accumulation_steps": 2,
}
"""Settings that suit a tiny model."""


def asked(values: dict[str, Any] | None = None) -> RunConfig:
    """A configuration for a tiny model, with some keys set."""
    return changed(RunConfig(), {**SMALL, **(values or {})})


def planner_of(
    model_config: Any,
    *,
    workload: Callable[[RunConfig], Workload] | None = None,
    num_steps: int = 10,
    device: DeviceFacts | None = None,
) -> Planner:
    """A planner for a model that is nowhere on disk."""
    architecture = build_skeleton(model_config, CPU)
    facts = Facts(
        RunConfig(),
        device=device or DeviceFacts(),
        model=model_facts(model_config),
        parameters=parameter_facts(architecture),
    )
    return Planner(
        facts,
        model_config,
        architecture.layer_names,
        workload or (lambda config: largest_workload(config, VOCAB)),
        lambda config: config.training.max_steps or num_steps,
        "a test",
    )


def tiny_planner(family: str = "llama", *, tied: bool = True, num_layers: int = 3, **more: Any) -> Planner:
    """A planner for a tiny model."""
    types = ["sliding_attention", "full_attention"] * num_layers
    layers = {"layer_types": types[:num_layers]} if family.startswith("gemma") else {}
    return planner_of(tiny_config(family, tied=tied, num_hidden_layers=num_layers, **layers), **more)
