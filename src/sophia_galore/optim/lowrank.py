"""The update of a parameter whose gradient is projected to a subspace.

refresh        compute a new basis from the gradient, and transform the moments to it
basis_at       the basis of a step
lowrank_step   the rule in the subspace, the projection back to full size, and the residual outside of the subspace
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

# A subspace counts as unchanged if the mean squared cosine of its principal angles is at least this.
_STILL = 0.5
# An adaptive gap grows to at most this many times the configured one.
_LARGEST_GROWTH = 16


def subspace_of(spec: ParamSpec) -> SubspaceSpec:
    """Return the subspace of a parameter that has one."""
    assert spec.subspace is not None
    return spec.subspace


def refresh_is_due(spec: ParamSpec, state: ParamState, step: int) -> bool:
    """Return whether the basis is recomputed at this step.

    Args:
        spec: The parameter.
        state: Its state, which holds the next refresh if the gap is adaptive.
        step: Number of the parameter's step, counted from 1.
    """
    subspace = subspace_of(spec)
    planned = int(state.tensors["next_refresh"][0]) if subspace.adaptive else 0
    # Until an adaptive gap has planned its first refresh, the fixed gap says when that is.
    return subspace.refreshes_early_at(step) or step >= planned if planned else subspace.refreshes_at(step)


def basis_at(spec: ParamSpec, state: ParamState, step: int, seed: int, device: torch.device) -> Tensor:
    """Return the basis that projects the gradient at a step.

    Args:
        spec: The parameter.
        state: Its state.
        step: Number of the parameter's step, counted from 1.
        seed: The run's seed.
        device: Device of the returned basis.

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
    """Recompute the basis, and transform the moments to it.

    Args:
        spec: The parameter.
        state: Its state, changed in place.
        grad: Gradient over the effective batch, (m, n) float32; a tensor, or only its products (not for an svd).
        step: Number of the parameter's step, counted from 1.
        seed: The run's seed.
    """
    subspace, device = subspace_of(spec), grad.device
    if subspace.kind not in STORED_BASES:
        if step > 1 and subspace.transport:
            old = basis_at(spec, state, step - 1, seed, device)
            _move_moments(spec, state, change_of_basis(old, basis_at(spec, state, step, seed, device)), step, seed)
        return
    old = state.basis().clone()  # `basis` may return the stored tensor itself, which the new basis overwrites
    draw = generator(seed, "basis", spec.name, step, device=device)
    if subspace.kind == "svd":
        assert isinstance(grad, Tensor)  # the decomposition needs the full gradient
        new = bases.svd_basis(grad, subspace.rank)
    elif subspace.kind == "randomized":
        new = bases.randomized_basis(grad, subspace.rank, draw)
    else:
        new = bases.tracked_basis(grad, old if old.any() else bases.random_basis(old.shape[0], subspace.rank, draw))
    state.store_basis(new)
    # At the first step, the only moment is a curvature in the basis that was made from the curvature's gradient.
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
    """Update a weight from its projected gradient.

    Args:
        spec: The parameter.
        state: Its state, changed in place.
        weight: The stored weight, (m, n), changed in place.
        projected: R = G P, (m, r), or P^T G, (r, n); used up.
        grad: G, (m, n) float32; None if the residual is not used.
        basis: P, (min(m, n), r).
        step: Number of the parameter's step, counted from 1.
        rate: Learning rate.
        noise: Noise for rounding the weight.
        state_noise: Noise for rounding the state.
    """
    subspace, side = subspace_of(spec), spec.side
    direction, scales = directions(spec, state, projected, step, state_noise)
    if scales is not None and grad is not None:
        if subspace.residual == "fira":
            norm = residual.residual_norm(grad, projected, basis.T @ basis, scales, side)
            scales = scales * _limited(subspace, state, norm)
            # N P^T + s (G - R P^T) = (N - s R) P^T + s G needs one matrix product and no second full-size matrix.
            direction.addcmul_(scales, projected, value=-1)
        else:
            scales = scales * _limited(subspace, state, residual.scaled_norm(grad, scales, side))
    length = -rate * subspace.scale
    if deferred := deferred_of(weight):
        _defer(deferred, state, direction, spec.weight_decay, rate=rate, length=length, noise=noise)
        if refresh_is_due(spec, state, step + 1):
            _round_in(deferred, state, noise)
        return
    outside = (scales, grad) if scales is not None and grad is not None else None
    move_weight(spec, weight, direction, basis, outside, rate=rate, noise=noise)


