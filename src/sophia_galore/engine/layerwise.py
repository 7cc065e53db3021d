"""The layer-wise step: the layer is the unit of work, the micro-batch is the inner loop.

    forward, no grad:  for layer: for micro-batch: hidden = layer(hidden)          layer inputs are kept
    head:              for tile of logits: loss, gradient by the hidden states
    backward:          for layer, last to first: for micro-batch: recompute, backward; then step the layer
    embedding:         scatter; step

Gradients add up over the whole effective batch while those of one layer only exist. A tied head and
embedding are one weight with two gradients: the head's is formed last, beside the embedding's, so
that it need not stay alive while the layers work; that costs computing the logits once more.

Where a gradient is wanted in a product with a known matrix only, the product is what is handed on, and
of a linear layer's, the head's or the embedding's weight the gradient itself never exists. The product
is small: a tied weight's is formed with the head and waits for the embedding's part. Where the matrix
depends on the gradient, head and embedding are asked for several products, one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.capture import LayerCall
from sophia_galore.engine.cross_entropy import default_chunk_bytes
from sophia_galore.engine.determinism import strictly_repeatable
from sophia_galore.engine.embedding import embed
from sophia_galore.engine.head import Grads, Head
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.product import Choosers, Product, Projectors, fold_formed, no_choosers, whole_gradients
from sophia_galore.engine.projected_linear import ProjectedLinears
from sophia_galore.errors import NonFiniteError, RunError
from sophia_galore.model.anatomy import Anatomy
from sophia_galore.model.store import WeightStore
from sophia_galore.numerics.random import generator, key

Apply = Callable[[Grads], None]

# In fp16 the gradient by a layer's output is scaled so that its largest entry is 1; where sums over
# tokens overflow nevertheless, the layer is done again with a scale so many times smaller.
_FP16_BACKOFF = 16.0
_FP16_MAX_TRIES = 6


@dataclass(frozen=True)
class StepResult:
    """What one step found.

    Args:
        loss: Mean cross-entropy over the counted tokens of the effective batch, in nats; of drawn labels, if
            they were drawn.
        num_tokens: Tokens of the effective batch, padding not included.
        num_counted: Tokens whose loss counts.
    """

    loss: float
    num_tokens: int
    num_counted: int


class LayerwiseEngine:
    """Runs a model layer by layer over an effective batch.

    Args:
        anatomy: The model's parts; parameters on the meta device.
        store: The weights.
        compute_dtype: float32, bfloat16 or float16.
        device: Where the arithmetic runs.
        seed: The run's seed, for dropout and drawn labels.
        observer: Is told phases and what tensors are.
        logits_chunk_bytes: Bytes of the float32 logits that are worked on at once; 0: as suits the device.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        store: WeightStore,
        *,
        compute_dtype: torch.dtype,
        device: torch.device,
        seed: int,
        observer: Observer | None = None,
        logits_chunk_bytes: int = 0,
    ) -> None:
        self._anatomy = anatomy
        self._store = store
        self._dtype = compute_dtype
        self._device = device
        self._seed = seed
        self._observer = observer or Observer()
        self._chunk_bytes = logits_chunk_bytes

    def step(
        self,
        batches: Sequence[MicroBatch],
        apply: Apply,
        *,
        step: int,
        projector: Projectors = whole_gradients,
        chooser: Choosers = no_choosers,
        sampled_labels: bool = False,
    ) -> StepResult:
        """Forward and backward over an effective batch; each layer's gradients are handed on and dropped.

        Args:
            batches: The micro-batches of one optimizer step.
            apply: Called with the finished gradients (name to float32 tensor) of one layer after the other;
                may change the weights of that layer.
            step: Number of the optimizer step, for dropout and drawn labels.
            projector: For a weight's name, what its gradient G is wanted times: `apply` gets the product, G A
                (m, k) or A^T G (k, n), in place of G (m, n). None: `apply` gets G. In half precision A is rounded
                to it; in fp16 its columns should be of about unit length, or products may leave the range.
            chooser: For the head's or embedding's weight, where `projector` gives None: who says what G is wanted
                times, asked with a G that is not formed before that weight changes. None: `apply` gets G.
            sampled_labels: Draw the labels of the counted positions from the model's own distribution, as a
                function of seed and step (`Head`).

        Returns:
            Loss and token counts.

        Raises:
            NonFiniteError: The loss is not finite; `apply` was not called.
        """
        anatomy, observer = self._anatomy, self._observer
        batches = [self._to_device(batch) for batch in batches]
        with observer.phase("forward"):
            embedded = embed(anatomy, self._store, batches, self._dtype)
        inputs = self._forward([first.detach() for first in embedded.hidden], embedded.calls, step)
        with observer.phase("head"):
            sampler = generator(self._seed, "sampled labels", step, device=self._device) if sampled_labels else None
            hidden = inputs.pop()
            head = self._head(hidden, batches, projector, sampler, chooser)
            del hidden
            loss, hidden_grads, grads = head.backward()
            if not math.isfinite(loss):
                raise NonFiniteError(
                    f"The loss is {loss} at step {step}.",
                    "Lower training.learning_rate, or compute in fp32 (training.compute_dtype=fp32).",
                )
            grads |= head.chosen_grad()
        self._hand_on(apply, grads)
        for index in reversed(range(len(anatomy.layers))):
            calls = [layer_calls[index] for layer_calls in embedded.calls]
            with observer.phase("backward"):
                grads, hidden_grads = self._backward_layer(index, inputs.pop(), calls, hidden_grads, step, projector)
            self._hand_on(apply, grads)
        with observer.phase("backward"):
            rows_grad = embedded.rows_grad(hidden_grads, anatomy.padding_idx)
        with observer.phase("head" if anatomy.tied else "backward"):
            grads = {anatomy.embed_name: head.embedding_grad(embedded.tokens, rows_grad)}
        self._hand_on(apply, grads)
        return StepResult(loss, sum(batch.num_tokens for batch in batches), sum(batch.num_counted for batch in batches))

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Loss only, dropout off.

        Args:
            batches: Micro-batches that are taken through the layers together.

        Returns:
            Summed cross-entropy in nats and the number of counted tokens.
        """
        anatomy = self._anatomy
        batches = [self._to_device(batch) for batch in batches]
        was_training = anatomy.model.training
        anatomy.model.eval()
        try:
            with self._observer.phase("eval"):
                embedded = embed(anatomy, self._store, batches, self._dtype)
                hidden = list(embedded.hidden)
                for index in range(len(anatomy.layers)):
                    weights = self._layer_weights(index)
                    for which, calls in enumerate(embedded.calls):
                        hidden[which] = self._run(index, weights, calls[index], hidden[which])
                head = self._head(hidden, batches)
                return head.loss_sum(), sum(batch.num_counted for batch in batches)
        finally:
            anatomy.model.train(was_training)

    def _head(
        self,
        hidden: list[Tensor],
        batches: Sequence[MicroBatch],
        projector: Projectors = whole_gradients,
        sampler: torch.Generator | None = None,
        chooser: Choosers = no_choosers,
    ) -> Head:
        parts = (self._anatomy, self._store, self._dtype, self._observer)
        chunk_bytes = self._chunk_bytes or default_chunk_bytes(self._device)
        return Head(*parts, hidden, batches, projector, sampler, chooser=chooser, chunk_bytes=chunk_bytes)

    @torch.no_grad()
    def _forward(self, hidden: list[Tensor], calls: list[list[LayerCall]], step: int) -> list[list[Tensor]]:
        """All layers; returns the inputs of each layer and, last, the output of the last one."""
        kept = [hidden]
        for index in range(len(self._anatomy.layers)):
            with self._observer.phase("forward"):
                weights = self._layer_weights(index)
                out: list[Tensor] = []
                for which, layer_calls in enumerate(calls):
                    with self._dropout_stream(step, index, which):
                        out.append(self._run(index, weights, layer_calls[index], kept[-1][which]))
                kept.append(out)
                del weights  # or the next layer's would be made beside them
        return kept

    def _backward_layer(
        self,
        index: int,
        inputs: list[Tensor],
        calls: list[LayerCall],
        out_grads: list[Tensor],
        step: int,
        projector: Projectors,
    ) -> tuple[Grads, list[Tensor]]:
        """Recompute one layer for every micro-batch and go back through it.

        Returns:
            The layer's gradients or their products (float32, full names) and, per micro-batch, the gradient by its
            input.
        """
        if self._dtype != torch.float16:
            return self._backward_layer_scaled(index, inputs, calls, out_grads, step, projector, 1.0)
        largest = max(float(grad.abs().amax()) for grad in out_grads)
        scale = 2.0 ** -math.floor(math.log2(largest)) if largest > 0 else 1.0
        for _ in range(_FP16_MAX_TRIES):
            grads, in_grads = self._backward_layer_scaled(index, inputs, calls, out_grads, step, projector, scale)
            if all(bool(torch.isfinite(grad).all()) for grad in [*grads.values(), *in_grads]):
                break
            scale /= _FP16_BACKOFF
        return grads, in_grads

    def _backward_layer_scaled(
        self,
        index: int,
        inputs: list[Tensor],
        calls: list[LayerCall],
        out_grads: list[Tensor],
        step: int,
        projector: Projectors,
        scale: float,
    ) -> tuple[Grads, list[Tensor]]:
        name = self._anatomy.layer_names[index]
        leaves = {key: weight.detach().requires_grad_() for key, weight in self._layer_weights(index).items()}
        if self._observer.watches_tensors:
            for leaf in leaves.values():
                leaf.register_post_accumulate_grad_hook(self._tag_gradient)
        products = self._products(name, leaves, projector)
        linears = ProjectedLinears((leaves[key], product) for key, product in products.items())
        sums: Grads = {}
        in_grads: list[Tensor] = []
        for which, call in enumerate(calls):
            entering = inputs[which].requires_grad_()
            # A mode costs some microseconds at every operation: only where it has something to do.
            with self._dropout_stream(step, index, which), linears if products else nullcontext():
                out = self._run(index, leaves, call, entering)
            signal = out_grads[which] if scale == 1.0 else out_grads[which] * scale
            with strictly_repeatable(self._device):
                out.backward(signal.to(out.dtype))
            del out, signal
            assert entering.grad is not None  # the layer's output depends on its input
            # In fp16 the gradient travels between layers in float32, where it can't underflow.
            in_grads.append(entering.grad if self._dtype != torch.float16 else entering.grad.float() / scale)
            entering.grad = None
            fold_formed(products, leaves)
            if self._dtype != torch.float32:
                _fold(sums, leaves)
        if self._dtype == torch.float32:
            sums = {key: leaf.grad for key, leaf in leaves.items() if leaf.grad is not None}
        sums |= {key: product.sum for key, product in products.items() if product.touched}
        without = leaves.keys() - sums.keys()
        if without:
            raise RunError(f"{name}.{min(without)} gets no gradient: the layer's output does not depend on it.")
        if scale != 1.0:
            for grad in sums.values():
                grad.div_(scale)
        return {f"{name}.{key}": sums[key] for key in leaves}, in_grads

    def _products(self, layer: str, leaves: Grads, projector: Projectors) -> dict[str, Product]:
        """Empty products for those of a layer's weights whose gradient is wanted in one."""
        products: dict[str, Product] = {}
        for name, leaf in leaves.items():
            wanted = projector(f"{layer}.{name}")
            if wanted is not None:
                products[name] = Product(wanted, leaf.shape, self._dtype, self._device)
                self._observer.tag(products[name].sum, "gradients")
        return products

    def _hand_on(self, apply: Apply, grads: Grads) -> None:
        with self._observer.phase("step"), torch.no_grad():
            for name in grads:  # no name for a gradient itself: it would live as long as `apply` runs
                self._observer.tag(grads[name], "gradients")
            apply(grads)
            grads.clear()

    def _tag_gradient(self, leaf: Tensor) -> None:
        if leaf.grad is not None:
            self._observer.tag(leaf.grad, "gradients")

    def _layer_weights(self, index: int) -> dict[str, Tensor]:
        name = self._anatomy.layer_names[index]
        weights = self._store.materialise(self._store.names(name), self._dtype)
        for weight in weights.values():
            self._observer.tag(weight, "weights")
        return {key.removeprefix(f"{name}."): weight for key, weight in weights.items()}

    def _run(self, index: int, weights: dict[str, Tensor], call: LayerCall, hidden: Tensor) -> Tensor:
        out = functional_call(self._anatomy.layers[index], weights, (hidden, *call.args), call.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    @contextmanager
    def _dropout_stream(self, step: int, index: int, which: int) -> Iterator[None]:
        """Dropout draws the same numbers in forward and recomputation, and after a resume."""
        if not self._anatomy.has_dropout:
            yield
            return
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(key(self._seed, "dropout", step, index, which))
            yield

    def _to_device(self, batch: MicroBatch) -> MicroBatch:
        mask = batch.attention_mask
        return replace(
            batch,
            input_ids=batch.input_ids.to(self._device),
            labels=batch.labels.to(self._device),
            attention_mask=None if mask is None else mask.to(self._device),
        )


def _fold(sums: Grads, leaves: Grads) -> None:
    """Add the leaves' half-precision gradients to the float32 sums, and drop them."""
    for name, leaf in leaves.items():
        if leaf.grad is None:
            continue
        if name in sums:
            sums[name].add_(leaf.grad)
        else:
            sums[name] = leaf.grad.float()
        leaf.grad = None
