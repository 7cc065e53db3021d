"""The head over an effective batch whose micro-batches are divided into blocks.

Each block has a `Head` of its own, since tiles of logits that reach over two blocks would mix their sums. What the
heads find is summed pairwise (`numerics/pairwise_sum.py`). With a single block this is its head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sophia_galore.engine.embedding import TokenRows
from sophia_galore.engine.head import Head
from sophia_galore.engine.layer_graph import Gradients, Tensors
from sophia_galore.numerics.pairwise_sum import PairwiseSum
from sophia_galore.numerics.subspace import (
    Gradient,
    LazyGradient,
    MultipliedBy,
    ProjectedGradient,
    Projector,
    tensor_of,
)
from sophia_galore.optim.request import BasisFromGradient

_LOSS = "the loss"  # no parameter has this name


class Heads:
    """The head over blocks of micro-batches.

    Args:
        heads: The head of each block, by the block's number.
    """

    def __init__(self, heads: dict[int, Head]) -> None:
        self._heads = heads
        self._any = next(iter(heads.values()))

    def loss_sum(self) -> float:
        """Compute the summed cross-entropy in nats, without gradients."""
        return sum(head.loss_sum() for head in self._heads.values())

    def backward(self) -> tuple[float, list[Tensor], Gradients]:
        """Run forward and backward through the head, as `Head.backward`."""
        sums, in_grads, are_projected = PairwiseSum(), list[Tensor](), dict[str, bool]()
        for block, head in self._heads.items():
            loss, of_block, gradients = head.backward()
            in_grads += of_block
            are_projected |= {name: isinstance(each, ProjectedGradient) for name, each in gradients.items()}
            terms = {name: tensor_of(gradients.pop(name)) for name in list(gradients)}
            sums.add(block, terms | {_LOSS: torch.tensor(loss, dtype=torch.float64)})
        totals = sums.total()
        loss = float(totals.pop(_LOSS))
        return loss, in_grads, _as_gradients(totals, are_projected)

    @torch.no_grad()
    def late_gradient(self) -> Gradients:
        """Compute the gradient of an untied head's weight whose basis is made from the gradient.

        Call it after `backward`, before that weight changes, and only if the loss was finite.

        Returns:
            The projected gradient by the weight's name; empty if there is none.
        """
        basis = self._any.late_basis
        if basis is None:
            return {}
        product = self._with_basis(basis, lambda block, head: head.terms())
        for head in self._heads.values():
            head.end()
        return {self._any.name: product}

    @torch.no_grad()
    def embedding_grad(self, name: str, rows: Sequence[TokenRows]) -> Gradient:
        """Compute the gradient of an embedding's weight, including a tied head's part.

        Call it after `backward`, before that weight changes.

        Args:
            name: The weight's name.
            rows: For each block, the gradient with respect to the embeddings of its tokens; used up.

        Returns:
            (V, d) float32, or the projected gradient.
        """
        left = dict(zip(self._heads, rows, strict=True))
        basis = self._any.basis_of(name)
        if basis is not None:
            return self._with_basis(basis, lambda block, head: head.terms(name, left[block]))
        sums, is_projected = PairwiseSum(), False
        for block, head in self._heads.items():
            grad = head.embedding_grad(name, left.pop(block))
            is_projected = isinstance(grad, ProjectedGradient)
            sums.add(block, {name: tensor_of(grad)})
            del grad
        return _as_gradients(sums.total(), {name: is_projected})[name]

    def _with_basis(self, basis: BasisFromGradient, terms: Callable[[int, Head], LazyGradient]) -> ProjectedGradient:
        """Return a projected gradient whose basis is made from the gradient."""
        parts = {block: terms(block, head) for block, head in self._heads.items()}

        def product(projector: Projector) -> Tensor:
            sums = PairwiseSum()
            for block, part in parts.items():
                sums.add(block, {self._any.name: part.of(projector)})
            return sums.total()[self._any.name]

        return ProjectedGradient(product(basis(MultipliedBy(next(iter(parts.values())), product))))


def _as_gradients(sums: Tensors, are_projected: dict[str, bool]) -> Gradients:
    return {name: ProjectedGradient(each) if are_projected[name] else each for name, each in sums.items()}
