"""One door: `ParamOptimizer.step_param` is the only place where a weight changes.

The layer-wise engine hands it one parameter after the other. It fetches the parameter's state,
calls the rule, and rounds the updated weight back into its stored format, by blocks of rows, so
that no second full-size temporary exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from sophia_galore.errors import CheckpointError, NonFiniteError
from sophia_galore.numerics.random import generator
from sophia_galore.numerics.rounding import write_rounded
from sophia_galore.numerics.rules import State, adamw
from sophia_galore.numerics.subspace import project, project_back, projection_side, svd_basis
from sophia_galore.optim.spec import ParamSpec

# Elements of a weight that are worked on at once: 16 MiB of float32.
_BLOCK_ELEMENTS = 1 << 22


class ParamOptimizer:
    """States of all parameters, and the one function that steps a parameter.

    Args:
        specs: One a parameter; names must be distinct.
        seed: The run's seed, for stochastic rounding.
        device: Where the states live.
    """

    def __init__(self, specs: Iterable[ParamSpec], *, seed: int, device: torch.device) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self._seed = seed
        self._states: dict[str, State] = {
            name: {
                key: torch.zeros(shape, dtype=torch.float32, device=device)
                for key, shape in spec.state_shapes().items()
            }
            for name, spec in self.specs.items()
        }

    def step_param(self, name: str, weight: Tensor, grad: Tensor, *, step: int, factor: float) -> None:
        """Move one weight by one step.

        Args:
            name: The parameter's name.
            weight: The stored weight, float32 or bfloat16, changed in place.
            grad: Gradient over the whole effective batch, float32, the shape of `weight`.
            step: Number of the optimizer step, counted from 1.
            factor: The schedule's value; multiplies the parameter's own learning rate.

        Raises:
            NonFiniteError: The gradient holds a NaN or an infinity; weight and state are untouched.
        """
        # The extremes are NaN if any entry is, and need no temporary of the gradient's size.
        if not all(math.isfinite(extreme) for extreme in torch.aminmax(grad)):
            raise NonFiniteError(
                f"The gradient of {name} is not finite at step {step}.",
                "Lower training.learning_rate, or compute in fp32 (training.compute_dtype=fp32).",
            )
        spec, state = self.specs[name], self._states[name]
        rate = spec.learning_rate * factor
        rounding = generator(self._seed, "rounding", name, step, device=weight.device)
        if spec.subspace is None:
            for rows in _row_blocks(weight):
                block = {key: tensor[rows] for key, tensor in state.items()}
                direction, new = adamw(grad[rows], block, spec.hyper, step)
                _store_state(block, new)
                _move(weight[rows], direction, rate, spec.weight_decay, rounding)
            return
        if spec.subspace.refreshes_at(step):
            state["basis"].copy_(svd_basis(grad, spec.subspace.rank))
        basis, side = state["basis"], projection_side(weight.shape)
        moments = {key: tensor for key, tensor in state.items() if key != "basis"}
        direction, new = adamw(project(grad, basis), moments, spec.hyper, step)
        _store_state(moments, new)
        direction.mul_(spec.subspace.scale)
        for rows in _row_blocks(weight):
            back = (
                project_back(direction[rows], basis, side)
                if side == "right"
                else project_back(direction, basis[rows], side)
            )
            _move(weight[rows], back, rate, spec.weight_decay, rounding)

    def named_state(self) -> dict[str, Tensor]:
        """All state tensors by "parameter/state" name: the live tensors, not copies."""
        return {f"{name}/{key}": tensor for name, state in self._states.items() for key, tensor in state.items()}

    def load_named_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a saved state, exactly.

        Args:
            tensors: As given by `named_state`.

        Raises:
            CheckpointError: A tensor is missing, too many, or of another shape or dtype; nothing was changed.
        """
        own = self.named_state()
        odd = sorted(own.keys() ^ tensors.keys()) or sorted(
            key for key in own if own[key].shape != tensors[key].shape or own[key].dtype != tensors[key].dtype
        )
        if odd:
            raise CheckpointError(
                f"The saved optimizer state does not fit this run: {odd[0]} (and {len(odd) - 1} more) differs.",
                "Resume with the configuration that the checkpoint was made with.",
            )
        for key, tensor in own.items():
            tensor.copy_(tensors[key])


def _row_blocks(weight: Tensor) -> Iterator[slice]:
    """Slices over the first dimension, each of at most `_BLOCK_ELEMENTS` elements (but at least one row)."""
    num_rows = weight.shape[0]
    step = max(1, _BLOCK_ELEMENTS * num_rows // max(1, weight.numel()))
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def _store_state(state: State, new: State) -> None:
    for key, tensor in new.items():
        state[key].copy_(tensor)


def _move(weight: Tensor, direction: Tensor, rate: float, weight_decay: float, rounding: torch.Generator) -> None:
    """weight <- round((1 - rate * weight_decay) weight - rate * direction), in place."""
    values = weight if weight.dtype == torch.float32 else weight.float()
    if weight_decay:
        values.mul_(1 - rate * weight_decay)
    values.sub_(direction, alpha=rate)
    if values is not weight:
        write_rounded(weight, values, rounding)
