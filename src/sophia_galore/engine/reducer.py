"""The interface through which the engine sums gradients over processes that share an effective batch."""

from __future__ import annotations

from collections.abc import Callable

from sophia_galore.numerics.subspace import Gradient
from sophia_galore.optim.request import Wants


class Reducer:
    """Base class of reducers: there is one process, whose sums are those of the effective batch.

    `distributed/reducer.py` overrides it. Every process calls the same methods in the same order.

    Attributes:
        overlaps: Whether the gradients of a part of the model are summed during the backward of the next part; if not,
            each part waits for its sums.
        is_alone: Whether there is one process.
    """

    overlaps: bool = False
    is_alone: bool = True

    def start(self, gradients: dict[str, Gradient]) -> Callable[[], dict[str, Gradient]]:
        """Begin to sum the gradients of a part of the model over all processes.

        Args:
            gradients: This process's gradients, float32, in the same order in each process; used up.

        Returns:
            A function that waits for the sums and returns them.
        """
        return lambda: gradients

    def total(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        return value

    def totals(self, values: list[float]) -> list[float]:
        """Return the sums of numbers over all processes."""
        return values

    def wants(self, wants: Wants) -> Wants:
        """Return requests that make bases from gradients over all processes.

        Args:
            wants: The optimizer's requests.
        """
        return wants
