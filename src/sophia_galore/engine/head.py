"""The head over a block of micro-batches: final norm, projection to the vocabulary and loss, never the full logits.

Logits are computed tile by tile, and only at counted positions. An objective whose token weights depend on the
log-probabilities needs one more pass over the logits, before the others.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from sophia_galore.data.batches import IGNORED, MicroBatch
from sophia_galore.engine.cross_entropy import TokenWeight
from sophia_galore.engine.embedding import TokenRows
from sophia_galore.engine.layer_graph import Gradients, Tensors
from sophia_galore.engine.logits import LossOf, Tile, logits_of
from sophia_galore.engine.objective import CountedTokens, Objective, sequence_numbers
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.projected_gradient import LazyTerms, ProjectedSum
from sophia_galore.model.architecture import Architecture
from sophia_galore.numerics.clocks import Clocks
from sophia_galore.numerics.subspace import Gradient, ProjectedGradient, Projector
from sophia_galore.optim.request import BasisFromGradient, FromGradient, Wants, whole_gradients
from sophia_galore.weights.store import WeightStore

# Tokens per backward through the norm: its float32 temporaries are about ten times as large as its input.
_NORM_TOKENS = 1024
_MEAN_CROSS_ENTROPY = Objective()


class Head:
    """The head over the counted positions of some micro-batches.

    Args:
        architecture: The model's modules.
        store: The weights.
        dtype: Compute precision.
        observer: Receives the category of each tensor.
        hidden: Per micro-batch (B, T, d), the output of the last layer.
        batches: The micro-batches.
        objective: The loss to minimise.
        clocks: Sample the labels, if the objective does.
        wants: Returns the form in which the gradient of the head's or the embedding's weight is needed. If the basis
            is made from the gradient, each product with the gradient computes the logits once more.
        chunk_bytes: Size of the float32 logits that are computed at once, in bytes.
        frozen: Names of weights that get no gradient.
        num_counted: N, the number of counted tokens of the effective batch, of which other processes may have some;
            None: they are all here.

    Attributes:
        labels: (n,) int64, the labels of the counted positions, in the order of the micro-batches; sampled labels are
            here after `backward`.
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
        clocks: Clocks | None = None,
        wants: Wants = whole_gradients,
        chunk_bytes: int,
        frozen: Collection[str] = (),
        num_counted: int | None = None,
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
        # fp16 computes the gradient of the summed loss: divided by the number of tokens it would underflow.
        self._num_counted = len(self.labels) if num_counted is None else num_counted
        self._scale = float(self._num_counted) if dtype == torch.float16 else 1.0
        self._bias = self._read_bias()
        self._bias_grad: Tensor | None = None
        loss = LossOf(self.labels, architecture.logit_form.cap, clocks, chunk_bytes, self._bias)
        self._logits = logits_of(store, architecture.head_name, dtype, loss, observer)

    def loss_sum(self) -> float:
        """Compute the summed cross-entropy in nats, without gradients."""
        return self._logits.loss_sum(self._norm(self._entering, self._norm_weights()))

    def backward(self) -> tuple[float, list[Tensor], Gradients]:
        """Run forward and backward through the head.

        Returns:
            The loss, or this process's part of it; the gradient with respect to the hidden states, per micro-batch
            (B, T, d) (float32 if the compute precision is float16, else in compute precision); and the float32
            gradients of the norm and of an untied head's weight, unless there is a `late_basis` for the latter.
        """
        architecture = self._architecture
        now, trains = self._product, architecture.head_name not in self._frozen
        later = trains and now is None and (architecture.tied or self._request is not None)
        with torch.no_grad():
            normed = self._norm(self._entering, self._norm_weights())
            if later:
                self._normed = normed  # needed for the weight's gradient
            loss, self._weight = self._weigh(normed)
            weight_grad = self._zero_grad(architecture.head_name) if trains and not (now or later) else None
            loss_sum, normed_grad = self._walk(normed, now, weight_grad)
            if now is not None:
                self._unscale(now)
                if architecture.tied and self._dtype != torch.float32:
                    now.narrow()  # it waits until the backward of all layers is done
                    self._observer.tag(now.sum, "gradients")
            del normed
        in_grads, norm_grads = self._through_norm(normed_grad)
        gradients: Gradients = {**norm_grads}
        if self._bias_grad is not None and architecture.head_bias_name is not None:
            gradients[architecture.head_bias_name] = self._bias_grad.div_(self._scale)
            self._bias_grad = None
        if weight_grad is not None:
            gradients[architecture.head_name] = weight_grad
        elif not architecture.tied and now is not None:
            gradients[architecture.head_name] = ProjectedGradient(now.sum)
            self._product = None
        return loss_sum / self._num_counted if loss is None else loss, in_grads, gradients

    @property
    def name(self) -> str:
        """The name of the head's weight."""
        return self._architecture.head_name

    @property
    def late_basis(self) -> BasisFromGradient | None:
        """What makes the basis of an untied head from its gradient, which `terms` computes then; None: nothing."""
        return None if self._architecture.tied or self._normed is None else self.basis_of(self.name)

    def basis_of(self, name: str) -> BasisFromGradient | None:
        """Return what makes a basis from a gradient.

        Args:
            name: The head's or an embedding's weight.

        Returns:
            The function; None if the basis is known, or the whole gradient is wanted.
        """
        request = self._request if name == self.name else self._request_of(name)
        return None if request is None or isinstance(request, Projector) else request

    def terms(self, name: str = "", rows: TokenRows | None = None) -> LazyTerms:
        """Return a gradient of which only products are formed, each by another pass over the logits.

        Call it after `backward`, before that weight changes.

        Args:
            name: An embedding's weight; "": the head's.
            rows: The gradient with respect to embeddings; None: there is none to add.
        """
        has_logits = not name or name == self.name

        def add_to(product: ProjectedSum) -> None:
            self._observer.tag(product.sum, "gradients")
            if has_logits:
                self._add_terms(product)
            if rows is not None:
                product.add_rows(rows.tokens, rows.grad)

        return LazyTerms(self._store[name or self.name].shape, self._device, add_to)

    def end(self) -> None:
        """Free what was kept for `terms`."""
        self._normed = None

    @torch.no_grad()
    def embedding_grad(self, name: str, rows: TokenRows) -> Gradient:
        """Compute the gradient of an embedding's weight, including a tied head's part, if it needs no `basis_of`.

        Call it after `backward`, before that weight changes.

        Args:
            name: The weight's name.
            rows: The gradient with respect to embeddings.

        Returns:
            (V, d) float32, or the projected gradient.
        """
        tied = self.name == name
        product = self._product if tied else self._product_of(name, self._request_of(name))
        if tied:
            self._product = None
        if product is not None:
            product.widen()
            product.add_rows(rows.tokens, rows.grad)
            return ProjectedGradient(product.sum)
        grad = self._tied_weight_grad() if tied else self._zero_grad(name)
        return grad.index_add_(0, rows.tokens, rows.grad)

    def _weigh(self, normed: Tensor) -> tuple[float | None, TokenWeight]:
        """Return the loss (None: it is the mean over the next pass) and the scaled token weights."""
        if not self._objective.needs_log_probs:
            return None, self._scale / self._num_counted
        tokens = CountedTokens(self.labels, sequence_numbers(self._batches))
        loss, weights = self._objective.weigh(tokens, self._logits.log_probs(normed))
        return loss, weights * self._scale

    def _walk(self, normed: Tensor, product: ProjectedSum | None, weight_grad: Tensor | None) -> tuple[float, Tensor]:
        """Return the summed cross-entropy and the gradient with respect to `normed`; add up the weight's gradient."""
        # If the gradient comes in several parts, they are summed in float32: rounding each partial sum loses too much.
        dtype = torch.float32 if self._logits.in_parts else self._dtype
        normed_grad = torch.zeros(normed.shape, dtype=dtype, device=normed.device)
        add = self._adder(product, normed) if product is not None else None

        bias_grad = None
        if self._bias is not None and self._architecture.head_bias_name not in self._frozen:
            bias_grad = self._bias_grad = torch.zeros_like(self._bias)

        def visit(tile: Tile) -> None:
            if bias_grad is not None:
                bias_grad[tile.vocab_slice].add_(tile.grad.sum(0))
            normed_grad[tile.tokens].add_(tile.grad.to(self._dtype) @ tile.weight)
            if add is not None:
                add(tile)
            elif weight_grad is not None:
                self._add_weight_grad(weight_grad, tile, normed)

        loss = self._logits.walk(normed, self._weight, visit)
        return loss, normed_grad

    def _through_norm(self, normed_grad: Tensor) -> tuple[list[Tensor], Tensors]:
        """Backward through the norm, by chunks of tokens, so that only a part of its graph exists at a time."""
        entering, sums = self._entering, Tensors()
        del self._entering
        leaves = {
            name: weight.detach().requires_grad_(name not in self._frozen)
            for name, weight in self._norm_weights().items()
        }
        for part, part_grad in zip(entering.split(_NORM_TOKENS), normed_grad.split(_NORM_TOKENS), strict=True):
            leaf = part.detach().requires_grad_()
            with torch.enable_grad():
                self._norm(leaf, leaves).backward(part_grad.to(self._dtype))
            assert leaf.grad is not None  # the norm depends on its input
            part.copy_(leaf.grad)  # the gradient overwrites the input, which is not needed any more
            for name, weight in leaves.items():
                if weight.grad is not None:
                    sums[name] = sums[name].add_(weight.grad) if name in sums else weight.grad.float()
                    weight.grad = None
        return self._scatter(entering), {name: total / self._scale for name, total in sums.items()}

    def _add_terms(self, product: ProjectedSum) -> None:
        """Add the head's terms to a projected gradient, by another pass over the logits."""
        assert self._normed is not None
        self._logits.walk(self._normed, self._weight, self._adder(product, self._normed))
        self._unscale(product)

    def _adder(self, product: ProjectedSum, normed: Tensor) -> Callable[[Tile], None]:
        """Return a function that adds a tile's term to a projected gradient."""
        saved: dict[int, Tensor] = {}

        def add(tile: Tile) -> None:
            first = tile.tokens.start
            token_input = saved[first] if first in saved else product.save_input(normed[tile.tokens].float())
            if product.saves_less:  # the next vocabulary slice uses it again
                saved[first] = token_input
            product.add(tile.grad, token_input, tile.vocab_slice)

        return add

    def _unscale(self, product: ProjectedSum) -> None:
        if self._scale != 1.0:
            product.sum.div_(self._scale)

    def _tied_weight_grad(self) -> Tensor:
        """Compute the gradient of the tied head's weight, (V, d) float32, by another pass over the logits."""
        normed, grad = self._normed, self._zero_grad(self._architecture.head_name)
        assert normed is not None
        self._logits.walk(normed, self._weight, lambda tile: self._add_weight_grad(grad, tile, normed))
        return grad

    def _request_of(self, name: str) -> Projector | BasisFromGradient | None:
        request = self._wants(name) if name not in self._frozen else None
        return request.basis if isinstance(request, FromGradient) else request

    def _product_of(self, name: str, request: Projector | BasisFromGradient | None) -> ProjectedSum | None:
        """Return an empty sum for a projected gradient, float32 like the logits; None if it is not wanted projected."""
        if not isinstance(request, Projector):
            return None
        product = ProjectedSum(request, self._store[name].shape, torch.float32, self._device)
        self._observer.tag(product.sum, "gradients")
        return product

    def _zero_grad(self, name: str) -> Tensor:
        """Return zeros for the gradient of the head or of an embedding, (V, d) float32."""
        shape = self._store[name].shape
        grad = torch.zeros(shape, dtype=torch.float32, device=self._device)
        self._observer.tag(grad, "gradients")
        return grad

    def _add_weight_grad(self, grad: Tensor, tile: Tile, normed: Tensor) -> None:
        grad[tile.vocab_slice].addmm_(tile.grad.T, normed[tile.tokens].float(), alpha=1 / self._scale)

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
        inner = {self._architecture.norm_names[name]: weight for name, weight in weights.items()}
        normed: Tensor = functional_call(self._architecture.norm, inner, (hidden,))
        # A factor on the logits is one on what enters the head.
        scale = self._architecture.logit_form.scale
        return normed if scale == 1.0 else normed * scale

    def _read_bias(self) -> Tensor | None:
        """Return the head's bias, (V,) float32; None if it has none."""
        name = self._architecture.head_bias_name
        if name is None:
            return None
        with self._store.borrow(name) as borrowed:
            return borrowed[name].values(torch.float32).detach().clone()

    def _norm_weights(self) -> Tensors:
        names = self._architecture.norm_names
        with self._store.borrow(*names) as borrowed:
            return {name: borrowed[name].values(self._dtype) for name in names}
