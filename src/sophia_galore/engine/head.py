"""The head: norm, projection to the vocabulary, loss; logits never exist as a whole.

Only positions whose label counts are computed, a tile of logits at a time. Their labels are the data's, or
drawn from the model's own distribution: the gradient by those is what Sophia's Gauss-Newton-Bartlett
estimate of the curvature is made of (arXiv 2305.14342, algorithm 2).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.logits import LossOf, Tile, logits_of
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.product import Choosers, Product, Projectors, Terms, no_choosers, whole_gradients
from sophia_galore.model.anatomy import Anatomy
from sophia_galore.weights.store import WeightStore

Grads = dict[str, Tensor]

# Tokens that go back through the norm at once: its float32 temporaries are some ten times as large as they are.
_NORM_TOKENS = 1024


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
        chooser: Where `projector` wants nothing: who says what the gradient is wanted times, having seen it in
            products; each of these takes the logits once more.
        chunk_bytes: Bytes of the float32 logits that are worked on at once.
        frozen: Names of weights that get no gradient.

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
        chooser: Choosers = no_choosers,
        chunk_bytes: int,
        frozen: Collection[str] = (),
    ) -> None:
        self._anatomy, self._store, self._dtype, self._observer = anatomy, store, dtype, observer
        self._shapes = [part.shape for part in hidden]
        self._counted = [batch.labels != -100 for batch in batches]
        self.labels = torch.cat([batch.labels[mask] for batch, mask in zip(batches, self._counted, strict=True)])
        self._entering = torch.cat([part[mask] for part, mask in zip(hidden, self._counted, strict=True)]).detach()
        self._projector, self._chooser, self._frozen = projector, chooser, frozen
        self._product = self._product_of(anatomy.head_name)
        self._normed: Tensor | None = None
        # fp16 works on the gradient of the summed loss, since divided by the tokens it would underflow.
        self._scale = float(len(self.labels)) if dtype == torch.float16 else 1.0
        loss = LossOf(self.labels, anatomy.logit_softcap, len(self.labels) / self._scale, sampler, chunk_bytes)
        self._logits = logits_of(store, anatomy.head_name, dtype, loss, observer)

    def loss_sum(self) -> float:
        """Summed cross-entropy in nats, without gradients."""
        return self._logits.loss_sum(self._norm(self._entering, self._norm_weights()))

    def backward(self) -> tuple[float, list[Tensor], Grads]:
        """Forward and backward through the head.

        Returns:
            Mean loss in nats; per micro-batch (B, T, d) the gradient by the hidden states (float32 if the
            compute precision is float16, else in compute precision); float32 gradients of the norm and,
            if they can be known now, of the untied head's weight or their product.
        """
        anatomy = self._anatomy
        now, trains = self._product, anatomy.head_name not in self._frozen
        later = trains and now is None and (anatomy.tied or self._is_chosen())
        with torch.no_grad():
            normed = self._norm(self._entering, self._norm_weights())
            if later:
                self._normed = normed  # for the weight's gradient
            weight_grad = self._zero_grad() if trains and not (now or later) else None
            loss, normed_grad = self._walk(normed, now, weight_grad)
            if now is not None:
                self._unscale(now)
                if anatomy.tied and self._dtype != torch.float32:
                    now.lay_by()  # the layers' turn is before the embedding's
                    self._observer.tag(now.sum, "gradients")
            del normed
        in_grads, grads = self._through_norm(normed_grad)
        if weight_grad is not None:
            grads[anatomy.head_name] = weight_grad
        elif not anatomy.tied and now is not None:
            grads[anatomy.head_name] = now.sum
            self._product = None
        return loss / len(self.labels), in_grads, grads

    @torch.no_grad()
    def chosen_grad(self) -> Grads:
        """The product of the untied head's weight whose projector had to see the gradient first.

        After `backward`, before that weight changes, and only if the loss was finite.
        """
        anatomy = self._anatomy
        if anatomy.tied or self._normed is None:
            return {}
        product = self._choose(anatomy.head_name, self._add_terms)
        self._normed = None
        return {} if product is None else {anatomy.head_name: product}

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
            product.take_up()
            product.add_rows(tokens, rows_grad)
            return product.sum

        def add_to(product: Product) -> None:
            if anatomy.tied:
                self._add_terms(product)
            product.add_rows(tokens, rows_grad)

        chosen = self._choose(anatomy.embed_name, add_to)
        if chosen is not None:
            return chosen
        grad = self._tied_weight_grad() if anatomy.tied else self._zero_grad()
        return grad.index_add_(0, tokens, rows_grad)

    def _walk(self, normed: Tensor, product: Product | None, weight_grad: Tensor | None) -> tuple[float, Tensor]:
        """Summed loss, and the gradient by the normed states; that of the weight is added to what is there for it."""
        # Rounding each part of a sum to half precision is one thing, rounding the sum after each part another.
        dtype = torch.float32 if self._logits.in_parts else self._dtype
        normed_grad = torch.zeros(normed.shape, dtype=dtype, device=normed.device)
        add = self._adder(product, normed) if product is not None else None

        def visit(tile: Tile) -> None:
            normed_grad[tile.tokens].add_(tile.grad.to(self._dtype) @ tile.weight)
            if add is not None:
                add(tile)
            elif weight_grad is not None:
                self._add_weight_grad(weight_grad, tile, normed)

        loss = self._logits.walk(normed, visit)
        return loss, normed_grad

    def _through_norm(self, normed_grad: Tensor) -> tuple[list[Tensor], Grads]:
        """Gradients by the hidden states and by the norm's weights; of the norm's graph a part exists at a time."""
        entering, sums = self._entering, Grads()
        del self._entering
        norm = self._anatomy.norm_name
        leaves = {
            key: weight.detach().requires_grad_(f"{norm}.{key}" not in self._frozen)
            for key, weight in self._norm_weights().items()
        }
        for part, part_grad in zip(entering.split(_NORM_TOKENS), normed_grad.split(_NORM_TOKENS), strict=True):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                self._norm(leaf, leaves).backward(part_grad.to(self._dtype))
            assert leaf.grad is not None  # the norm depends on its input
            part.copy_(leaf.grad)  # which takes the place of what entered
            for key, weight in leaves.items():
                if weight.grad is not None:
                    sums[key] = sums[key].add_(weight.grad) if key in sums else weight.grad.float()
                    weight.grad = None
        grads = {f"{norm}.{key}": total / self._scale for key, total in sums.items()}
        return self._scatter(entering), grads

    def _is_chosen(self) -> bool:
        """Whether the head's product is wanted times something that depends on the gradient."""
        return self._chooser(self._anatomy.head_name) is not None

    def _choose(self, name: str, add_to: Callable[[Product], None]) -> Tensor | None:
        """The product of a weight's gradient with what its chooser wants, if it has one."""
        choose = self._chooser(name)
        if choose is None:
            return None
        weight = self._store[name]

        def add_and_tag(product: Product) -> None:
            self._observer.tag(product.sum, "gradients")
            add_to(product)

        unformed = Terms(weight.shape, weight.device, add_and_tag)
        return unformed.of(choose(unformed))

    def _add_terms(self, product: Product) -> None:
        """The head's terms of a product, by the logits once more."""
        assert self._normed is not None
        self._logits.walk(self._normed, self._adder(product, self._normed))
        self._unscale(product)

    def _adder(self, product: Product, normed: Tensor) -> Callable[[Tile], None]:
        """Adds a tile's term to a product."""
        kept: dict[int, Tensor] = {}

        def add(tile: Tile) -> None:
            first = tile.tokens.start
            of_tokens = kept[first] if first in kept else product.keep(normed[tile.tokens].float())
            if product.keeps_little:  # so that the next block of words need not make it again
                kept[first] = of_tokens
            product.add(tile.grad, of_tokens, tile.words)

        return add

    def _unscale(self, product: Product) -> None:
        if self._scale != 1.0:
            product.sum.div_(self._scale)

    def _tied_weight_grad(self) -> Tensor:
        """Gradient of the tied head's weight, (V, d) float32, by the logits once more."""
        normed, grad = self._normed, self._zero_grad()
        assert normed is not None
        self._logits.walk(normed, lambda tile: self._add_weight_grad(grad, tile, normed))
        return grad

    def _product_of(self, name: str) -> Product | None:
        """For the weight of the head or the embedding, a new product if one is wanted; float32, as the logits are."""
        wanted = self._projector(name) if name not in self._frozen else None
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

    def _add_weight_grad(self, grad: Tensor, tile: Tile, normed: Tensor) -> None:
        grad[tile.words].addmm_(tile.grad.T, normed[tile.tokens].float(), alpha=1 / self._scale)

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
        with self._store.borrow(name) as borrowed:
            return borrowed.values(self._dtype)
