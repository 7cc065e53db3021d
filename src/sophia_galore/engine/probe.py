"""The probe step: forward and backward on the largest possible batch, which shows whether a step fits into memory.

Gradients are formed as in a first step: full ones, even if later steps form products only, and products where a first
step needs no more. Each gradient is checked and dropped. If a step keeps gradients until their norm is known, tensors
of the same size are kept here. The optimizer's temporary tensors are not allocated: in a step, they exist after the
layer's activations were freed.

Weights, optimizer states and random generators do not change, so a run has the same bits with and without a probe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from sophia_galore.data.batches import MicroBatch
from sophia_galore.data.portion import Portion
from sophia_galore.engine.layerwise import LayerwiseEngine
from sophia_galore.errors import NonFiniteError, OutOfMemory, RunError, lacks_memory, short
from sophia_galore.numerics.bases import random_basis, tracked_basis
from sophia_galore.numerics.random import generator
from sophia_galore.numerics.subspace import Grad, ProjectedGradient, Projector, norm_of, projection_side, tensor_of
from sophia_galore.optim.limits import LARGEST_GRAD, is_usable
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.request import FromGradient

WHAT_HELPS = (
    "Lower training.max_length or training.batch_size, or use quantization.enabled=true or "
    "optimizer.state_bits=8; where graphs are kept, keep fewer of them (engine.keep_layers)."
)
"""Remedy for too little memory."""

_PRECISION = "Compute in fp32 (training.compute_dtype=fp32); if it is that already, the model's weights are broken."


def take_probe(
    engine: LayerwiseEngine,
    portion: Portion,
    *,
    step: int,
    optimizer: ParamOptimizer,
    trained: Sequence[str],
    held_shapes: Mapping[str, tuple[int, ...]],
    max_length: int,
    stopped: Callable[[], bool],
    explain: Callable[[Exception, str], OutOfMemory] | None = None,
) -> None:
    """Run forward and backward on the largest batch, and check that every gradient is finite.

    Args:
        engine: Computes the gradients.
        portion: This process's micro-batches of the largest effective batch.
        step: Number of the next step, counted from 1.
        optimizer: Says in which form it needs each gradient; not changed.
        trained: Names of the parameters that must get a gradient.
        held_shapes: By name, the shape of what a step keeps of a gradient until its end; names left out keep nothing.
        max_length: Longest example in tokens, as configured.
        stopped: Returns whether the user asked the run to stop.
        explain: Makes the error to raise when memory runs out, from the original error and a description of the step;
            None: the original error's message is used.

    Raises:
        NonFiniteError: The loss or a gradient is not finite.
        OutOfMemory: The step does not fit into memory.
        RunError: The step fails, or leaves a parameter without a gradient.
        KeyboardInterrupt: The user asked the run to stop: there is nothing to save yet.
    """
    seen: set[str] = set()
    kept: list[Tensor] = []

    try:
        forward = engine.forward(portion, step=step, wants=lambda name: _trial(optimizer, name, step))
        with closing(engine.backward(forward)) as layers:
            del forward
            for layer in layers:
                with engine.using(layer) as gradients:
                    if stopped():
                        raise KeyboardInterrupt
                    for name in list(gradients):
                        grad = tensor_of(gradients.pop(name))
                        _refuse_non_finite(name, grad)
                        seen.add(name)
                        if name in held_shapes:
                            # Filled with values, since a system may hand out memory that it lacks until it is written.
                            kept.append(torch.full(held_shapes[name], 1.0, dtype=torch.float32, device=grad.device))
                        del grad
    except NonFiniteError as error:
        cause = error.cause if "probe step" in error.cause else f"In the probe step: {error.cause}"
        raise NonFiniteError(cause, _PRECISION) from error
    except (RuntimeError, MemoryError, OutOfMemory) as error:
        if lacks_memory(error):
            raise (explain or _repeat)(error, _too_large(portion.batches, max_length)) from error
        raise RunError(
            f"The probe step ({describe_probe(portion.batches)}) failed: {short(error)}.",
            "A training step would fail in the same way; --debug shows where.",
        ) from error
    without = [name for name in trained if name not in seen]
    if without:
        raise RunError(
            f"{without[0]} (and {len(without) - 1} more) got no gradient in the probe step.",
            "The program does not support this model's architecture correctly. Use another model.",
        )


def _trial(optimizer: ParamOptimizer, name: str, step: int) -> FromGradient | None:
    """Return functions that make a basis as a refresh does, without storing it; None: the gradient is formed."""
    subspace = optimizer.specs[name].subspace
    if subspace is None or subspace.residual != "none":
        return None
    rank = subspace.rank

    def choose(grad: Grad) -> Projector:
        start = random_basis(min(grad.shape), rank, generator(0, "probe", name, device=grad.device))
        return Projector(tracked_basis(grad, start), projection_side(grad.shape))

    def reduce(grad: Tensor) -> ProjectedGradient:
        _refuse_non_finite(name, grad)
        return ProjectedGradient(choose(grad).of(grad), norm_of(grad))

    return FromGradient(reduce, choose if optimizer.basis_from_gradient(name, step) else None)


def _refuse_non_finite(name: str, grad: Tensor) -> None:
    if not is_usable(grad):
        raise NonFiniteError(
            f"The gradient of {name} is not finite in the probe step (or above {LARGEST_GRAD:g}).", _PRECISION
        )


def describe_probe(batches: Sequence[MicroBatch]) -> str:
    """Return the size of a probe step as text, such as "2 x 64 tokens in 4 micro-batches"."""
    rows, columns = max((tuple(batch.input_ids.shape) for batch in batches), key=lambda shape: shape[0] * shape[1])
    return f"{rows} x {columns} tokens in {len(batches)} micro-batch" + ("es" if len(batches) > 1 else "")


def _too_large(batches: Sequence[MicroBatch], max_length: int) -> str:
    longest = max(batch.input_ids.shape[1] for batch in batches)
    what = "example" if all(batch.lengths is None for batch in batches) else "row"
    reached = f"; its longest {what} has {longest} tokens" + (", which is max_length" if longest == max_length else "")
    return f"The probe step ({describe_probe(batches)}{reached}) needs more memory than there is"


def _repeat(error: Exception, what: str) -> OutOfMemory:
    return OutOfMemory(f"{what}: {short(error)}.", WHAT_HELPS)
