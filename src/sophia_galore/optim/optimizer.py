"""`ParamOptimizer` is the only place where a weight changes.

The layer-wise engine and the `torch.optim` classes call it for one parameter after the other. It looks up the
parameter's state, runs the dense or the low-rank step, and rounds the updated weight into its stored format.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sophia_galore.errors import NonFiniteError
from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.random import generator
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.numerics.rules import sophia_curvature
from sophia_galore.numerics.subspace import (
    Gradient,
    LazyGradient,
    MultipliedBy,
    ProjectedGradient,
    Projector,
    norm_of,
    project,
    tensor_of,
)
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
from sophia_galore.optim.request import BasisFromGradient, FromGradient, GradientRequest
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.optim.state import ParamState
from sophia_galore.optim.states import ParamStates
from sophia_galore.weights.plain import as_weight
from sophia_galore.weights.weight import Weight

# Number of random directions outside of the subspace that estimate the norm of a gradient that is never formed.
_NUM_PROBES = 8


@dataclass(eq=False)
class PreparedGradient:
    """The parts of a gradient that the second half of a step needs.

    Args:
        full: G, of the weight's shape; None if the projected gradient is enough.
        projected: R, (m, r) or (r, n); None if the gradient is not projected.
    """

    full: Tensor | None
    projected: Tensor | None

    def tensors(self) -> list[Tensor]:
        """Return the tensors it holds."""
        return [tensor for tensor in (self.full, self.projected) if tensor is not None]


class ParamOptimizer:
    """The functions that update a parameter, and the optimizer states of all of them.

    Args:
        specs: One per parameter; names must be distinct.
        seed: The run's seed, for random bases and stochastic rounding.
        device: As for `ParamStates`.
        elsewhere: As for `ParamStates`.

    Attributes:
        specs: The parameters, by name.
        states: Their states.
        seed: The run's seed.
    """

    def __init__(
        self,
        specs: Iterable[ParamSpec],
        *,
        seed: int,
        device: torch.device | None = None,
        elsewhere: Collection[str] = (),
    ) -> None:
        self.specs = {spec.name: spec for spec in specs}
        self.states = ParamStates(self.specs, device=device, elsewhere=elsewhere)
        self.seed = seed

    def step_param(self, name: str, weight: Weight | Tensor, grad: Gradient, *, step: int, factor: float) -> None:
        """Update one weight.

        Args:
            name: The parameter's name.
            weight: The stored weight, in any format, changed in place; a tensor is a weight in its own dtype.
            grad: Gradient over the whole effective batch, float32: of the shape of `weight`, or the product that
                `request` asked for.
            step: Number of the optimizer step, counted from 1.
            factor: The schedule's value, a factor on the parameter's learning rate.

        Raises:
            NonFiniteError: The gradient holds a NaN or an infinity; weight and state are untouched.
        """
        self.apply(name, as_weight(weight), self.prepare(name, grad, step=step), step=step, factor=factor)

    def prepare(self, name: str, grad: Gradient, *, step: int) -> PreparedGradient:
        """Run the first half of a step: refresh the basis if it is due, and project the gradient.

        Args:
            name: The parameter's name.
            grad: As for `step_param`.
            step: As for `step_param`.

        Returns:
            What the second half needs; scaling its tensors scales the gradient.

        Raises:
            NonFiniteError: As for `step_param`.
        """
        refuse_non_finite(name, tensor_of(grad), step)
        spec = self.specs[name]
        step = self._own_step(spec, step)
        if isinstance(grad, ProjectedGradient):
            return PreparedGradient(None, _inside(spec, grad))
        if spec.subspace is None:
            return PreparedGradient(grad, None)
        low = self._project(spec, grad, step, observing=False)
        return PreparedGradient(None if spec.subspace.residual == "none" else grad, low)

    def apply(self, name: str, weight: Weight, prepared: PreparedGradient, *, step: int, factor: float) -> None:
        """Run the second half of a step: update state and weight.

        Args:
            name: The parameter's name.
            weight: As for `step_param`.
            prepared: From `prepare` at the same step; used up.
            step: As for `step_param`.
            factor: As for `step_param`.
        """
        spec, state = self.specs[name], self.states.of(name, weight.device)
        step = self._own_step(spec, step)
        if spec.rests:
            state.tensors["num_steps"] += 1
        rate = spec.learning_rate * factor
        noise = Noise.of(self.seed, "rounding", name, step)
        state_noise = Noise.of(self.seed, "state rounding", name, step)
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
            basis_at(spec, state, step, self.seed, weight.device),
            step=step,
            rate=rate,
            noise=noise,
            state_noise=state_noise,
        )

    def request(self, name: str, step: int, *, observing: bool = False) -> GradientRequest:
        """Return in which form the gradient of a parameter is needed at a step.

        Args:
            name: The parameter's name.
            step: Number of the step, counted from 1.
            observing: Whether the gradient is for `observe_curvature`; if not, it is for `prepare`.
        """
        projector = self.projector(name, step)
        if projector is not None:
            return projector
        subspace = self.specs[name].subspace
        if subspace is None or subspace.residual != "none":
            return None
        return FromGradient(
            partial(self._reduce, name, step, observing),
            self.basis_from_gradient(name, step, observing=observing),
        )

    def projector(self, name: str, step: int) -> Projector | None:
        """Return the matrix whose product with the gradient is enough for a step, if it is known in advance.

        The first columns are the basis P. A few more are random directions Z outside of the subspace with
        E |G Z|^2 = |G (I - P P^T)|^2 (Meyer et al., Hutch++, arXiv 2010.09649). So the squared norm of the whole
        product is an unbiased estimate of the gradient's squared norm; with a 4-bit basis, which is only nearly
        orthonormal, the estimate is up to a few percent too large.

        Args:
            name: The parameter's name.
            step: Number of the step, counted from 1.

        Returns:
            The projector; None: the full gradient, or a basis made from it, is needed.
        """
        spec = self.specs[name]
        state = self.states.get(name)
        step = self._own_step(spec, step)
        if not wants_products(spec) or state is None or refresh_is_due(spec, state, step):
            return None
        return self._with_probes(spec, state, step, next(iter(state.tensors.values())).device)

    def basis_from_gradient(self, name: str, step: int, *, observing: bool = False) -> BasisFromGradient | None:
        """Return a function that makes the basis of a step from products of a gradient that is never formed.

        Args:
            name: The parameter's name.
            step: Number of the step, counted from 1.
            observing: As for `request`.

        Returns:
            A function that refreshes the basis if it is due, and returns the projector of the step. It raises
            NonFiniteError, with the state unchanged, if a product is not finite. None: the full gradient is needed.
        """
        spec = self.specs[name]
        step = self._own_step(spec, step)
        if not wants_products(spec) or subspace_of(spec).kind == "svd":
            return None

        def choose(grad: LazyGradient) -> Projector:
            state = self.states.of(name, grad.device)
            if _refreshes(spec, state, step, observing):
                refresh(spec, state, _checked(grad, name, step), step, self.seed)
            return self._with_probes(spec, state, _basis_step(step, observing), grad.device)

        return choose

    def observe_curvature(self, name: str, grad: Gradient, *, step: int, num_samples: int) -> None:
        """Update the curvature from a gradient whose labels were sampled from the model; no weight changes.

        Rules without a curvature ignore it.

        Args:
            name: The parameter's name.
            grad: Gradient of the mean loss over the sampled labels, float32; full, or the product that `request` asked
                for.
            step: Number of the next optimizer step, counted from 1.
            num_samples: Number of labels in that mean.

        Raises:
            NonFiniteError: As for `step_param`.
        """
        spec = self.specs[name]
        if spec.rule != "sophia":
            return
        refuse_non_finite(name, tensor_of(grad), step)
        step = self._own_step(spec, step)
        state = self.states.of(name, tensor_of(grad).device)
        if isinstance(grad, ProjectedGradient):
            grad = _inside(spec, grad)
        elif spec.subspace is not None:
            grad = self._project(spec, grad, step, observing=True)
        first = state.is_empty("curvature")
        noise = Noise.of(self.seed, "curvature rounding", name, step)
        for rows in row_blocks(grad.shape):
            before = None if first else state.read("curvature", rows)
            state.write("curvature", sophia_curvature(grad[rows], before, spec.hyper, num_samples), noise, rows)

    def settle(self) -> None:
        """Wait until all updates of a step have arrived in the weights; here they are there at once."""

    def with_deferred_update(self, name: str, weight: Weight) -> Weight:
        """Return the weight, joined with the deferred update in its state if its updates are deferred.

        Args:
            name: The parameter's name.
            weight: The stored weight. If it is already joined with an update, only its codes and scales are used.
        """
        spec = self.specs.get(name)  # a frozen weight has none
        if spec is None or spec.subspace is None or not spec.subspace.folds_late:
            return weight
        return with_deferred_update(spec, self.states.of(name, weight.device), weight)

    def _project(self, spec: ParamSpec, grad: Tensor, step: int, *, observing: bool) -> Tensor:
        """Refresh the basis if it is due, and return R of a full gradient."""
        state = self.states.of(spec.name, grad.device)
        if _refreshes(spec, state, step, observing):
            refresh(spec, state, grad, step, self.seed)
        return project(grad, basis_at(spec, state, _basis_step(step, observing), self.seed, grad.device))

    def _reduce(self, name: str, step: int, observing: bool, grad: Tensor) -> ProjectedGradient:
        """Return what `prepare` or `observe_curvature` needs of a full gradient."""
        refuse_non_finite(name, grad, step)
        spec = self.specs[name]
        projected = self._project(spec, grad, self._own_step(spec, step), observing=observing)
        return ProjectedGradient(projected, norm_of(grad))

    def _own_step(self, spec: ParamSpec, step: int) -> int:
        """Return the number of a parameter's next step: that of the run, unless the parameter may rest."""
        if not spec.rests:
            return step
        state = self.states.get(spec.name)
        return 1 if state is None else int(state.tensors["num_steps"][0]) + 1

    def _with_probes(self, spec: ParamSpec, state: ParamState, step: int, device: torch.device) -> Projector:
        basis = basis_at(spec, state, step, self.seed, device)
        num_probes = num_products(spec) - basis.shape[1]
        draw = generator(self.seed, "norm probes", spec.name, step, device=device)
        probes = torch.randn(basis.shape[0], num_probes, generator=draw, device=device)
        probes.sub_(basis @ (basis.T @ probes)).div_(max(1, num_probes) ** 0.5)
        return Projector(torch.cat([basis, probes], 1), spec.side)


