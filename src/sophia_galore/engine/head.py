"""The head: norm, projection to the vocabulary, objective; logits never exist as a whole.

Only positions whose label counts are computed, a tile of logits at a time. An objective whose token weights depend on
the log-probabilities costs one more pass over the logits, which comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from sophia_galore.data.batches import IGNORED, MicroBatch
from sophia_galore.engine.cross_entropy import TokenWeight
from sophia_galore.engine.layer import Gradients, Tensors
from sophia_galore.engine.logits import LossOf, Tile, logits_of
from sophia_galore.engine.objective import CountedTokens, Objective, sequence_numbers
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.projected_gradient import LazyTerms, ProjectedSum
from sophia_galore.model.architecture import Architecture
from sophia_galore.numerics.subspace import Gradient, ProjectedGradient, Projector
from sophia_galore.optim.request import GradientRequest, Wants, whole_gradients
from sophia_galore.weights.store import WeightStore

# Tokens that go back through the norm at once: its float32 temporaries are some ten times as large as they are.
_NORM_TOKENS = 1024
_MEAN_CROSS_ENTROPY = Objective()


class Head:
    """The head over the counted positions of an effective batch.

    Args:
        architecture: The model's modules.
        store: The weights.
        dtype: Compute precision.
        observer: Receives the category of each tensor.
        hidden: Per micro-batch (B, T, d), the output of the last layer.
        batches: The micro-batches.
        objective: What is minimised.
        sampler: Draws the labels, if the objective samples them.
        wants: In which form the gradients of the head's and the embedding's weight are wanted. Where the basis comes
            from the gradient, each product with it takes the logits once more.
        chunk_bytes: Bytes of the float32 logits that are worked on at once.
        frozen: Names of weights that get no gradient.

    Attributes:
        labels: (N,) int64, the labels of the counted positions, micro-batch after micro-batch; drawn ones are
            here once `backward` is done.
    """

    def __init__(
        self,
        architecture: Architecture,
        store: WeightStore,
        dtype: torch.dtype,
        observer: Observer,
        hidden: Sequence[Tensor],
        batches: Sequence[MicroBatch],
        *,
        objective: Objective = _MEAN_CROSS_ENTROPY,
        sampler: torch.Generator | None = None,
        wants: Wants = whole_gradients,
        chunk_bytes: int,
        frozen: Collection[str] = (),
    ) -> None:
        self._architecture, self._store, self._dtype, self._observer = architecture, store, dtype, observer
        self._batches, self._objective = batches, objective
        self._shapes = [part.shape for part in hidden]
        self._counted = [batch.labels != IGNORED for batch in batches]
        self.labels = torch.cat([batch.labels[mask] for batch, mask in zip(batches, self._counted, strict=True)])
        self._entering = torch.cat([part[mask] for part, mask in zip(hidden, self._counted, strict=True)]).detach()
        self._device = self._entering.device
        self._wants, self._frozen = wants, frozen
        self._request = self._request_of(architecture.head_name)
        self._product = self._product_of(architecture.head_name, self._request)
        self._normed: Tensor | None = None
        self._weight: TokenWeight = 0.0
        # fp16 works on the gradient of the summed loss, since divided by the tokens it would underflow.
        self._scale = float(len(self.labels)) if dtype == torch.float16 else 1.0
        loss = LossOf(self.labels, architecture.logit_softcap, sampler, chunk_bytes)
        self._logits = logits_of(store, architecture.head_name, dtype, loss, observer)

    def loss_sum(self) -> float:
        """Summed cross-entropy in nats, without gradients."""
        return self._logits.loss_sum(self._norm(self._entering, self._norm_weights()))

    def backward(self) -> tuple[float, list[Tensor], Gradients]:
        """Forward and backward through the head.

        Returns:
            The loss; per micro-batch (B, T, d) the gradient with respect to the hidden states (float32 if the compute
            precision is float16, else in compute precision); float32 gradients of the norm and, if it can be known
            now, of the untied head's weight.
        """
        architecture = self._architecture
        now, trains = self._product, architecture.head_name not in self._frozen
        later = trains and now is None and (architecture.tied or self._request is not None)
        with torch.no_grad():
            normed = self._norm(self._entering, self._norm_weights())
            if later:
                self._normed = normed  # for the weight's gradient
            loss, self._weight = self._weigh(normed)
            weight_grad = self._zero_grad() if trains and not (now or later) else None
            loss_sum, normed_grad = self._walk(normed, now, weight_grad)
            if now is not None:
                self._unscale(now)
                if architecture.tied and self._dtype != torch.float32:
                    now.narrow()  # the layers' turn is before the embedding's
                    self._observer.tag(now.sum, "gradients")
            del normed
        in_grads, norm_grads = self._through_norm(normed_grad)
        gradients: Gradients = {**norm_grads}
        if weight_grad is not None:
            gradients[architecture.head_name] = weight_grad
        elif not architecture.tied and now is not None:
            gradients[architecture.head_name] = ProjectedGradient(now.sum)
            self._product = None
        return loss_sum / len(self.labels) if loss is None else loss, in_grads, gradients

    @torch.no_grad()
    def late_gradient(self) -> Gradients:
        """The gradient of the untied head's weight whose basis had to come from the gradient first.

        After `backward`, before that weight changes, and only if the loss was finite.
        """
        architecture = self._architecture
        if architecture.tied or self._normed is None:
            return {}
        product = self._with_basis_from(self._request, architecture.head_name, self._add_terms)
        self._normed = None
        return {} if product is None else {architecture.head_name: product}

    @torch.no_grad()
    def embedding_grad(self, tokens: Tensor, rows_grad: Tensor) -> Gradient:
        """Gradient of the embedding, that of the tied head included; after `backward`, before that weight changes.

        Args:
            tokens: (U,) int64, different tokens.
            rows_grad: (U, d) float32, the gradient of their rows as the embedding's.

        Returns:
            (V, d) float32, or its product.
        """
        architecture = self._architecture
        request = self._request if architecture.tied else self._request_of(architecture.embed_name)
        product = self._product if architecture.tied else self._product_of(architecture.embed_name, request)
        self._product = None
        if product is not None:
            product.widen()
            product.add_rows(tokens, rows_grad)
            return ProjectedGradient(product.sum)

        def add_to(product: ProjectedSum) -> None:
            if architecture.tied:
                self._add_terms(product)
            product.add_rows(tokens, rows_grad)

        chosen = self._with_basis_from(request, architecture.embed_name, add_to)
        if chosen is not None:
            return chosen
        grad = self._tied_weight_grad() if architecture.tied else self._zero_grad()
        return grad.index_add_(0, tokens, rows_grad)

    def _weigh(self, normed: Tensor) -> tuple[float | None, TokenWeight]:
        """The loss, None where it is the mean of what the next pass finds; and the tokens' weights, scaled."""
        if not self._objective.needs_log_probs:
            return None, self._scale / len(self.labels)
        tokens = CountedTokens(self.labels, sequence_numbers(self._batches))
        loss, weights = self._objective.weigh(tokens, self._logits.log_probs(normed))
        return loss, weights * self._scale

    def _walk(self, normed: Tensor, product: ProjectedSum | None, weight_grad: Tensor | None) -> tuple[float, Tensor]:
        """Summed cross-entropy, and the gradient with respect to the normed states; the weight's is added up."""
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

        loss = self._logits.walk(normed, self._weight, visit)
        return loss, normed_grad

    def _through_norm(self, normed_grad: Tensor) -> tuple[list[Tensor], Tensors]:
        """Gradients with respect to the hidden states and the norm's weights; a part of its graph exists at a time."""
        entering, sums = self._entering, Tensors()
        del self._entering
        norm = self._architecture.norm_name
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

    def _with_basis_from(
        self, request: GradientRequest, name: str, add_to: Callable[[ProjectedSum], None]
    ) -> ProjectedGradient | None:
        """A weight's projected gradient, where the basis is made from the gradient; None: that is not wanted."""
        if request is None or isinstance(request, Projector):
            return None

        def add_and_tag(product: ProjectedSum) -> None:
            self._observer.tag(product.sum, "gradients")
            add_to(product)

        gradient = LazyTerms(self._store[name].shape, self._device, add_and_tag)
        return ProjectedGradient(gradient.of(request(gradient)))

    def _add_terms(self, product: ProjectedSum) -> None:
        """The head's terms of a projected gradient, by the logits once more."""
        assert self._normed is not None
        self._logits.walk(self._normed, self._weight, self._adder(product, self._normed))
        self._unscale(product)

    def _adder(self, product: ProjectedSum, normed: Tensor) -> Callable[[Tile], None]:
        """Adds a tile's term to a projected gradient."""
        saved: dict[int, Tensor] = {}

        def add(tile: Tile) -> None:
            first = tile.tokens.start
            of_tokens = saved[first] if first in saved else product.save_input(normed[tile.tokens].float())
            if product.saves_less:  # so that the next vocabulary slice need not make it again
                saved[first] = of_tokens
            product.add(tile.grad, of_tokens, tile.words)

        return add

    def _unscale(self, product: ProjectedSum) -> None:
        if self._scale != 1.0:
            product.sum.div_(self._scale)

    def _tied_weight_grad(self) -> Tensor:
        """Gradient of the tied head's weight, (V, d) float32, by the logits once more."""
        normed, grad = self._normed, self._zero_grad()
        assert normed is not None
        self._logits.walk(normed, self._weight, lambda tile: self._add_weight_grad(grad, tile, normed))
        return grad

    def _request_of(self, name: str) -> GradientRequest:
        return self._wants(name) if name not in self._frozen else None

    def _product_of(self, name: str, request: GradientRequest) -> ProjectedSum | None:
        """For the weight of the head or the embedding, an empty sum if one is wanted; float32, as the logits are."""
        if not isinstance(request, Projector):
            return None
        product = ProjectedSum(request, self._store[name].shape, torch.float32, self._device)
        self._observer.tag(product.sum, "gradients")
        return product

    def _zero_grad(self) -> Tensor:
        """Zeros for the gradient of the head or the embedding, (V, d) float32."""
        shape = self._store[self._architecture.embed_name].shape
        grad = torch.zeros(shape, dtype=torch.float32, device=self._device)
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

    def _norm(self, hidden: Tensor, weights: Tensors) -> Tensor:
        normed: Tensor = functional_call(self._architecture.norm, weights, (hidden,))
        return normed

    def _norm_weights(self) -> Tensors:
        name = self._architecture.norm_name
        with self._store.borrow(name) as borrowed:
            return borrowed.values_of(name, self._dtype)
