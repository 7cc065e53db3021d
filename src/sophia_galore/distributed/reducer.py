"""Sums gradients over processes: only what the optimizer needs of them.

Where the basis is known before backward, that is the projected gradient: r columns instead of n. When the basis is made
from the gradient, it is the whole gradient or, where products are formed, each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from sophia_galore.engine.reducer import Reducer
from sophia_galore.numerics.subspace import Gradient, MultipliedBy, ProjectedGradient, tensor_of
from sophia_galore.optim.request import BasisFromGradient, FromGradient, GradientRequest, Wants


class Waiting(Protocol):
    """Sums that are on their way."""

    def wait(self) -> None:
        """Wait for all of them."""


class Summing(Protocol):
    """What sums tensors: `Processes`, or nothing at all where only memory is measured."""

    def start_sum(self, tensors: Sequence[Tensor]) -> Waiting:
        """Begin to replace tensors by their sums."""

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers."""


class ProcessReducer(Reducer):
    """Sums gradients over processes.

    Args:
        processes: The processes.
        overlaps: Whether sums are on their way during the backward of the next part.
    """

    is_alone = False

    def __init__(self, processes: Summing, *, overlaps: bool) -> None:
        self._processes, self.overlaps = processes, overlaps

    def start(self, gradients: dict[str, Gradient]) -> Callable[[], dict[str, Gradient]]:
        """See `Reducer`."""
        own = [tensor_of(gradient) for gradient in gradients.values() if not _is_summed(gradient)]
        pending = self._processes.start_sum(own)

        def finish() -> dict[str, Gradient]:
            pending.wait()
            return gradients

        return finish

    def total(self, value: float) -> float:
        """See `Reducer`."""
        return self._processes.sums([value])[0]

    def totals(self, values: list[float]) -> list[float]:
        """See `Reducer`."""
        return self._processes.sums(values)

    def wants(self, wants: Wants) -> Wants:
        """See `Reducer`."""

        def summed(name: str) -> GradientRequest:
            request = wants(name)
            if not isinstance(request, FromGradient):
                return request
            basis = request.basis
            return FromGradient(
                lambda grad: request.reduce(self.sum_now(grad)), None if basis is None else self._of_sums(basis)
            )

        return summed

    def sum_now(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, and return it."""
        self._processes.start_sum([tensor]).wait()
        return tensor

    def _of_sums(self, basis: BasisFromGradient) -> BasisFromGradient:
        return lambda gradient: basis(MultipliedBy(gradient, lambda projector: self.sum_now(gradient.of(projector))))


def _is_summed(gradient: Gradient) -> bool:
    """Return whether a gradient is the sum over all processes already."""
    # Only what was made from a summed whole gradient knows the whole one's norm.
    return isinstance(gradient, ProjectedGradient) and gradient.norm is not None
