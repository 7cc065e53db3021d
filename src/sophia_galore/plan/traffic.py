"""What the processes of a run send each other in a step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from sophia_galore.optim.optimizer import num_products, wants_products
from sophia_galore.plan.route import Route

_ITEM_BYTES = 4  # gradients are summed in float32


@dataclass(frozen=True)
class Traffic:
    """Bytes of the gradients that are summed over processes in a step. A process sends each 2 (N - 1) / N times.

    Args:
        usual_bytes: In a step that makes no basis: projected gradients where they are enough.
        whole_bytes: If all gradients are whole, as a plain data-parallel optimizer sends them in every step.
    """

    usual_bytes: int
    whole_bytes: int

    @property
    def share(self) -> float:
        """The first as a part of the second."""
        return self.usual_bytes / max(1, self.whole_bytes)


def traffic_of(routes: Iterable[Route]) -> Traffic:
    """Return what is sent for the parameters of a model.

    Args:
        routes: One for each parameter.
    """
    trained = [route for route in routes if route.spec is not None]
    usual = 0
    for route in trained:
        assert route.spec is not None
        if wants_products(route.spec):
            usual += max(route.shape) * num_products(route.spec)
        else:
            usual += math.prod(route.shape)
    return Traffic(_ITEM_BYTES * usual, _ITEM_BYTES * sum(math.prod(route.shape) for route in trained))
