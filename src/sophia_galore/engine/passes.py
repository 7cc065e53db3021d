"""Several backward passes over one layer, so that the full gradients of its matrices are never in memory together.

A new basis is made from the full gradient of a matrix, and only a small product remains of it. At the first step all
matrices of a layer get a basis. With `full_gradients="matrix"` they are divided into groups, and the layer's backward
runs once for each group: it forms the full gradients of the group, reduces them to their products and frees them. A
group is at most as large as the layer's largest weight. All other gradients are formed in the first pass. Each matrix
has the same gradient as in a single pass, to the bit.

Matrices of experts are in no group, since there may be hundreds. Autograd forms their gradients one expert after the
other, so in the last micro-batch each is reduced as soon as it is complete. With one micro-batch, one of them is in
memory at a time; with several, sums of the earlier ones wait.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
        reduces_at_once: Whether an expert's gradient is complete when it is formed, and the pass is not repeated.
        is_final: Whether the optimizer may be changing its state; the pass must not be repeated then.
        scale: The scale of gradients with which the first pass was finite, in fp16.
    """

    def __init__(self, full_gradients: FullGradients) -> None:
        self._apart = full_gradients == "matrix"
        self._names: tuple[str, ...] = ()
        self._reductions: dict[str, Reduction] = {}
        self._of_experts: dict[str, Reduction] = {}
        self._groups: list[tuple[str, ...]] = []
        self._finished: dict[str, Gradient] = {}
        self.is_first, self.is_final, self.scale = True, False, 1.0
        self.reduces_at_once = False

    def plan(
        self, sizes: Mapping[str, int], reductions: Mapping[str, Reduction], experts: Collection[str] = ()
    ) -> None:
        """Decide what each pass forms; called before the first pass, and again if that is repeated.

        Args:
            sizes: Elements of each weight that gets a gradient, by its name inside the layer.
            reductions: What makes a product of a full gradient, for each weight of which only a product is kept.
            experts: Names of the weights of experts.
        """
        self._names = tuple(sizes)
        asked = dict(reductions) if self._apart else {}
        self._of_experts = {name: asked.pop(name) for name in list(asked) if name in experts}
        self._reductions = asked
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
            grad = gradients.pop(name)
            assert isinstance(grad, torch.Tensor)  # it was formed, since its basis was not known
            self.is_final = True
            self._reduce(self._reductions[name], name, grad, observer)
            del grad
        for name in [name for name in self._of_experts if name in gradients]:
            self.reduce_expert(name, gradients.pop(name), observer)
        self._finished |= gradients
        gradients.clear()
        self.is_first = self.is_final = False

    def reduces(self, name: str) -> bool:
        """Return whether only a product of an expert's full gradient is kept."""
        return name in self._of_experts

    def is_finished(self, name: str) -> bool:
        """Return whether the gradient of a weight needs no pass any more."""
        return name in self._finished

    @torch.no_grad()
    def reduce_expert(self, name: str, grad: Gradient, observer: Observer) -> None:
        """Reduce the full gradient of an expert's weight; what it took is free once the caller drops it.

        Args:
            name: The weight's name inside the layer.
            grad: Its gradient over all micro-batches, float32.
            observer: Receives the category of the product.
        """
        assert isinstance(grad, torch.Tensor)  # as above
        self.is_final = True
        self._reduce(self._of_experts[name], name, grad, observer)

    def _reduce(self, reduction: Reduction, name: str, grad: torch.Tensor, observer: Observer) -> None:
        reduced = reduction(grad)
        observer.tag(reduced.product, "gradients")
        self._finished[name] = reduced

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
