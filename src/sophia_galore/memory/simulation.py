"""The real engine and the real optimizer, run without memory on a model of few layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sophia_galore.config import RunConfig
from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.probe import take_probe
from sophia_galore.engine.stepper import ClipBy, Stepper
from sophia_galore.memory.composition import PassTrace, minus, parse_passes
from sophia_galore.memory.fake_tensors import ShadowTracker
from sophia_galore.memory.timeline import Recorder, Segment, Sizes
from sophia_galore.model.anatomy import Anatomy
from sophia_galore.model.skeleton import build_skeleton
from sophia_galore.model.store import DTYPES, WeightStore
from sophia_galore.numerics.int8 import Int8Format, Int8Tensor, Stored
from sophia_galore.optim.move import two_blocks_of_each
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.plan.route import Route, frozen_names
from sophia_galore.plan.routes import int8_format

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class FewLayers:
    """A model with some of another one's layers.

    Args:
        anatomy: Its parts, parameters on the meta device.
        routes: What happens to its parameters: as in the whole model, under the names that they have here.
    """

    anatomy: Anatomy
    routes: tuple[Route, ...]


@dataclass(frozen=True)
class Settings:
    """What a step depends on beside the model and the batches.

    Args:
        config: What was asked.
        compute_dtype: Precision of the arithmetic.
        logits_chunk_bytes: Bytes of float32 logits that are worked on at once.
        clip_by: What gradients are clipped by.
        curvature_every: Steps between two estimates of the curvature; 0: none.
    """

    config: RunConfig
    compute_dtype: torch.dtype
    logits_chunk_bytes: int
    clip_by: ClipBy
    curvature_every: int


@dataclass(frozen=True)
class Simulated:
    """What was seen.

    Args:
        steps: For each step that was asked for, its passes.
        batches: Bytes by category of the micro-batches themselves.
        evaluation: Bytes by category that an evaluation takes beside what stands; None: none was asked for.
    """

    steps: tuple[tuple[PassTrace, ...], ...]
    batches: Sizes
    evaluation: Sizes | None


def take_layers(model_config: Any, routes: Sequence[Route], names: Sequence[str], chosen: Sequence[int]) -> FewLayers:
    """A model of the same architecture with some of the layers.

    Args:
        model_config: The whole model's Hugging Face configuration.
        routes: The whole model's routes.
        names: The whole model's layers, as prefixes of their parameters' names without the final dot.
        chosen: Which of the layers, by number; one may come twice.
    """
    config = copy.deepcopy(model_config)
    config.num_hidden_layers = len(chosen)
    types = getattr(config, "layer_types", None)
    if types:
        config.layer_types = [types[index] for index in chosen]
    anatomy = build_skeleton(config, _CPU)
    of_layer: dict[str, list[Route]] = {name: [] for name in names}
    around: list[Route] = []
    for route in routes:
        layer = next((name for name in names if route.name.startswith(f"{name}.")), None)
        (around if layer is None else of_layer[layer]).append(route)
    inside = [
        _renamed(route, here + route.name.removeprefix(names[index]))
        for index, here in zip(chosen, anatomy.layer_names, strict=True)
        for route in of_layer[names[index]]
    ]
    by_name = {route.name: route for route in (*around, *inside)}
    # In the model's order, in which a store goes through its weights.
    return FewLayers(anatomy, tuple(by_name[name] for name in anatomy.parameter_shapes()))


def _renamed(route: Route, name: str) -> Route:
    return replace(route, name=name, spec=replace(route.spec, name=name) if route.spec else None)


def simulate(
    model: FewLayers,
    settings: Settings,
    batches: Sequence[MicroBatch],
    steps: Sequence[int],
    *,
    eval_batches: Sequence[MicroBatch] = (),
    keep_layers: int = 0,
    probes: bool = False,
) -> Simulated:
    """Take steps without memory, and write down what each phase would have needed.

    Args:
        model: The model.
        settings: What else a step depends on.
        batches: The micro-batches of each step; their integers are real.
        steps: Numbers of the steps.
        eval_batches: What is evaluated at once; empty: nothing is.
        keep_layers: So many of the model's last layers keep their graphs.
        probes: Whether to take a probe step in place of each step.
    """
    config = settings.config
    tracker = ShadowTracker(_CPU)
    recorder = Recorder(tracker)
    num_layers = len(model.anatomy.layers)
    with two_blocks_of_each(), tracker:
        store = _empty_store(model.routes, int8_format(config.quantization))
        specs = [route.spec for route in model.routes if route.spec]
        optimizer = ParamOptimizer(specs, seed=config.training.seed, device=_CPU)
        for weight in store.tensors().values():
            tracker.tag(weight, "weights")
        for name, state in optimizer.named_state().items():
            tracker.tag(state, "projections" if "/basis" in name else "optimizer state")
        engine = LayerwiseEngine(
            model.anatomy,
            store,
            compute_dtype=settings.compute_dtype,
            device=_CPU,
            seed=config.training.seed,
            observer=recorder,
            logits_chunk_bytes=settings.logits_chunk_bytes,
            keep_layers=keep_layers,
            on_oom=config.memory.on_oom,
            frozen=frozen_names(model.routes),
            neftune_alpha=config.training.neftune_alpha or 0.0,
        )
        stepper = Stepper(
            engine,
            optimizer,
            store,
            clip_by=settings.clip_by,
            curvature_every=settings.curvature_every,
            max_grad_norm=config.training.max_grad_norm,
        )
        evaluation = None
        if eval_batches:
            engine.evaluate(eval_batches)
            evaluation = _difference(recorder.take())
        standing = Sizes(tracker.by_category)
        own = [_copy(batch) for batch in batches]
        of_batches = minus(tracker.by_category, standing)
        passes: list[tuple[PassTrace, ...]] = []
        held = {spec.name: spec.held_shape for spec in specs} if settings.clip_by == "model" else {}
        for step in steps:
            if probes:
                take_probe(
                    engine,
                    own,
                    step=step,
                    optimizer=optimizer,
                    trained=(),
                    held_shapes=held,
                    max_length=0,
                    stopped=lambda: False,
                )
            else:
                stepper.take(own, step=step, factor=1.0)
            passes.append(parse_passes(recorder.take(), num_layers))
    return Simulated(tuple(passes), of_batches, evaluation)


def _copy(batch: MicroBatch) -> MicroBatch:
    mask = batch.attention_mask
    return replace(
        batch,
        input_ids=batch.input_ids.clone(),
        labels=batch.labels.clone(),
        attention_mask=None if mask is None else mask.clone(),
    )


def _difference(segments: Sequence[Segment]) -> Sizes:
    (segment,) = segments
    return minus(segment.peak, segment.entry)


def _empty_store(routes: Sequence[Route], form: Int8Format) -> WeightStore:
    weights: dict[str, Stored] = {}
    for route in routes:
        if route.format == "int8":
            rows, columns = route.shape
            codes = torch.empty(rows, columns, dtype=torch.int8)
            scales = torch.empty(rows, form.num_scales(columns), dtype=torch.bfloat16)
            weights[route.name] = Int8Tensor(codes, scales, form)
        else:
            weights[route.name] = torch.empty(route.shape, dtype=DTYPES[route.format])
    return WeightStore(weights)
