"""Our engine over a tiny model folder."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sophia_galore.data.batches import MicroBatch
from sophia_galore.data.portion import whole
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.engine.objective import CrossEntropy, Objective, SampledCrossEntropy
from sophia_galore.engine.step_results import StepResult
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.experts import run_one_by_one, separate_experts
from sophia_galore.model.find_parts import find_architecture
from sophia_galore.model.skeleton import build_skeleton, load_model_config
from sophia_galore.numerics.subspace import Projector, projection_side, tensor_of
from sophia_galore.optim.request import Wants, whole_gradients
from sophia_galore.weights.bitsandbytes import Freezer
from sophia_galore.weights.files import convert, load_store
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.saved import read_weights
from sophia_galore.weights.store import WeightStore

CPU = torch.device("cpu")


def load_parts(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Architecture, WeightStore]:
    """Skeleton and store of a model folder."""
    architecture = build_skeleton(load_model_config(folder), CPU)
    tied_head = "lm_head.weight" if architecture.tied else None
    store = load_store(folder, architecture.parameter_shapes(), tied_head=tied_head, dtype=dtype, device=CPU)
    return architecture, store


def parts_of(model: Any) -> tuple[Architecture, WeightStore]:
    """Architecture and store of a copy of a model, as it is in memory."""
    model = copy.deepcopy(model).train()
    model.zero_grad(set_to_none=True)
    run_one_by_one(model.config)
    separate_experts(model)
    weights = {name: PlainWeight(parameter.detach()) for name, parameter in model.named_parameters()}
    return find_architecture(model), WeightStore(weights)


def fixed(architecture: Architecture) -> frozenset[str]:
    """The parameters that a model itself lets have no gradient."""
    return frozenset(name for name, each in architecture.model.named_parameters() if not each.requires_grad)


def gradients_of(model: Any) -> dict[str, Tensor]:
    """What autograd left for the parameters of a model."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def by_expert(architecture: Architecture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names of transformers, with those of experts apart."""
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        slices = tensor.unbind() if name in architecture.expert_tensors else None
        apart |= {name: tensor} if slices is None else {f"{name}.{place}": each for place, each in enumerate(slices)}
    return apart


def open_store(folder: Path, device: torch.device) -> WeightStore:
    """Read a model folder into a store, each weight in its stored format; bitsandbytes is not needed."""
    return WeightStore({name: convert(weight, None, device) for _, name, weight in read_weights(folder)})


def load_frozen_parts(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Architecture, WeightStore, list[str]]:
    """Skeleton and store of a model folder, the layers' linears in bitsandbytes; and the names of these."""
    architecture = build_skeleton(load_model_config(folder), CPU)
    names = architecture.linear_names()
    tied_head = "lm_head.weight" if architecture.tied else None
    freezer = Freezer(architecture.model, names, names, CPU)
    shapes = architecture.parameter_shapes()
    store = load_store(folder, shapes, tied_head=tied_head, dtype=dtype, device=CPU, frozen=freezer)
    return architecture, store, names


def make_engine(
    architecture: Architecture,
    store: WeightStore,
    *,
    compute_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **more: Any,
) -> LayerwiseEngine:
    """An engine on the CPU."""
    return LayerwiseEngine(architecture, store, compute_dtype=compute_dtype, device=CPU, seed=seed, **more)


def take_step(
    engine: LayerwiseEngine,
    batches: Sequence[MicroBatch],
    apply: Callable[[dict[str, Tensor]], object],
    *,
    step: int,
    wants: Wants = whole_gradients,
    sampled: bool = False,
    objective: Objective | None = None,
) -> StepResult:
    """Forward and backward; `apply` gets the tensors of each layer's finished gradients."""
    objective = objective or (SampledCrossEntropy() if sampled else CrossEntropy())
    forward = engine.forward(whole(batches), step=step, wants=wants, objective=objective)
    result = forward.result
    with closing(engine.backward(forward)) as layers:
        del forward
        for layer in layers:
            with engine.using(layer) as gradients:
                tensors = {name: tensor_of(gradients.pop(name)) for name in list(gradients)}
                if tensors:
                    apply(tensors)
                del tensors
    return result


def everything_projected(architecture: Architecture) -> dict[str, Projector]:
    """A random A with columns of about unit length for each matrix."""
    draw = torch.Generator().manual_seed(1)
    made: dict[str, Projector] = {}
    for name, shape in architecture.parameter_shapes().items():
        if len(shape) == 2:
            side = projection_side(shape)
            length = shape[1] if side == "right" else shape[0]
            made[name] = Projector(torch.randn(length, 8, generator=draw) / length**0.5, side)
    return made
