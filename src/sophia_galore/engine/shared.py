"""What layers share besides the hidden states, and the gradients that flow through it.

Some models hand more to their layers than hidden states, masks and positions. Gemma 4's layers multiply by an embedding
of the token made for each layer, and its last layers use the keys and values of an earlier one. The first are inputs
that have a graph back to the embedding; the second are entries of a mapping into which one layer writes and from which
others read.

Both become leaves of the layer that uses them. A layer's backward leaves a gradient for each, which is added up over
the layers, last to first, until the layer that wrote the entry, or the embedding, goes backward itself.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass(eq=False)
class Visit:
    """What one run of a layer reads and writes.

    Args:
        read: By key, the leaves that stand for an entry, and how they are nested.
        written: By key, the entry as the layer wrote it, with its graph.
    """

    read: dict[Any, tuple[list[Tensor], Any]] = field(default_factory=dict)
    written: dict[Any, Any] = field(default_factory=dict)


class SharedStates(MutableMapping[Any, Any]):
    """A mapping that the layers of one micro-batch share.

    Entries are kept without their graphs. Outside of `visiting` it is an ordinary mapping.
    """

    def __init__(self) -> None:
        self._values: dict[Any, tuple[list[Any], Any]] = {}
        self._grads: dict[Any, list[Tensor | None]] = {}
        self._visit: Visit | None = None

    def begin(self) -> Visit:
        """Begin a run of a layer."""
        self._visit = Visit()
        return self._visit

    def end(self) -> None:
        """End the run of a layer, and keep what it wrote."""
        visit, self._visit = self._visit, None
        assert visit is not None
        for key, value in visit.written.items():
            flat, nesting = tree_flatten(value)
            self._values[key] = ([each.detach() if isinstance(each, Tensor) else each for each in flat], nesting)

    def __getitem__(self, key: Any) -> Any:
        visit = self._visit
        if visit is not None and key in visit.written:
            return visit.written[key]
        flat, nesting = self._values[key]
        if visit is None or not torch.is_grad_enabled():
            return tree_unflatten(flat, nesting)
        if key not in visit.read:
            leaves = [
                each.detach().requires_grad_() if isinstance(each, Tensor) and each.is_floating_point() else each
                for each in flat
            ]
            visit.read[key] = (leaves, nesting)
        return tree_unflatten(*visit.read[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._visit is None:
            flat, nesting = tree_flatten(value)
            self._values[key] = (flat, nesting)
        else:
            self._visit.written[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._values[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def outputs(self, visit: Visit) -> tuple[list[Tensor], list[Tensor]]:
        """Return what a layer wrote and later layers used, with the gradients from these layers."""
        tensors: list[Tensor] = []
        grads: list[Tensor] = []
        for key, value in visit.written.items():
            for each, grad in zip(tree_flatten(value)[0], self._grads.get(key, ()), strict=False):
                if grad is not None and isinstance(each, Tensor) and each.requires_grad:
                    tensors.append(each)
                    grads.append(grad)
        return tensors, grads

    def grads_of(self, visit: Visit, factor: float) -> dict[Any, list[Tensor | None]]:
        """Return the gradients of a visit's leaves, after its backward.

        Args:
            visit: The visit.
            factor: What they are divided by.
        """
        return {
            key: [_divided(leaf.grad, factor) if isinstance(leaf, Tensor) else None for leaf in leaves]
            for key, (leaves, _) in visit.read.items()
        }

    def settle(self, visit_grads: dict[Any, list[Tensor | None]], written: Sequence[Any]) -> None:
        """Take over the gradients that a layer's finished backward left, and drop those that it used.

        Args:
            visit_grads: From `grads_of`.
            written: Keys of the entries that the layer wrote.
        """
        for key in written:
            self._grads.pop(key, None)
        for key, grads in visit_grads.items():
            have = self._grads.setdefault(key, [None] * len(grads))
            self._grads[key] = [_sum(old, new) for old, new in zip(have, grads, strict=True)]


@contextmanager
def visiting(states: Sequence[SharedStates]) -> Iterator[list[Visit]]:
    """Let a layer read and write inside the context; yields its visits, one for each mapping."""
    visits = [each.begin() for each in states]
    try:
        yield visits
    finally:
        for each in states:
            each.end()


@dataclass(eq=False)
class SharedInput:
    """A tensor with a graph back to the embedding, which layers get as an argument.

    Args:
        source: The tensor.
        leaf: What the layers get in its place.
        grad: The gradient with respect to it so far; None: no layer has used it yet.
    """

    source: Tensor
    leaf: Tensor
    grad: Tensor | None = None

    @classmethod
    def of(cls, source: Tensor) -> SharedInput:
        """Return a shared input; its leaf shares the source's memory."""
        return cls(source, source.detach().requires_grad_())

    def add(self, grad: Tensor | None) -> None:
        """Add a layer's gradient."""
        self.grad = _sum(self.grad, grad)


@dataclass(frozen=True, eq=False)
class FinishedRun:
    """What the finished backward of a layer leaves for what it shares with others, for one micro-batch.

    Args:
        inputs: The gradient with respect to each shared input.
        states: For each mapping, the gradients of the entries that were read, and the keys of those that were written.
    """

    inputs: list[tuple[SharedInput, Tensor | None]]
    states: list[tuple[SharedStates, dict[Any, list[Tensor | None]], list[Any]]]

    @classmethod
    def of(
        cls, inputs: Sequence[SharedInput], states: Sequence[SharedStates], visits: Sequence[Visit], factor: float
    ) -> FinishedRun:
        """Collect it after a backward whose gradients are to be divided by a factor."""
        return cls(
            [(each, _divided(each.leaf.grad, factor)) for each in inputs],
            [
                (each, each.grads_of(visit, factor), list(visit.written))
                for each, visit in zip(states, visits, strict=True)
            ],
        )

    def hand_back(self) -> None:
        """Add the gradients to those of other layers."""
        for each, grad in self.inputs:
            each.add(grad)
        for states, grads, written in self.states:
            states.settle(grads, written)


def _divided(grad: Tensor | None, factor: float) -> Tensor | None:
    return grad if grad is None or factor == 1.0 else grad.float() / factor


def _sum(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return new if old is None else old
    return old + new
