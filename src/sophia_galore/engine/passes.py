"""Several backward passes over one layer, so that the full gradients of its matrices are never in memory together.

A new basis is made from the full gradient of a matrix, and only a small product remains of it. At the first step all
matrices of a layer get a basis. With `full_gradients="matrix"` they are divided into groups, and the layer's backward
runs once for each group: it forms the full gradients of the group, reduces them to their products and frees them. A
group is at most as large as the layer's largest weight. All other gradients are formed in the first pass. Each matrix
has the same gradient as in a single pass, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from sophia_galore.engine.observe import Observer
from sophia_galore.numerics.subspace import Gradient
from sophia_galore.optim.request import Reduction

FullGradients = Literal["layer", "matrix"]
"""Which full gradients may be in memory together: those of a layer, or only as many as the largest matrix takes."""


class Passes:
    """The backward passes over one layer, and the gradients that they have finished.

    A pass that ran out of memory can be repeated until it calls `finish`; earlier passes stay finished.

    Args:
        full_gradients: Whether there may be more than one pass.

    Attributes:
        is_first: Whether no pass is finished.
        is_final: Whether the optimizer may be changing its state; the pass must not be repeated then.
        scale: The scale of gradients with which the first pass was finite, in fp16.
    """

    def __init__(self, full_gradients: FullGradients) -> None:
        self._apart = full_gradients == "matrix"
        self._names: tuple[str, ...] = ()
        self._reductions: dict[str, Reduction] = {}
        self._groups: list[tuple[str, ...]] = []
        self._finished: dict[str, Gradient] = {}
        self.is_first, self.is_final, self.scale = True, False, 1.0

    def plan(self, sizes: Mapping[str, int], reductions: Mapping[str, Reduction]) -> None:
        """Decide what each pass forms; called before the first pass, and again if that is repeated.

        Args:
            sizes: Elements of each weight that gets a gradient, by its name inside the layer.
            reductions: What makes a product of a full gradient, for each weight of which only a product is kept.
        """
        self._names = tuple(sizes)
        self._reductions = dict(reductions) if self._apart else {}
        self._groups = groups_of({name: sizes[name] for name in self._reductions}, max(sizes.values(), default=0))

    @property
    def is_last(self) -> bool:
        """Whether the next pass is the last one."""
        return len(self._groups) <= 1

    def forms(self, name: str) -> bool:
        """Return whether the next pass forms the gradient of a weight, or its product with a known matrix."""
        if self.is_first:
            return not any(name in group for group in self._groups[1:])
        return name in self._groups[0]

    @torch.no_grad()
    def finish(self, gradients: dict[str, Gradient], observer: Observer) -> None:
        """End a pass: reduce the full gradients of its group one after the other, and free them.

        Args:
            gradients: The gradients that the pass formed, by the weight's name inside the layer; used up.
            observer: Receives the category of each product.
        """
        for name in self._groups.pop(0) if self._groups else ():
            grad = gradients.pop(name, None)
            if grad is None:
                continue  # an expert without tokens
            assert isinstance(grad, torch.Tensor)  # it was formed, since its basis was not known
            self.is_final = True
            reduced = self._reductions[name](grad)
            del grad
            observer.tag(reduced.product, "gradients")
            self._finished[name] = reduced
        self._finished |= gradients
        gradients.clear()
        self.is_first = self.is_final = False

    def take(self) -> dict[str, Gradient]:
        """Return the gradients of all passes, in the order of the weights; afterwards only the caller holds them."""
        return {name: self._finished.pop(name) for name in self._names if name in self._finished}


def groups_of(sizes: Mapping[str, int], largest: int) -> list[tuple[str, ...]]:
    """Divide matrices into groups, few of them, each at most as large as the largest weight.

    Args:
        sizes: Elements of each matrix, by name.
        largest: Elements of the largest weight.

    Returns:
        The groups, larger matrices first; none without matrices.
    """
    groups: list[list[str]] = []
    left: list[int] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        place = next((index for index, room in enumerate(left) if sizes[name] <= room), len(groups))
        if place == len(groups):
            groups.append([])
            left.append(largest)
        groups[place].append(name)
        left[place] -= sizes[name]
    return [tuple(group) for group in groups]


def most_at_once(sizes: Mapping[str, int], reduced: Sequence[str], largest: int, full_gradients: FullGradients) -> int:
    """Return the most elements of full gradients that are in memory together.

    Args:
        sizes: Elements of each weight whose full gradient is formed, by name.
        reduced: Names of those of which only a product is kept.
        largest: Elements of the layer's largest weight that gets a gradient.
        full_gradients: Whether these are formed apart from one another.
    """
    if full_gradients == "layer":
        return sum(sizes.values())
    apart = {name: sizes[name] for name in reduced}
    groups = (sum(apart[name] for name in group) for group in groups_of(apart, largest))
    return sum(sizes.values()) - sum(apart.values()) + max(groups, default=0)
