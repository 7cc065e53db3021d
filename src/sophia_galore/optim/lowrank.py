"""The step of a parameter whose rule sees its gradient in a subspace.

refresh        choose a new basis from the gradient; moments move along
basis_at       the basis of a step
lowrank_step   rule in the subspace, back to full size, and what becomes of the rest of the gradient
"""

from __future__ import annotations

import torch
from torch import Tensor

from sophia_galore.numerics import bases, residual
from sophia_galore.numerics.noise import Noise
from sophia_galore.numerics.random import generator
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.numerics.rules import RULES
from sophia_galore.numerics.subspace import Grad
from sophia_galore.numerics.transport import change_of_basis, move_first_moment, move_second_moment
from sophia_galore.optim.move import read_decayed
from sophia_galore.optim.recipes import STORED_BASES
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec
from sophia_galore.optim.state import ParamState
from sophia_galore.weights.deferred import DeferredWeight, deferred_of, deferring
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.weight import Weight

# Mean squared cosine of the principal angles from which on a subspace counts as holding still.
_STILL = 0.5
# An adaptive gap grows to this many times the one that was asked for.
_LARGEST_GROWTH = 16


def subspace_of(spec: ParamSpec) -> SubspaceSpec:
    """The subspace of a parameter that is known to have one."""
    assert spec.subspace is not None
    return spec.subspace


def refresh_is_due(spec: ParamSpec, state: ParamState, step: int) -> bool:
    """Whether the basis is made anew at this step.

    Args:
        spec: The parameter.
        state: Its state, which knows the next refresh where the gap is adaptive.
        step: Number of the parameter's step, counted from 1.
    """
    subspace = subspace_of(spec)
    planned = int(state.tensors["next_refresh"][0]) if subspace.adaptive else 0
    # Until an adaptive gap has planned its first refresh, the fixed gap says when that is.
    return subspace.refreshes_early_at(step) or step >= planned if planned else subspace.refreshes_at(step)


def basis_at(spec: ParamSpec, state: ParamState, step: int, seed: int, device: torch.device) -> Tensor:
    """The basis by which the gradient of a step is projected.

    Args:
        spec: The parameter.
        state: Its state.
        step: Number of the parameter's step, counted from 1.
        seed: The run's seed.
        device: Where the basis is needed.

    Returns:
        (min(m, n), r), float32.
    """
    subspace = subspace_of(spec)
    if subspace.kind in STORED_BASES:
        return state.basis()
    draw = generator(seed, "basis", spec.name, subspace.period(step), device=device)
    make = bases.gaussian_basis if subspace.kind == "gaussian" else bases.random_basis
    return make(min(spec.shape), subspace.rank, draw)


def refresh(spec: ParamSpec, state: ParamState, grad: Grad, step: int, seed: int) -> None:
    """Make the basis anew, and move the moments along.

    Args:
        spec: The parameter.
        state: Its state, changed in place.
        grad: Full gradient over the effective batch, (m, n) float32. Need not be formed but for an svd.
        step: Number of the parameter's step, counted from 1.
        seed: The run's seed.
    """
    subspace, device = subspace_of(spec), grad.device
    if subspace.kind not in STORED_BASES:
        if step > 1 and subspace.transport:
            old = basis_at(spec, state, step - 1, seed, device)
            _move_moments(spec, state, change_of_basis(old, basis_at(spec, state, step, seed, device)), step, seed)
        return
    old = state.basis().clone()  # in an fp32 format it is the stored tensor itself, which the new one overwrites
    draw = generator(seed, "basis", spec.name, step, device=device)
    if subspace.kind == "svd":
        assert isinstance(grad, Tensor)  # a decomposition is of all of it
        new = bases.svd_basis(grad, subspace.rank)
    elif subspace.kind == "randomized":
        new = bases.randomized_basis(grad, subspace.rank, draw)
    else:
        new = bases.tracked_basis(grad, old if old.any() else bases.random_basis(old.shape[0], subspace.rank, draw))
    state.store_basis(new)
    # At the first step the only moment is a curvature by the basis that its own gradient gave.
    if subspace.transport or step == 1:
        _move_moments(spec, state, change_of_basis(old, state.basis()), step, seed)
    if subspace.adaptive and not subspace.refreshes_early_at(step):
        still = float(bases.overlap(old, state.basis())) >= _STILL
        last_gap = int(state.tensors["next_refresh"][1]) or subspace.gap
        gap = min(2 * last_gap, _LARGEST_GROWTH * subspace.gap) if still else subspace.gap
        state.tensors["next_refresh"].copy_(torch.tensor([step + gap, gap]))


