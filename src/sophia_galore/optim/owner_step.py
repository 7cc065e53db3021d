"""Steps of sharded parameters by their owners: correct for every rule, basis and format, to the bit.

Each matrix has one process as its owner for the time of a step. All others send it their parts of weight, gradient and
state; it makes the step as a single process would, and sends the parts back. In a round, each process owns about the
same number of elements. So all of them work at the same time, on different matrices, and none holds more than a few
whole ones. (Distributed Muon gathers its matrices in this way too.)

    one round, two processes:    parts of A  ->  0: step of A  ->  parts of A
                                 parts of B  ->  1: step of B  ->  parts of B
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sophia_galore.optim.exchange import exchange
from sophia_galore.optim.sharding import Sharding, dim_of, local_of, part_of
from sophia_galore.optim.state import COUNTER


@dataclass(frozen=True, eq=False)
class Job:
    """What is to be done with one parameter.

    Args:
        name: Its name.
        sharding: How it is cut.
        weight: The parameter, (m, n) or any other shape, a DTensor; None: it is not needed.
        grad: Its gradient, a DTensor.
        tensors: Its state tensors by name: DTensors, and counters, which each process has.
    """

    name: str
    sharding: Sharding
    weight: Tensor | None
    grad: Tensor
    tensors: Mapping[str, Tensor]

    def parts(self) -> list[_Part]:
        """Return what is sent: to the owner, and back."""
        parts = [] if self.weight is None else [_Part(self.weight, comes_back=True)]
        parts.append(_Part(self.grad, comes_back=False))
        return parts + [_Part(tensor, comes_back=True) for tensor in self.tensors.values()]


Act = Callable[[Job, Tensor | None, Tensor, dict[str, Tensor]], None]
"""Makes the step of a job from its whole weight, gradient and state, which it changes in place."""


@dataclass(frozen=True, eq=False)
class _Part:
    """One tensor of a job; what each process has as a whole is not sent to the owner, only back."""

    tensor: Tensor
    comes_back: bool

    @property
    def dim(self) -> int | None:
        return dim_of(self.tensor)


def run_on_owners(jobs: Sequence[Job], act: Act) -> None:
    """Do jobs, each in one process; weights and states change in all of them.

    Args:
        jobs: The same in every process, but for the values of tensors.
        act: Makes the step.
    """
    by_mesh: dict[tuple[int, int | None], list[Job]] = {}
    for job in jobs:
        by_mesh.setdefault((id(job.sharding.mesh), job.sharding.mesh_dim), []).append(job)
    for same in by_mesh.values():
        size = same[0].sharding.size
        for bins in rounds([job.grad.numel() for job in same], size):
            _run_round([[same[index] for index in chosen] for chosen in bins], same[0].sharding, act)


def rounds(sizes: Sequence[int], num: int) -> Iterator[list[list[int]]]:
    """Deal jobs to processes, the largest first, so that each process has about as much to do.

    Args:
        sizes: Number of elements of each job.
        num: Number of processes.

    Yields:
        For each round, the numbers of the jobs of each process; none has more elements than the round's largest job.
    """
    left = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    while left:
        limit = sizes[left[0]]
        bins: list[list[int]] = [[] for _ in range(num)]
        loads = [0] * num
        later = []
        for index in left:
            lightest = min(range(num), key=lambda owner: loads[owner])
            if loads[lightest] + sizes[index] <= limit:
                bins[lightest].append(index)
                loads[lightest] += sizes[index]
            else:
                later.append(index)
        left = later
        yield bins


def _run_round(bins: list[list[Job]], sharding: Sharding, act: Act) -> None:
    rank, size = sharding.rank, sharding.size
    if size == 1:
        for job in bins[0]:
            weight = None if job.weight is None else local_of(job.weight)
            act(job, weight, local_of(job.grad), {key: local_of(tensor) for key, tensor in job.tensors.items()})
        return
    mine = [part for job in bins[rank] for part in job.parts()]
    whole = _collect(bins, mine, sharding)
    for job in bins[rank]:
        tensors = {key: whole[id(tensor)] for key, tensor in job.tensors.items()}
        act(job, None if job.weight is None else whole[id(job.weight)], whole[id(job.grad)], tensors)
    back = [part for part in mine if part.comes_back]
    exchange(
        [[part_of(whole[id(part.tensor)], part.dim, other, size) for part in back] for other in range(size)],
        [[local_of(part.tensor) for job in jobs for part in job.parts() if part.comes_back] for jobs in bins],
        sharding,
    )


def _collect(bins: list[list[Job]], mine: list[_Part], sharding: Sharding) -> dict[int, Tensor]:
    """Send each owner the parts of its tensors; return this process's tensors as a whole, by the parts' ids."""
    size, device = sharding.size, torch.device(sharding.mesh.device_type)
    whole = {}
    for part in mine:
        own = local_of(part.tensor)
        # The host reads counters, so they stay there.
        place = own.device if own.dtype == COUNTER else device
        whole[id(part.tensor)] = (
            own.clone().to(place) if part.dim is None else own.new_empty(part.tensor.shape, device=place)
        )
    cut = [part for part in mine if part.dim is not None]
    exchange(
        [[local_of(part.tensor) for job in jobs for part in job.parts() if part.dim is not None] for jobs in bins],
        [[part_of(whole[id(part.tensor)], part.dim, other, size) for part in cut] for other in range(size)],
        sharding,
    )
    return whole
