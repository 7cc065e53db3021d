"""One door: `ParamOptimizer.step_param` is the only place where a weight changes.

The layer-wise engine hands it one parameter after the other; so do the `torch.optim`
classes, in `step()` and in backward. It fetches the parameter's state, takes the parameter's route (dense or
in a subspace), and the updated weight is rounded back into its stored format.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.errors import CheckpointError, NonFiniteError
from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.random import generator
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.numerics.rules import sophia_curvature
from sophia_galore.numerics.subspace import Gradient, LazyGradient, ProjectedGradient, Projector, project, tensor_of
from sophia_galore.optim.dense import dense_step
from sophia_galore.optim.limits import LARGEST_GRAD, is_usable
from sophia_galore.optim.lowrank import (
    basis_at,
    lowrank_step,
    refresh,
    refresh_is_due,
    subspace_of,
    with_deferred_update,
)
from sophia_galore.optim.request import BasisFromGradient, GradientRequest
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.optim.state import ParamState
from sophia_galore.weights.plain import as_weight
from sophia_galore.weights.weight import Weight

# Random directions outside of the subspace, by which the norm of what is never formed is estimated.
_NUM_PROBES = 8


@dataclass(eq=False)
class PreparedGradient:
    """A gradient as far as its step needs it.

    Args:
        full: G; None where the projected gradient is enough.
        projected: R; None where the gradient is not projected.
    """

    full: Tensor | None
    projected: Tensor | None

    def tensors(self) -> list[Tensor]:
        """What is held."""
        return [tensor for tensor in (self.full, self.projected) if tensor is not None]


class ParamOptimizer:
    """States of all parameters, and the one function that steps a parameter.

    Args:
        specs: One a parameter; names must be distinct.
        seed: The run's seed, for random bases and stochastic rounding.
        device: Where the states live; None: each is made where its parameter is, when it is first needed.
    """

    def __init__(self, specs: Iterable[ParamSpec], *, seed: int, device: torch.device | None = None) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self._seed = seed
        self._states: dict[str, ParamState] = {}
        if device is not None:
            self._states = {name: ParamState(spec, device) for name, spec in self.specs.items()}

    def step_param(self, name: str, weight: Weight | Tensor, grad: Gradient, *, step: int, factor: float) -> None:
        """Move one weight by one step.

        Args:
            name: The parameter's name.
            weight: The stored weight, in any format, changed in place; a tensor is one in its own precision.
            grad: Gradient over the whole effective batch, float32: of the shape of `weight`, or its product with what
                `request` asked for.
            step: Number of the optimizer step, counted from 1.
            factor: The schedule's value; multiplies the parameter's own learning rate.

        Raises:
            NonFiniteError: The gradient holds a NaN or an infinity; weight and state are untouched.
        """
        self.apply(name, as_weight(weight), self.prepare(name, grad, step=step), step=step, factor=factor)

    def prepare(self, name: str, grad: Gradient, *, step: int) -> PreparedGradient:
        """The first half of a step: keep of a gradient what its second half needs. Refreshes the basis if it is due.

        Args:
            name: The parameter's name.
            grad: As for `step_param`.
            step: As for `step_param`.

        Returns:
            What is needed; scaling it scales the gradient.

        Raises:
            NonFiniteError: As for `step_param`.
        """
        _refuse_non_finite(name, tensor_of(grad), step)
        spec = self.specs[name]
        if isinstance(grad, ProjectedGradient):
            return PreparedGradient(None, _inside(spec, grad))
        if spec.subspace is None:
            return PreparedGradient(grad, None)
        state = self._state(name, grad.device)
        if refresh_is_due(spec, state, step):
            refresh(spec, state, grad, step, self._seed)
        low = project(grad, basis_at(spec, state, step, self._seed, grad.device))
        return PreparedGradient(None if spec.subspace.residual == "none" else grad, low)

    def apply(self, name: str, weight: Weight, prepared: PreparedGradient, *, step: int, factor: float) -> None:
        """The second half of a step.

        Args:
            name: The parameter's name.
            weight: As for `step_param`.
            prepared: From `prepare` at the same step; used up.
            step: As for `step_param`.
            factor: As for `step_param`.
        """
        spec, state = self.specs[name], self._state(name, weight.device)
        rate = spec.learning_rate * factor
        noise = Noise.of(self._seed, "rounding", name, step)
        state_noise = Noise.of(self._seed, "state rounding", name, step)
        if prepared.projected is None:
            assert prepared.full is not None  # a gradient that is not projected is held in full
            dense_step(spec, state, weight, prepared.full, step=step, rate=rate, noise=noise, state_noise=state_noise)
            return
        lowrank_step(
            spec,
            state,
            weight,
            prepared.projected,
            prepared.full,
            basis_at(spec, state, step, self._seed, weight.device),
            step=step,
            rate=rate,
            noise=noise,
            state_noise=state_noise,
        )

    def request(self, name: str, step: int, *, observing: bool = False) -> GradientRequest:
        """In which form the gradient of a parameter is wanted at a step.

        Args:
            name: The parameter's name.
            step: Number of the step, counted from 1.
            observing: The gradient is for `observe_curvature`, else for `prepare`.
        """
        projector = self.projector(name, step)
        return self.basis_from_gradient(name, step, observing=observing) if projector is None else projector

    def projector(self, name: str, step: int) -> Projector | None:
        """What the gradient of a parameter is wanted times at a step, if it is not wanted itself.

        The first columns are the basis. A few more are random directions Z outside of the subspace with
        E |G Z|^2 = |G (I - P P^T)|^2 (Meyer et al., Hutch++, arXiv 2010.09649), so that the norm of the whole
        product is an unbiased estimate of the gradient's own norm, squared; with a basis in four bits, which is only
        nearly orthonormal, of up to a few percent more.

        Args:
            name: The parameter's name.
            step: Number of the step, counted from 1.

        Returns:
            The projector, or None: the full gradient is wanted.
        """
        spec = self.specs[name]
        state = self._states.get(name)
        if not _wants_products(spec) or state is None or refresh_is_due(spec, state, step):
            return None
        return self._with_probes(spec, state, step, next(iter(state.tensors.values())).device)

    def basis_from_gradient(self, name: str, step: int, *, observing: bool = False) -> BasisFromGradient | None:
        """How a basis is made from a gradient that is not formed, at a step at which `projector` can't know it.

        Args:
            name: The parameter's name.
            step: Number of the step, counted from 1.
            observing: As for `request`.

        Returns:
            A function that refreshes the basis by products of the gradient, if that is due, and then says what
            `projector` would. It raises NonFiniteError, with the state untouched. None: the full gradient is wanted.
        """
        spec = self.specs[name]
        if not _wants_products(spec) or subspace_of(spec).kind == "svd":
            return None

        def choose(grad: LazyGradient) -> Projector:
            state = self._state(name, grad.device)
            # A curvature is in the basis of the step before, from which `prepare` moves it; at first there is none.
            due = step == 1 and spec.rule == "sophia" if observing else refresh_is_due(spec, state, step)
            if due:
                refresh(spec, state, _Refusing(grad, name, step), step, self._seed)
            return self._with_probes(spec, state, max(1, step - 1) if observing else step, grad.device)

        return choose

    def observe_curvature(self, name: str, grad: Gradient, *, step: int, num_samples: int) -> None:
        """Take in a gradient whose labels were sampled from the model; no weight moves.

        Rules without a curvature pass over it.

        Args:
            name: The parameter's name.
            grad: Gradient of the mean loss over the sampled labels, float32; whole, or as `request` asked for it.
            step: Number of the optimizer step that comes next, counted from 1.
            num_samples: How many labels the loss was a mean over.

        Raises:
            NonFiniteError: As for `step_param`.
        """
        spec = self.specs[name]
        if spec.rule != "sophia":
            return
        _refuse_non_finite(name, tensor_of(grad), step)
        state = self._state(name, tensor_of(grad).device)
        if isinstance(grad, ProjectedGradient):
            grad = _inside(spec, grad)
        elif spec.subspace is not None:
            if step == 1:
                refresh(spec, state, grad, step, self._seed)  # there is no basis yet
            # Where the basis is drawn anew at this step, the state is still in the last one until `prepare` moves it.
            grad = project(grad, basis_at(spec, state, max(1, step - 1), self._seed, grad.device))
        first = state.is_empty("curvature")
        noise = Noise.of(self._seed, "curvature rounding", name, step)
        for rows in row_blocks(grad.shape):
            before = None if first else state.read("curvature", rows)
            state.write("curvature", sophia_curvature(grad[rows], before, spec.hyper, num_samples), noise, rows)

    def named_state(self) -> dict[str, Tensor]:
        """All state tensors by "parameter/state" name: the live tensors, not copies."""
        return {
            f"{name}/{key}": tensor for name, state in self._states.items() for key, tensor in state.tensors.items()
        }

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

    def place_state(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """The live state tensors of a parameter, made on a device or moved there.

        Args:
            name: The parameter's name.
            device: Where the parameter is now.

        Returns:
            The tensors by the state's names; what only the host reads stays on the host.
        """
        tensors = self._state(name, device).tensors
        for key, tensor in tensors.items():
            if tensor.dtype != torch.int64:
                tensors[key] = tensor.to(device)
        return tensors

    def with_deferred_update(self, name: str, weight: Weight) -> Weight:
        """The weight as it is to be used from now on: together with the update that its state keeps, if it does.

        Args:
            name: The parameter's name.
            weight: The stored weight; of one that has a remainder already, the codes and scales alone are taken over.
        """
        spec = self.specs[name]
        if spec.subspace is None or not spec.subspace.folds_late:
            return weight
        return with_deferred_update(spec, self._state(name, weight.device), weight)

    def _state(self, name: str, device: torch.device) -> ParamState:
        if name not in self._states:
            self._states[name] = ParamState(self.specs[name], device)
        return self._states[name]

    def _with_probes(self, spec: ParamSpec, state: ParamState, step: int, device: torch.device) -> Projector:
        basis = basis_at(spec, state, step, self._seed, device)
        num_probes = min(_NUM_PROBES, basis.shape[0] - basis.shape[1])
        draw = generator(self._seed, "norm probes", spec.name, step, device=device)
        probes = torch.randn(basis.shape[0], num_probes, generator=draw, device=device)
        probes.sub_(basis @ (basis.T @ probes)).div_(max(1, num_probes) ** 0.5)
        return Projector(torch.cat([basis, probes], 1), spec.side)


@dataclass(frozen=True, eq=False)
class _Refusing:
    """A gradient that was not formed, none of whose products is handed on unless it is usable."""

    grad: LazyGradient
    name: str
    step: int

    @property
    def shape(self) -> torch.Size:
        return self.grad.shape

    @property
    def device(self) -> torch.device:
        return self.grad.device

    def of(self, projector: Projector) -> Tensor:
        product = self.grad.of(projector)
        _refuse_non_finite(self.name, product, self.step)
        return product


def _inside(spec: ParamSpec, grad: ProjectedGradient) -> Tensor:
    """R, from the product with a projector whose first columns are the basis."""
    rank = subspace_of(spec).rank
    return grad.product[:, :rank].contiguous() if spec.side == "right" else grad.product[:rank]


def _wants_products(spec: ParamSpec) -> bool:
    """Whether products are enough for a parameter, once it has a basis."""
    return spec.subspace is not None and spec.subspace.fast and spec.subspace.residual == "none"


def _refuse_non_finite(name: str, grad: Tensor, step: int) -> None:
    if not is_usable(grad):
        raise NonFiniteError(
            f"The gradient of {name} is not finite at step {step} (or above {LARGEST_GRAD:g}).",
            "Lower training.learning_rate, or compute in fp32 (training.compute_dtype=fp32).",
        )