def move_weight(
    spec: ParamSpec,
    weight: Weight,
    direction: Tensor,
    basis: Tensor,
    outside: tuple[Tensor, Tensor] | None,
    *,
    rate: float,
    noise: Noise,
) -> None:
    """Move a weight along a direction in the subspace, and along what is used of the gradient outside of it.

    Args:
        spec: The parameter.
        weight: The stored weight, (m, n), or rows or columns of it; changed in place.
        direction: N, (m, r) or (r, n), or the same rows or columns of it.
        basis: P, (min(m, n), r), or the same rows of it.
        outside: Factors s and gradient G, whose product is added; None: nothing is.
        rate: Learning rate.
        noise: Noise for rounding the weight.
    """
    subspace = subspace_of(spec)
    length = -rate * subspace.scale
    for rows in row_blocks(weight.shape):
        stored = weight[rows]
        values = read_decayed(stored, rate, spec.weight_decay)
        # Added in place, so that the full-size update is never formed.
        if subspace.residual in ("none", "fira"):
            left, right = (direction[rows], basis.T) if spec.side == "right" else (basis[rows], direction)
            values.addmm_(left.to(values.dtype), right.to(values.dtype), alpha=length)
        if outside is not None:
            scales, grad = outside
            factors = scales[rows] if scales.shape[0] > 1 else scales
            values.addcmul_(factors.to(values.dtype), grad[rows].to(values.dtype), value=length)
        stored.write(values, noise.rows(rows, weight.shape[1]))


def directions(
    spec: ParamSpec, state: ParamState, projected: Tensor, step: int, state_noise: Noise
) -> tuple[Tensor, Tensor | None]:
    """Return the direction N that the rule computes from R; and the factors |N| / |R|, if the residual needs them."""
    rule, subspace = RULES[spec.rule], subspace_of(spec)
    # If R is not needed afterwards, N overwrites it.
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
    """Join a weight with the deferred update that its state holds.

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
    """Add length * direction to the deferred update; apply weight decay to it and, by a factor, to the codes."""
    remainder, noise = state.tensors["remainder"], noise.part("remainder")
    for rows in row_blocks(remainder.shape):
        stored = PlainWeight(remainder[rows])
        values = read_decayed(stored, rate, weight_decay).add_(direction[rows], alpha=length)
        stored.write(values, noise.rows(rows, remainder.shape[1]))
    weight.decay.mul_(1 - rate * weight_decay)


def _round_in(weight: DeferredWeight, state: ParamState, noise: Noise) -> None:
    """Round the deferred update into the codes, before its basis is recomputed."""
    for rows in row_blocks(weight.shape):
        weight.base[rows].write(weight[rows].values(torch.float32), noise.rows(rows, weight.shape[1]))
    state.tensors["remainder"].zero_()
    weight.decay.fill_(1)


def _limited(subspace: SubspaceSpec, state: ParamState, norm: Tensor) -> Tensor:
    """Return the growth limiter's factor, and store the limited norm."""
    if not subspace.growth_limit:
        return torch.ones_like(norm)
    previous = state.tensors["update_norm"]
    factor = residual.growth_factor(norm, previous[0], subspace.growth_limit)
    previous[0] = norm * factor
    return factor


def _move_moments(spec: ParamSpec, state: ParamState, change: Tensor, step: int, seed: int) -> None:
    noise = Noise.of(seed, "transport", spec.name, step)
    slots = RULES[spec.rule].slots
    # A factor along the side that is not projected does not depend on the basis.
    along = [name for name, slot in slots.items() if slot.extent == ("rows" if spec.side == "right" else "columns")]
    for name, slot in slots.items():
        if name in along:
            continue
        move = move_first_moment if slot.moment == 1 else move_second_moment
        if slot.extent == "full" and spec.side == "right":
            # Rows are independent, so a large vocabulary's moments are not decoded to float32 all at once.
            for rows in row_blocks(state.stored(name).shape):
                state.write(name, move(state.read(name, rows), change, spec.side), noise, rows)
            continue
        before = state.read(name)
        after = move(before, change, spec.side)
        if slot.extent != "full":
            # Both factors share the mean of the whole moment, which changed.
            for other in along:
                state.tensors[other].mul_(torch.where(before.mean() > 0, after.mean() / before.mean(), 1.0))
        state.write(name, after, noise)
