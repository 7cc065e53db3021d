"""Decisions about the optimizer step that need no data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from sophia_galore.engine.cross_entropy import default_chunk_bytes
from sophia_galore.engine.observe import Category
from sophia_galore.engine.stepper import ClipBy
from sophia_galore.model.architecture import count_idle_layers
from sophia_galore.plan.facts import Facts, RouteFacts
from sophia_galore.plan.route import Route
from sophia_galore.plan.routes import route_all
from sophia_galore.plan.rules import RULES, compute_dtype
from sophia_galore.plan.verdicts import Decided, decide, settled


@dataclass(frozen=True)
class Decisions:
    """Decisions about the optimizer step, whatever the data are.

    Args:
        facts: The facts on which they are based.
        routes: One a parameter.
        compute_dtype: Precision of the arithmetic.
        clip_by: What gradients are clipped by.
        curvature_every: Steps between two curvature estimates; 0 if no rule needs them.
        verdicts: The rules of `rules.py` that apply.
    """

    facts: Facts
    routes: tuple[Route, ...]
    compute_dtype: torch.dtype
    clip_by: ClipBy
    curvature_every: int
    verdicts: tuple[Decided, ...]


def decide_step(facts: Facts) -> Decisions:
    """Make the decisions that need no data.

    Args:
        facts: Configuration, machine, model and parameters; of the data, what is known.

    Raises:
        UserError: The run is refused; the error names all reasons.
    """
    routes = route_all(facts)
    facts = replace(facts, routes=_sum_up(routes))
    verdicts = decide(RULES, facts)
    clip_by = settled(RULES, "clip_by", facts)
    needs_curvature = any(route.spec and route.spec.rule == "sophia" for route in routes)
    return Decisions(
        facts=facts,
        routes=routes,
        compute_dtype=compute_dtype(facts),
        clip_by="model" if clip_by == "model" else "layer" if clip_by == "layer" else "nothing",
        curvature_every=facts.config.optimizer.sophia.curvature_every if needs_curvature else 0,
        verdicts=verdicts,
    )


def logits_chunk_bytes(facts: Facts) -> int:
    """Return the size of the float32 logits that are computed at once, in bytes: as asked, or as suits the device."""
    return facts.config.memory.logits_chunk_mib * 2**20 or default_chunk_bytes(torch.device(facts.device.place))


def standing_bytes(routes: Iterable[Route]) -> dict[Category, int]:
    """Return the bytes of weights and optimizer states, by category, wherever they live.

    Args:
        routes: One a parameter.
    """
    routes = tuple(routes)
    return {
        "weights": sum(route.weight_bytes for route in routes),
        "optimizer state": sum(route.state_bytes for route in routes),
        "projections": sum(route.projection_bytes for route in routes),
    }


def _sum_up(routes: tuple[Route, ...]) -> RouteFacts:
    """Return the facts about all routes together that rules use."""
    # Frozen parameters have no gradient.
    specs = [route.spec for route in routes if route.spec]
    num_trained = sum(math.prod(spec.shape) for spec in specs)
    subspaces = [spec.subspace for spec in specs if spec.subspace]
    return RouteFacts(
        # If nothing is trained, a rule refuses the run.
        kept_share=sum(math.prod(spec.held_shape) for spec in specs) / max(1, num_trained),
        num_projected=len(subspaces),
        num_fast=sum(subspace.fast for subspace in subspaces),
        num_folded=sum(subspace.folds_late for subspace in subspaces),
    )


def num_idle_layers(decided: Decisions, layer_names: Sequence[str]) -> int:
    """Return how many of the first layers need no backward pass: nothing in or before them is trained.

    Args:
        decided: The decisions about the step.
        layer_names: The layers, as prefixes of their parameters' names without the final dot.
    """
    trained = [route.name for route in decided.routes if route.trained]
    entry = [param.name for param in decided.facts.parameters if param.part in ("embed", "entry")]
    return count_idle_layers(layer_names, entry, trained)