def lowrank_step(
    spec: ParamSpec,
    state: ParamState,
    weight: Weight,
    projected: Tensor,
    grad: Tensor | None,
    basis: Tensor,
    *,
    step: int,
    rate: float,
    noise: Noise,
    state_noise: Noise,
) -> None:
    """Move a weight by what its rule makes of the projected gradient.

    Args:
        spec: The parameter.
        state: Its state, changed in place.
        weight: The stored weight, (m, n), changed in place.
        projected: R = G P, (m, r), or P^T G, (r, n); used up.
        grad: G, (m, n) float32; None where no residual is wanted.
        basis: P, (min(m, n), r).
        step: Number of the parameter's step, counted from 1.
        rate: Learning rate.
        noise: For rounding the weight.
        state_noise: For rounding the state.
    """
    subspace, side = subspace_of(spec), spec.side
    direction, scales = _directions(spec, state, projected, step, state_noise)
    if scales is not None and grad is not None:
        if subspace.residual == "fira":
            norm = residual.residual_norm(grad, projected, basis.T @ basis, scales, side)
            scales = scales * _limited(subspace, state, norm)
            # N P^T + s (G - R P^T) = (N - s R) P^T + s G: one product, and no second matrix of full size.
            direction.addcmul_(scales, projected, value=-1)
        else:
            scales = scales * _limited(subspace, state, residual.scaled_norm(grad, scales, side))
    length = -rate * subspace.scale
    if deferred := deferred_of(weight):
        _defer(deferred, state, direction, spec.weight_decay, rate=rate, length=length, noise=noise)
        if refresh_is_due(spec, state, step + 1):
            _round_in(deferred, state, noise)
        return
    for rows in row_blocks(weight.shape):
        stored = weight[rows]
        values = read_decayed(stored, rate, spec.weight_decay)
        # Added in place: the update of full size is never formed.
        if subspace.residual in ("none", "fira"):
            left, right = (direction[rows], basis.T) if side == "right" else (basis[rows], direction)
            values.addmm_(left.to(values.dtype), right.to(values.dtype), alpha=length)
        if scales is not None and grad is not None:
            factors = scales[rows] if scales.shape[0] > 1 else scales
            values.addcmul_(factors.to(values.dtype), grad[rows].to(values.dtype), value=length)
        stored.write(values, noise.rows(rows, weight.shape[1]))


def _directions(
    spec: ParamSpec, state: ParamState, projected: Tensor, step: int, state_noise: Noise
) -> tuple[Tensor, Tensor | None]:
    """What the rule makes of R, and the factors by which it scaled the channels, if these are wanted."""
    rule, subspace = RULES[spec.rule], subspace_of(spec)
    # Where R itself is not needed any more, N takes its place.
    direction = projected if subspace.residual == "none" else torch.empty_like(projected)
    for rows in row_blocks(projected.shape) if rule.elementwise else [slice(None)]:
        direction[rows], new = rule.update(projected[rows], state.read_all(rows), spec.hyper, step)
        state.write_all(new, state_noise, rows)
    if subspace.residual == "none":
        return direction, None
    if subspace.residual == "tensor":
        before = torch.linalg.vector_norm(projected)
        return direction, torch.where(before > 0, torch.linalg.vector_norm(direction) / before, 0.0).view(1, 1)
    return direction, residual.channel_scales(direction, projected, spec.side)


def with_deferred_update(spec: ParamSpec, state: ParamState, weight: Weight) -> Weight:
    """A weight together with the update that its state holds for it.

    Args:
        spec: The parameter, whose updates are deferred.
        state: Its state.
        weight: The stored weight.
    """

    def factors() -> tuple[Tensor, Tensor]:
        remainder, basis = state.tensors["remainder"], state.basis()
        return (remainder, basis.T) if spec.side == "right" else (basis, remainder)

    return deferring(weight, state.tensors["shrink"], factors)


def _defer(
    weight: DeferredWeight,
    state: ParamState,
    direction: Tensor,
    weight_decay: float,
    *,
    rate: float,
    length: float,
    noise: Noise,
) -> None:
    """Move the deferred update by length * direction; weight decay concerns it and the codes."""
    remainder, noise = state.tensors["remainder"], noise.part("remainder")
    for rows in row_blocks(remainder.shape):
        stored = PlainWeight(remainder[rows])
        values = read_decayed(stored, rate, weight_decay).add_(direction[rows], alpha=length)
        stored.write(values, noise.rows(rows, remainder.shape[1]))
    weight.decay.mul_(1 - rate * weight_decay)


def _round_in(weight: DeferredWeight, state: ParamState, noise: Noise) -> None:
    """Round the deferred update into the codes, before the basis that it is in is made anew."""
    for rows in row_blocks(weight.shape):
        weight.base[rows].write(weight[rows].values(torch.float32), noise.rows(rows, weight.shape[1]))
    state.tensors["remainder"].zero_()
    weight.decay.fill_(1)


def _limited(subspace: SubspaceSpec, state: ParamState, norm: Tensor) -> Tensor:
    """The factor of the growth limiter, which remembers the norm."""
    if not subspace.growth_limit:
        return torch.ones_like(norm)
    previous = state.tensors["update_norm"]
    factor = residual.growth_factor(norm, previous[0], subspace.growth_limit)
    previous[0] = norm * factor
    return factor


def _move_moments(spec: ParamSpec, state: ParamState, change: Tensor, step: int, seed: int) -> None:
    noise = Noise.of(seed, "transport", spec.name, step)
    slots = RULES[spec.rule].slots
    # A factor along the long side says nothing about directions in the subspace.
    along = [name for name, slot in slots.items() if slot.extent == ("rows" if spec.side == "right" else "columns")]
    for name, slot in slots.items():
        if name in along:
            continue
        move = move_first_moment if slot.moment == 1 else move_second_moment
        if slot.extent == "full" and spec.side == "right":
            # Each row moves by itself: a vocabulary's moments need not be wide all at once.
            for rows in row_blocks(state.stored(name).shape):
                state.write(name, move(state.read(name, rows), change, spec.side), noise, rows)
            continue
        before = state.read(name)
        after = move(before, change, spec.side)
        if slot.extent != "full":
            # Both factors have the mean of the whole moment, which changed.
            for other in along:
                state.tensors[other].mul_(torch.where(before.mean() > 0, after.mean() / before.mean(), 1.0))
        state.write(name, after, noise)
