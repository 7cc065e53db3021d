"""The engine and the optimizer themselves, run on fake tensors and on a model of few layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from sophia_galore.data.batches import MicroBatch
from sophia_galore.data.portion import whole
from sophia_galore.distributed.processes import Pending, in_buffers
from sophia_galore.distributed.reducer import ProcessReducer
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.probe import take_probe
from sophia_galore.engine.stepper import Stepper
from sophia_galore.memory.composition import PassTrace, split_passes, subtract
from sophia_galore.memory.fake_tensors import FakeTensors
from sophia_galore.memory.timeline import Recorder, Sizes
from sophia_galore.memory.tracker import state_category
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.few_experts import with_experts
from sophia_galore.model.few_layers import with_layers
from sophia_galore.model.skeleton import build_skeleton
from sophia_galore.numerics.row_blocks import two_blocks_of_each
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.plan.decisions import Decisions, logits_chunk_bytes
from sophia_galore.plan.route import Route, by_layer, frozen_names
from sophia_galore.plan.routes import empty_weight, int8_format
from sophia_galore.streaming.spill import Spill
from sophia_galore.weights.int8 import Int8Format
from sophia_galore.weights.store import WeightStore

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class FewLayers:
    """A model that has some layers of another one.

    Args:
        architecture: Its parts, parameters on the meta device.
        routes: How its parameters are trained: as in the whole model, under their names here.
    """

    architecture: Architecture
    routes: tuple[Route, ...]


@dataclass(frozen=True)
class Simulated:
    """What was seen.

    Args:
        steps: For each step that was asked for, its passes through the model.
        evaluation: Bytes by category that an evaluation takes in addition; None if none was asked for.
    """

    steps: tuple[tuple[PassTrace, ...], ...]
    evaluation: Sizes | None


# Beside the experts that most tokens go to, so many have one token each: the first ones differ from those that follow.
_FEWER_EXPERTS, _MORE_EXPERTS = 3, 6


@dataclass(frozen=True)
class ExpertCount:
    """How many experts of each layer are simulated.

    Args:
        whole: How many there are.
        taken: How many are simulated; the first ones.
    """

    whole: int
    taken: int


def expert_counts(architecture: Architecture) -> tuple[ExpertCount, ExpertCount] | None:
    """Return two numbers of experts, from which the memory of all of them is extrapolated.

    Args:
        architecture: The model with some of its layers.

    Returns:
        Fewer and more of them; None if all are to be simulated, since they are few or differ by layer.
    """
    counts = {len(weights) for weights in architecture.expert_tensors.values()}
    chosen = {router.num_chosen for router in architecture.routers if router is not None}
    if len(counts) != 1 or len(chosen) != 1:
        return None
    (whole,), (num_chosen,) = counts, chosen
    fewer, more = (ExpertCount(whole, num_chosen + number) for number in (_FEWER_EXPERTS, _MORE_EXPERTS))
    return (fewer, more) if fewer.taken + more.taken < whole else None


def take_layers(
    model_config: Any,
    routes: Sequence[Route],
    names: Sequence[str],
    chosen: Sequence[int],
    experts: ExpertCount | None = None,
) -> FewLayers | None:
    """A model of the same architecture with some of the layers, and perhaps with some of their experts.

    Args:
        model_config: The whole model's Hugging Face configuration.
        routes: The whole model's routes.
        names: The whole model's layers, as prefixes of their parameters' names without the final dot.
        chosen: Which of the layers, by number; one may come twice.
        experts: How many experts of each layer to take; None: all of them.

    Returns:
        The model; None if its layers depend on their numbers, so that those of a smaller model are others, or if more
        depends on the number of experts than the size of the router.
    """
    config = with_layers(model_config, chosen)
    if experts is not None:
        config = with_experts(config, experts.whole, experts.taken)
    architecture = build_skeleton(config, _CPU)
    of_layer, around = by_layer(routes, names)
    inside = [
        _renamed(route, here + route.name.removeprefix(names[index]))
        for index, here in zip(chosen, architecture.layer_names, strict=True)
        for route in of_layer[names[index]]
    ]
    by_name = {route.name: route for route in (*around, *inside)}
    shapes = architecture.parameter_shapes()
    if experts is not None:
        by_name = _of_fewer(by_name, shapes, experts)
    if by_name.keys() != shapes.keys() or any(route.shape != shapes[name] for name, route in by_name.items()):
        return None
    # In the order of the model, in which a store goes through its weights.
    return FewLayers(architecture, tuple(by_name[name] for name in shapes))


def _of_fewer(routes: Mapping[str, Route], shapes: Mapping[str, torch.Size], experts: ExpertCount) -> dict[str, Route]:
    """Return the routes of a model with fewer experts: without those of the others, and with smaller routers.

    All experts get new bases at the same steps, so that what they need is linear in their number.
    """
    left: dict[str, Route] = {}
    for name, route in routes.items():
        number = name.rpartition(".")[2]
        if name not in shapes and number.isdecimal() and int(number) >= experts.taken:
            continue
        if route.spec and route.spec.rests and route.spec.subspace:
            subspace = replace(route.spec.subspace, offset=0)
            route = replace(route, spec=replace(route.spec, subspace=subspace))
        shape = tuple(shapes.get(name, route.shape))
        if shape != route.shape and shape == tuple(
            experts.taken if size == experts.whole else size for size in route.shape
        ):
            spec = replace(route.spec, shape=shape) if route.spec else None
            share = experts.taken / experts.whole
            route = replace(route, shape=shape, spec=spec, weight_bytes=round(share * route.weight_bytes))
        left[name] = route
    return left


def _renamed(route: Route, name: str) -> Route:
    return replace(route, name=name, spec=replace(route.spec, name=name) if route.spec else None)


def simulate(
    model: FewLayers,
    decided: Decisions,
    batches: Sequence[MicroBatch],
    steps: Sequence[int],
    *,
    eval_batches: Sequence[MicroBatch] = (),
    keep_layers: int = 0,
    probes: bool = False,
) -> Simulated:
    """Run the engine and the optimizer on fake tensors, and record what each phase would have needed.

    Args:
        model: The model.
        decided: What is done in a step.
        batches: The micro-batches of each step; their integers are real.
        steps: Numbers of the steps.
        eval_batches: What is evaluated at once; empty: nothing is.
        keep_layers: So many of the model's last layers run without activation checkpointing.
        probes: Whether to take a probe step in place of each step.
    """
    config = decided.facts.config
    tracker = FakeTensors(_CPU)
    recorder = Recorder(tracker)
    with two_blocks_of_each(), tracker:
        store = _empty_store(model.routes, int8_format(config.quantization))
        specs = [route.spec for route in model.routes if route.spec]
        optimizer = ParamOptimizer(specs, seed=config.training.seed, device=_CPU)
        for weight in store.tensors().values():
            tracker.tag(weight, "weights")
        for name, state in optimizer.states.named().items():
            tracker.tag(state, state_category(name))
        reducer = None
        if decided.facts.num_processes > 1:
            reducer = ProcessReducer(_NothingIsSent(), overlaps=config.distributed.overlap)
        engine = LayerwiseEngine(
            model.architecture,
            store,
            compute_dtype=decided.compute_dtype,
            device=_CPU,
            seed=config.training.seed,
            observer=recorder,
            logits_chunk_bytes=logits_chunk_bytes(decided.facts),
            keep_layers=keep_layers,
            on_oom=config.memory.on_oom,
            frozen=frozen_names(model.routes),
            neftune_alpha=config.training.neftune_alpha or 0.0,
            spill=_ShapesOnly() if config.memory.activations != "device" else None,
            full_gradients="matrix" if config.engine.full_gradients == "matrix" else "layer",
            reducer=reducer,
            counts_routing=False,
        )
        stepper = Stepper(
            engine,
            optimizer,
            store,
            clip_by=decided.clip_by,
            curvature_every=decided.curvature_every,
            max_grad_norm=config.training.max_grad_norm,
        )
        evaluation = None
        if eval_batches:
            engine.evaluate(eval_batches)
            (segment,) = recorder.take()
            evaluation = subtract(segment.peak, segment.entry)
        own = [_copy(batch) for batch in batches]
        passes: list[tuple[PassTrace, ...]] = []
        held = {spec.name: spec.held_shape for spec in specs} if decided.clip_by == "model" else {}
        for step in steps:
            if probes:
                take_probe(
                    engine,
                    whole(own),
                    step=step,
                    optimizer=optimizer,
                    trained=(),
                    held_shapes=held,
                    max_length=0,
                    stopped=lambda: False,
                )
            else:
                stepper.take(whole(own), step=step, factor=1.0)
            passes.append(split_passes(recorder.take(), len(model.architecture.layers)))
    return Simulated(tuple(passes), evaluation)


class _NothingIsSent:
    """Has the buffers in which gradients would be sent to other processes."""

    def start_sum(self, tensors: Sequence[torch.Tensor]) -> Pending:
        return Pending([], in_buffers(tensors)[1])

    def sums(self, values: Sequence[float]) -> list[float]:
        return list(values)


class _ShapesOnly(Spill):
    """Keeps only shapes: layer inputs leave at once, and come back when they are needed.

    In a run there is one more list of them on the device, on its way out or in. `Planner` adds it to what stays, since
    a model of few layers has none between its first and its last layer.
    """

    def __init__(self) -> None:
        self._shapes: dict[int, list[tuple[torch.Size, torch.dtype]]] = {}

    def put(self, number: int, tensors: Sequence[torch.Tensor]) -> None:
        self._shapes[number] = [(tensor.shape, tensor.dtype) for tensor in tensors]

    def fetch(self, number: int) -> None:
        """Wait until it is taken."""

    def take(self, number: int) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype) for shape, dtype in self._shapes.pop(number)]


def _copy(batch: MicroBatch) -> MicroBatch:
    """Tensors of its own, which are counted."""
    mask = batch.attention_mask
    return replace(
        batch,
        input_ids=batch.input_ids.clone(),
        labels=batch.labels.clone(),
        attention_mask=None if mask is None else mask.clone(),
    )


def _empty_store(routes: Sequence[Route], form: Int8Format) -> WeightStore:
    return WeightStore({route.name: empty_weight(route, form, _CPU) for route in routes})
