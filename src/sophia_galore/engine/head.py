"""The head: norm, projection to the vocabulary, loss; logits never exist as a whole.

Only positions whose label counts are computed, a chunk of them at a time. Their labels are the data's, or
drawn from the model's own distribution: the gradient by those is what Sophia's Gauss-Newton-Bartlett
estimate of the curvature is made of (arXiv 2305.14342, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.cross_entropy import chunks, draw_labels, loss_sum, loss_sum_and_grad
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.product import Product, Projectors, whole_gradients
from sophia_galore.model.anatomy import Anatomy
from sophia_galore.model.store import WeightStore

Grads = dict[str, Tensor]


class Head:
    """The head over the counted positions of an effective batch.

    Args:
        anatomy: The model's parts.
        store: The weights.
        dtype: Compute precision.
        observer: Is told what tensors are.
        hidden: Per micro-batch (B, T, d), the output of the last layer.
        batches: The micro-batches.
        projector: What the gradients of the head's and the embedding's weight are wanted times.
        sampler: Draws the labels; None: they are the data's.
        chunk_bytes: Bytes of the float32 logits that are worked on at once.

    Attributes:
        labels: (N,) int64, the labels of the counted positions, micro-batch after micro-batch; drawn ones are
            here once `backward` is done.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        store: WeightStore,
        dtype: torch.dtype,
        observer: Observer,
        hidden: Sequence[Tensor],
        batches: Sequence[MicroBatch],
        projector: Projectors = whole_gradients,
        sampler: torch.Generator | None = None,
        *,
        chunk_bytes: int,
    ) -> None:
        self._anatomy, self._store, self._dtype, self._observer = anatomy, store, dtype, observer
        self._shapes = [part.shape for part in hidden]
        self._counted = [batch.labels != -100 for batch in batches]
        self.labels = torch.cat([batch.labels[mask] for batch, mask in zip(batches, self._counted, strict=True)])
        self._entering = torch.cat([part[mask] for part, mask in zip(hidden, self._counted, strict=True)]).detach()
        self._projector, self._sampler, self._chunk_bytes = projector, sampler, chunk_bytes
        self._product = self._product_of(anatomy.head_name)
        self._normed: Tensor | None = None
        # fp16 works on the gradient of the summed loss, since divided by the tokens it would underflow.
        self._scale = float(len(self.labels)) if dtype == torch.float16 else 1.0
        self._divisor = len(self.labels) / self._scale

    def loss_sum(self) -> float:
        """Summed cross-entropy in nats, without gradients."""
        weight = self._weight()
        normed = self._norm(self._entering, self._norm_weights())
        total = 0.0
        for rows in chunks(len(self.labels), weight.shape[0], self._chunk_bytes):
            logits = self._logits(normed[rows], weight)
            total += float(loss_sum(logits, self.labels[rows], self._anatomy.logit_softcap))
        return total

    def backward(self) -> tuple[float, list[Tensor], Grads]:
        """Forward and backward through the head.

        Returns:
            Mean loss in nats; per micro-batch (B, T, d) the gradient by the hidden states (float32 if the
            compute precision is float16, else in compute precision); float32 gradients of the norm and,
            unless it is tied, of the head's weight or their product.
        """
        anatomy = self._anatomy
        entering = self._entering.requires_grad_()
        leaves = {key: weight.detach().requires_grad_() for key, weight in self._norm_weights().items()}
        normed = self._norm(entering, leaves)
        weight = self._weight()
        product = self._product
        weight_grad = None if anatomy.tied or product else self._zero_grad()
        normed_grad = torch.empty_like(normed)
        total = 0.0
        with torch.no_grad():
            for rows in chunks(len(self.labels), weight.shape[0], self._chunk_bytes):
                loss, logits_grad = self._chunk(rows, normed, weight, self._sampler)
                total += float(loss)
                normed_grad[rows] = logits_grad.to(self._dtype) @ weight
                if product is not None:
                    product.add(logits_grad, product.keep(normed[rows].float()))
                elif weight_grad is not None:
                    self._add_weight_grad(weight_grad, logits_grad, normed[rows])
                del logits_grad
        normed.backward(normed_grad)
        assert entering.grad is not None  # the norm depends on its input
        in_grads = self._scatter(entering.grad)
        grads: Grads = {
            f"{anatomy.norm_name}.{key}": leaf.grad.float() / self._scale
            for key, leaf in leaves.items()
            if leaf.grad is not None
        }
        if product is not None and self._scale != 1.0:
            product.sum.div_(self._scale)
        if weight_grad is not None:
            grads[anatomy.head_name] = weight_grad
        elif not anatomy.tied and product is not None:
            grads[anatomy.head_name] = product.sum
            self._product = None
        elif product is None:
            self._normed = normed.detach()  # for the tied weight's gradient, later
        del self._entering
        return total / len(self.labels), in_grads, grads

    @torch.no_grad()
    def embedding_grad(self, tokens: Tensor, rows_grad: Tensor) -> Tensor:
        """Gradient of the embedding, that of the tied head included; after `backward`, before that weight changes.

        Args:
            tokens: (U,) int64, different tokens.
            rows_grad: (U, d) float32, the gradient of their rows as the embedding's.

        Returns:
            (V, d) float32, or its product.
        """
        anatomy = self._anatomy
        product = self._product if anatomy.tied else self._product_of(anatomy.embed_name)
        self._product = None
        if product is not None:
            product.add_rows(tokens, rows_grad)
            return product.sum
        grad = self._tied_weight_grad() if anatomy.tied else self._zero_grad()
        return grad.index_add_(0, tokens, rows_grad)

    def _tied_weight_grad(self) -> Tensor:
        """Gradient of the tied head's weight, (V, d) float32, by the chunks' logits once more."""
        assert self._normed is not None
        weight, grad = self._weight(), self._zero_grad()
        for rows in chunks(len(self.labels), weight.shape[0], self._chunk_bytes):
            _, logits_grad = self._chunk(rows, self._normed, weight)
            self._add_weight_grad(grad, logits_grad, self._normed[rows])
            del logits_grad
        return grad

    def _product_of(self, name: str) -> Product | None:
        """For the weight of the head or the embedding, a new product if one is wanted; float32, as the logits are."""
        wanted = self._projector(name)
        if wanted is None:
            return None
        weight = self._store[name]
        product = Product(wanted, weight.shape, torch.float32, weight.device)
        self._observer.tag(product.sum, "gradients")
        return product

    def _zero_grad(self) -> Tensor:
        """Zeros for the gradient of the head or the embedding, (V, d) float32."""
        weight = self._store[self._anatomy.embed_name]
        grad = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        self._observer.tag(grad, "gradients")
        return grad

    def _chunk(
        self, rows: slice, normed: Tensor, weight: Tensor, sampler: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed loss and gradient by the logits of some tokens; a sampler draws their labels first."""
        logits = self._logits(normed[rows], weight)
        if sampler is not None:
            self.labels[rows] = draw_labels(logits, self._anatomy.logit_softcap, sampler)
        loss, grad = loss_sum_and_grad(logits, self.labels[rows], self._anatomy.logit_softcap, self._divisor)
        self._observer.tag(grad, "logits")
        return loss, grad

    def _add_weight_grad(self, grad: Tensor, logits_grad: Tensor, normed: Tensor) -> None:
        grad.addmm_(logits_grad.T, normed.float(), alpha=1 / self._scale)

    def _logits(self, normed: Tensor, weight: Tensor) -> Tensor:
        logits = (normed @ weight.T).float()
        self._observer.tag(logits, "logits")
        return logits

    def _scatter(self, grads: Tensor) -> list[Tensor]:
        dtype = torch.float32 if self._dtype == torch.float16 else self._dtype
        out: list[Tensor] = []
        for shape, mask, part in zip(
            self._shapes, self._counted, grads.split([int(mask.sum()) for mask in self._counted]), strict=True
        ):
            full = torch.zeros(shape, dtype=dtype, device=grads.device)
            full[mask] = part.to(dtype) / self._scale if self._scale != 1.0 else part
            out.append(full)
        return out

    def _norm(self, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        normed: Tensor = functional_call(self._anatomy.norm, weights, (hidden,))
        return normed

    def _norm_weights(self) -> dict[str, Tensor]:
        name = self._anatomy.norm_name
        weights = self._store.materialise(self._store.names(name), self._dtype)
        return {key.removeprefix(f"{name}."): weight for key, weight in weights.items()}

    def _weight(self) -> Tensor:
        name = self._anatomy.head_name
        weight = self._store.materialise([name], self._dtype)[name]
        self._observer.tag(weight, "weights")
        return weight
