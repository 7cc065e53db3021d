"""Optimizer states divided over processes: every parameter has an owner, which keeps its state and steps it.

Each process has all weights (as in ZeRO-1, Rajbhandari et al., arXiv 1910.02054, section 5.1). The owner
sends the others what they need of its state: the basis before they project a gradient, and the weight after a step.
The arithmetic is that of a process which has all states, so the bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sophia_galore.distributed.processes import Processes
from sophia_galore.numerics.subspace import (
    Gradient,
    LazyGradient,
    MultipliedBy,
    ProjectedGradient,
    Projector,
    norm_of,
    tensor_of,
)
from sophia_galore.optim.lowrank import refresh_is_due
from sophia_galore.optim.optimizer import (
    ParamOptimizer,
    PreparedGradient,
    num_products,
    refuse_non_finite,
    wants_products,
)
from sophia_galore.optim.recipes import STORED_BASES
from sophia_galore.optim.request import BasisFromGradient
from sophia_galore.optim.spec import ParamSpec, state_bytes
from sophia_galore.optim.state import COUNTER
from sophia_galore.weights.weight import Weight


def owners_of(specs: Iterable[ParamSpec], num_processes: int) -> dict[str, int]:
    """Return the owner of each parameter, so that states are divided evenly.

    Args:
        specs: The parameters.
        num_processes: Number of processes.

    Returns:
        Rank by name.
    """
    sizes = {spec.name: state_bytes(spec.state_tensors()) for spec in specs}
    loads = [0] * num_processes
    owners = dict.fromkeys(sizes, 0)
    # The largest first, each to the process with the least so far.
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


class ShardedOptimizer(ParamOptimizer):
    """A `ParamOptimizer` that has the states of its own parameters; the others' are on the meta device.

    Args:
        specs: One per parameter; names must be distinct.
        seed: The run's seed.
        device: Device of the states.
        processes: The processes of the run.
    """

    def __init__(self, specs: Iterable[ParamSpec], *, seed: int, device: torch.device, processes: Processes) -> None:
        specs = list(specs)
        self._processes = processes
        self._owners = owners_of(specs, processes.count)
        elsewhere = {name for name, rank in self._owners.items() if rank != processes.rank}
        super().__init__(specs, seed=seed, device=device, elsewhere=elsewhere)
        self._device = device
        self._projectors: dict[str, Projector] = {}
        self._arriving: list[Callable[[], None]] = []

    def projector(self, name: str, step: int) -> Projector | None:
        """See `ParamOptimizer`; the owner sends the basis. Parts of a step that are repeated find it here."""
        if name in self._projectors:
            return self._projectors[name]
        spec, state = self.specs[name], self.states.of(name, self._device)
        if not wants_products(spec) or refresh_is_due(spec, state, self._own_step(spec, step)):
            return None
        assert spec.subspace is not None
        if spec.subspace.kind not in STORED_BASES:
            return super().projector(name, step)  # a function of the seed
        shape = (min(spec.shape), num_products(spec))
        own = super().projector(name, step) if self._is_own(name) else None
        matrix = own.matrix if own else torch.empty(shape, device=self._device)
        self._processes.send(matrix, self._owners[name])
        self._projectors[name] = Projector(matrix, spec.side)
        return self._projectors[name]

    def basis_from_gradient(self, name: str, step: int, *, observing: bool = False) -> BasisFromGradient | None:
        """See `ParamOptimizer`; the owner says which products it needs, and all compute them."""
        choose, owner = super().basis_from_gradient(name, step, observing=observing), self._owners[name]
        if choose is None:
            return None

        def lead(gradient: LazyGradient) -> Projector:
            def announced(projector: Projector) -> Tensor:
                self._tell(projector, owner, is_last=False)
                return gradient.of(projector)

            chosen = choose(MultipliedBy(gradient, announced))
            self._tell(chosen, owner, is_last=True)
            return chosen

        def follow(gradient: LazyGradient) -> Projector:
            while True:
                projector, is_last = self._hear(owner)
                if is_last:
                    return projector
                gradient.of(projector)

        return lead if self._is_own(name) else follow

    def prepare(self, name: str, grad: Gradient, *, step: int) -> PreparedGradient:
        """See `ParamOptimizer`; for the parameters of others it returns nothing."""
        self._projectors.pop(name, None)
        if self._is_own(name):
            return super().prepare(name, grad, step=step)
        refuse_non_finite(name, tensor_of(grad), step)
        return PreparedGradient(None, None)

    def apply(self, name: str, weight: Weight, prepared: PreparedGradient, *, step: int, factor: float) -> None:
        """See `ParamOptimizer`; the owner sends the weight, which is there after `settle`."""
        if self._is_own(name):
            super().apply(name, weight, prepared, step=step, factor=factor)
        state = self.states.of(name, self._device).tensors
        counters = [tensor for tensor in state.values() if tensor.dtype == COUNTER]
        for tensor in [*weight.tensors().values(), *counters]:
            self._arriving.append(self._processes.start_sending(tensor, self._owners[name]))

    def settle(self) -> None:
        """See `ParamOptimizer`."""
        for wait in self._arriving:
            wait()
        self._arriving = []

    def observe_curvature(self, name: str, grad: Gradient, *, step: int, num_samples: int) -> None:
        """See `ParamOptimizer`."""
        self._projectors.pop(name, None)
        if self._is_own(name):
            super().observe_curvature(name, grad, step=step, num_samples=num_samples)

    @contextmanager
    def lend_to_first(self, name: str) -> Iterator[None]:
        """Lend the first process the state of a parameter, to be written into a checkpoint; all processes call it.

        Args:
            name: The parameter.
        """
        owner, tensors = self._owners[name], self.states.of(name, self._device).tensors
        if owner == 0:
            yield
            return
        at_rest = dict(tensors)
        for key, tensor in at_rest.items():
            if tensor.dtype == COUNTER:
                continue  # all have it
            if self._processes.is_first:
                tensors[key] = torch.empty_like(tensor, device=self._device)
            if self._processes.rank in (0, owner):
                self._processes.hand_over(tensors[key], owner)
        yield
        if self._processes.is_first:
            tensors.update(at_rest)

    def _reduce(self, name: str, step: int, observing: bool, grad: Tensor) -> ProjectedGradient:
        if self._is_own(name):
            return super()._reduce(name, step, observing, grad)
        refuse_non_finite(name, grad, step)
        return ProjectedGradient(grad.new_empty(0), norm_of(grad))

    def _is_own(self, name: str) -> bool:
        return self._owners[name] == self._processes.rank

    def _tell(self, projector: Projector, owner: int, *, is_last: bool) -> None:
        rows, columns = projector.matrix.shape
        self._processes.send(torch.tensor([rows, columns, projector.side == "left", is_last]), owner)
        self._processes.send(projector.matrix.contiguous(), owner)

    def _hear(self, owner: int) -> tuple[Projector, bool]:
        head = torch.zeros(4, dtype=torch.int64)
        self._processes.send(head, owner)
        rows, columns, is_left, is_last = (int(number) for number in head)
        matrix = torch.empty(rows, columns, device=self._device)
        self._processes.send(matrix, owner)
        return Projector(matrix, "left" if is_left else "right"), bool(is_last)
