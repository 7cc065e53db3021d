"""Steps of sharded parameters that each process makes on its own part, without whole weights or gradients.

An elementwise rule on a gradient that is not projected needs nothing from other processes. With a basis P, what is sent
depends on which dimension is cut. If it is the longer one, each process needs all of P, and nothing else:

    G (m, n), m >= n, cut by rows:        R_k = G_k P      W_k += N_k P^T
    G (m, n), m <  n, cut by columns:     R_k = P^T G_k    W_k += P N_k

If it is the shorter one, P is cut like the gradient, and the products are added up over the processes. Each takes its
rows of the sum R, computes its rows of the direction N, and all send them to each other:

    cut by rows, m < n:                   R = sum_k P_k^T G_k    W_k += P_k N
    cut by columns, m >= n:               R = sum_k G_k P_k      W_k += N P_k^T

Noise for rounding is that of a single process, since parts are whole rows of the stored tensor; and eight-bit blocks
lie inside parts. Where they do not, or where a rule or a residual needs more than the own part, the owner makes the
step (`owner_step.py`), and so it does when a basis is recomputed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sophia_galore.numerics.blockwise import BLOCK, num_blocks
from sophia_galore.numerics.noise import ColumnNoise, Noise
from sophia_galore.numerics.row_blocks import ROW_ALIGNMENT
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.dense import dense_step
from sophia_galore.optim.exchange import exchange
from sophia_galore.optim.lowrank import basis_at, directions, move_weight, refresh_is_due, subspace_of
from sophia_galore.optim.owner_step import Job
from sophia_galore.optim.sharding import Shape, Sharding, cut_dim, dim_of, local_of, part, part_of
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.optim.state import ParamState
from sophia_galore.weights.plain import PlainWeight

# Elements of bases and products that are whole in a process at once.
_AT_ONCE = 1 << 24


def is_local(spec: ParamSpec, job: Job, step: int) -> bool:
    """Return whether each process can step its own part of a parameter.

    Args:
        spec: The parameter.
        job: Its weight, gradient and state.
        step: Number of the parameter's step, counted from 1.
    """
    rule, sharding = RULES[spec.rule], job.sharding
    if job.weight is None or sharding.size == 1 or job.weight.device.type != sharding.mesh.device_type:
        return False
    if not rule.elementwise or rule.column_norm:
        return False
    if spec.subspace is not None and (
        spec.subspace.residual != "none" or refresh_is_due(spec, _own_state(spec, job), step)
    ):
        return False
    rounded = [(spec.held_shape, spec.state_bits)] if rule.slots else []
    if job.weight.dtype == torch.bfloat16:
        rounded.append((spec.shape, 16))
    return all(bits == 32 or _lies_in_parts(spec, shape, bits, sharding) for shape, bits in rounded)


def _lies_in_parts(spec: ParamSpec, shape: Shape, bits: int, sharding: Sharding) -> bool:
    """Return whether no group of noise and no eight-bit block has elements of two processes."""
    if cut_dim(spec, shape, sharding) == 1:
        # The scales of blocks are in the order of rows, so those of some columns are not in one part.
        return bits == 16 and len(shape) == 2
    elements = part(shape[0], 0, sharding.size).stop * math.prod(shape[1:])
    blocks = part(num_blocks(math.prod(shape)), 0, sharding.size).stop
    return elements % ROW_ALIGNMENT == 0 and (bits != 8 or blocks * BLOCK == elements)


@dataclass(frozen=True, eq=False)
class LocalStep:
    """A step of a process's own part.

    Args:
        spec: The parameter.
        job: Its weight, gradient and state.
        step: Number of the parameter's step, counted from 1.
        rate: Learning rate.
        seed: The optimizer's seed.
    """

    spec: ParamSpec
    job: Job
    step: int
    rate: float
    seed: int

    @property
    def weight(self) -> Tensor:
        """The own part of the weight."""
        assert self.job.weight is not None
        return local_of(self.job.weight)

    @property
    def grad(self) -> Tensor:
        """The own part of the gradient, float32."""
        return local_of(self.job.grad).float()

    @property
    def is_crossed(self) -> bool:
        """Whether the shorter dimension is cut, so that products are added up over the processes."""
        return self.job.sharding.dim == (0 if self.spec.side == "left" else 1)

    @property
    def num_whole(self) -> int:
        """Number of elements of basis or product that a process has as a whole."""
        return subspace_of(self.spec).rank * (max if self.is_crossed else min)(self.spec.shape)

    def noise(self, purpose: str, shape: Shape) -> Noise:
        """Return the noise for the own part of a tensor of this parameter."""
        sharding = self.job.sharding
        whole = Noise.of(self.seed, purpose, self.spec.name, self.step)
        dim = cut_dim(self.spec, shape, sharding) or 0
        start = part(shape[dim], sharding.rank, sharding.size).start
        if dim == 1:
            return ColumnNoise(whole.seed, whole.purpose, start=start, width=math.prod(shape[1:]))
        return replace(whole, first=start * math.prod(shape[1:]))


def step_locally(steps: Sequence[LocalStep]) -> None:
    """Make steps; each process changes its own parts of weights and states.

    Args:
        steps: The same in every process, but for the values of tensors; `is_local` holds for each.
    """
    by_mesh: dict[tuple[int, int | None], list[LocalStep]] = {}
    for one in steps:
        if one.spec.subspace is None:
            _step_dense(one)
        else:
            by_mesh.setdefault((id(one.job.sharding.mesh), one.job.sharding.mesh_dim), []).append(one)
    for same in by_mesh.values():
        for some in _bounded(same):
            _step_projected(some, some[0].job.sharding)


def _bounded(steps: Sequence[LocalStep]) -> Iterator[list[LocalStep]]:
    """Yield steps in turn, so many at once that what is whole stays small."""
    some: list[LocalStep] = []
    for one in steps:
        if some and sum(other.num_whole for other in some) + one.num_whole > _AT_ONCE:
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _step_dense(one: LocalStep) -> None:
    if not one.weight.numel():
        return
    dense_step(
        one.spec,
        _own_state(one.spec, one.job),
        PlainWeight(one.weight),
        one.grad,
        step=one.step,
        rate=one.rate,
        noise=one.noise("rounding", one.spec.shape),
        state_noise=one.noise("state rounding", one.spec.shape),
    )


def _step_projected(steps: list[LocalStep], sharding: Sharding) -> None:
    bases = _bases(steps, sharding)
    # Not `project`, which would take the side from the shape of the part.
    projected = [
        one.grad @ basis if one.spec.side == "right" else basis.T @ one.grad
        for one, basis in zip(steps, bases, strict=True)
    ]
    crossed = [index for index, one in enumerate(steps) if one.is_crossed]
    for index, total in zip(crossed, _summed([projected[index] for index in crossed], sharding), strict=True):
        projected[index] = total
    moves = []
    for one, own in zip(steps, projected, strict=True):
        noise = one.noise("state rounding", one.spec.held_shape)
        moves.append(directions(one.spec, _own_state(one.spec, one.job), own, one.step, noise)[0])
    shapes = [steps[index].spec.held_shape for index in crossed]
    for index, whole in zip(crossed, _gathered([moves[index] for index in crossed], shapes, sharding), strict=True):
        moves[index] = whole
    for one, basis, direction in zip(steps, bases, moves, strict=True):
        noise = one.noise("rounding", one.spec.shape)
        move_weight(one.spec, PlainWeight(one.weight), direction, basis, None, rate=one.rate, noise=noise)


def _bases(steps: list[LocalStep], sharding: Sharding) -> list[Tensor]:
    """Return the bases, (min(m, n), r); of a matrix whose shorter dimension is cut, the same part of their rows."""
    stored = [{key: tensor for key, tensor in one.job.tensors.items() if key.startswith("basis")} for one in steps]
    # A part of a packed basis has no whole rows.
    needed = [
        tensor
        for one, tensors in zip(steps, stored, strict=True)
        for key, tensor in tensors.items()
        if dim_of(tensor) is not None and (not one.is_crossed or key != "basis")
    ]
    whole = iter(_gathered([local_of(tensor) for tensor in needed], [tuple(one.shape) for one in needed], sharding))
    bases = []
    for one, tensors in zip(steps, stored, strict=True):
        if one.is_crossed and "basis" in tensors:
            bases.append(local_of(tensors["basis"]).float())
            continue
        own = {key: local_of(tensor) if dim_of(tensor) is None else next(whole) for key, tensor in tensors.items()}
        state = ParamState(one.spec, one.weight.device, own)
        basis = basis_at(one.spec, state, one.step, one.seed, one.weight.device)
        bases.append(part_of(basis, 0 if one.is_crossed else None, sharding.rank, sharding.size))
    return bases


def _gathered(parts: Sequence[Tensor], shapes: Sequence[Shape], sharding: Sharding) -> list[Tensor]:
    """Return whole tensors.

    Args:
        parts: The own parts of their rows.
        shapes: The whole shapes.
        sharding: The processes.
    """
    if not parts:
        return []
    whole = [own.new_empty(shape) for own, shape in zip(parts, shapes, strict=True)]
    places = [[part_of(one, 0, other, sharding.size) for one in whole] for other in range(sharding.size)]
    exchange([parts] * sharding.size, places, sharding)
    return whole


def _summed(products: Sequence[Tensor], sharding: Sharding) -> list[Tensor]:
    """Return the own rows of the sums of products over all processes."""
    if not products:
        return []
    sent = [[part_of(one, 0, other, sharding.size) for one in products] for other in range(sharding.size)]
    received = [[torch.empty_like(own) for own in sent[sharding.rank]] for _ in range(sharding.size)]
    exchange(sent, received, sharding)
    return [torch.stack(parts).sum(0) for parts in zip(*received, strict=True)]


def _own_state(spec: ParamSpec, job: Job) -> ParamState:
    """Return the own parts of a state."""
    tensors = {key: local_of(tensor) for key, tensor in job.tensors.items()}
    return ParamState(spec, local_of(job.grad).device, tensors)