def _checked(grad: LazyGradient, name: str, step: int) -> LazyGradient:
    """Return a gradient that raises NonFiniteError for products that are not finite."""

    def product(projector: Projector) -> Tensor:
        found = grad.of(projector)
        refuse_non_finite(name, found, step)
        return found

    return MultipliedBy(grad, product)


def _refreshes(spec: ParamSpec, state: ParamState, step: int, observing: bool) -> bool:
    """Return whether the gradient of a step, or the one for its curvature, makes a new basis."""
    # Step 1 has no basis yet; later, a curvature is in the basis of the step before.
    return step == 1 and spec.rule == "sophia" if observing else refresh_is_due(spec, state, step)


def _basis_step(step: int, observing: bool) -> int:
    """Return the step whose basis the gradient is projected with."""
    # If a basis changes at this step, the curvature is in the previous one until `prepare` transforms it.
    return max(1, step - 1) if observing else step


def _inside(spec: ParamSpec, grad: ProjectedGradient) -> Tensor:
    """Return R, from the product with a projector whose first columns are the basis."""
    rank = subspace_of(spec).rank
    return grad.product[:, :rank].contiguous() if spec.side == "right" else grad.product[:rank]


def num_products(spec: ParamSpec) -> int:
    """Return the number of columns of the projector of a parameter: those of the basis, and probes of the norm."""
    rank = subspace_of(spec).rank
    return rank + min(_NUM_PROBES, min(spec.shape) - rank)


def wants_products(spec: ParamSpec) -> bool:
    """Return whether products with the gradient are enough for a parameter that has a basis."""
    return spec.subspace is not None and spec.subspace.fast and spec.subspace.residual == "none"


def refuse_non_finite(name: str, grad: Tensor, step: int) -> None:
    """Raise NonFiniteError if a gradient, or a product with it, is not finite.

    Args:
        name: The parameter's name.
        grad: The gradient or product.
        step: Number of the step.
    """
    if not is_usable(grad):
        raise NonFiniteError(
            f"The gradient of {name} is not finite at step {step} (or above {LARGEST_GRAD:g}).",
            "Lower training.learning_rate, or compute in fp32 (training.compute_dtype=fp32).",
        )
