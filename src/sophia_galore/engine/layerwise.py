"""The layer-wise step: the layer is the unit of work, the micro-batch is the inner loop.

    forward, no grad:  for layer: for micro-batch: hidden = layer(hidden)          layer inputs are kept
    head:              for tile of logits: loss, gradient by the hidden states
    backward:          for layer, last to first: for micro-batch: recompute, backward; then step the layer
    embedding:         scatter; step

Gradients add up over the whole effective batch while those of one layer only exist. A tied head and
embedding are one weight with two gradients: the head's is formed last, beside the embedding's, so
that it need not stay alive while the layers work; that costs computing the logits once more.

Of the last layers graphs may be kept in forward; backward then goes straight through them, and nothing is computed
twice. A kept graph is one layer's own: its gradients come to be when backward comes to the layer, as everybody's do.

Where a gradient is wanted in a product with a known matrix only, the product is what is handed on, and
of a linear layer's, the head's or the embedding's weight the gradient itself never exists. The product
is small: a tied weight's is formed with the head and waits for the embedding's part. Where the matrix
depends on the gradient, head and embedding are asked for several products, one after the other.

An observer sees a step of L layers in these phases, each a context of its own, none within another; planning of memory
relies on it:

    forward            the embedding
    forward      x L   a layer, first to last; with its graph where that is kept
    head               loss, gradient by the hidden states, gradient or product of an untied head and of the norm
    step               these are handed on
    backward, step     x L: a layer, last to first, and its gradients are handed on
    backward           the gradient by the embedding's rows
    head or backward   the embedding's gradient; `head` if it is tied, since then there are logits once more
    step               it is handed on

A part that is repeated enters its phase again. Evaluation is one phase `eval`. Layers in and before which all weights
are frozen are not gone back through, but are phases all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.cross_entropy import block_words, default_chunk_bytes
from sophia_galore.engine.embedding import Noise, embed
from sophia_galore.engine.head import Grads, Head
from sophia_galore.engine.layer import Layers
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.passage import Asked, Passage, StepResult, to_device
from sophia_galore.engine.product import Choosers, Projectors, no_choosers, whole_gradients
from sophia_galore.engine.relief import AtOnce, OnOom, Relief, Remedy, silent
from sophia_galore.errors import NonFiniteError
from sophia_galore.model.anatomy import Anatomy, count_idle_layers
from sophia_galore.numerics.random import generator
from sophia_galore.weights.store import WeightStore

Apply = Callable[[Grads], None]


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
        keep_layers: Graphs of so many last layers are kept through the forward pass of a step instead of being
            recomputed in backward. More than there are layers: all.
        on_oom: When memory runs out in forward, in the head or in backward: stop; or adapt, which repeats that part
            with fewer kept graphs, smaller tiles of logits or smaller micro-batches, and goes on like that.
        say: Is told in a sentence what was adapted.
        frozen: Names of weights that get no gradient.
        neftune_alpha: Size of the noise on embeddings in a step (`Noise`); 0: none.
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
        keep_layers: int = 0,
        on_oom: OnOom = "stop",
        say: Callable[[str], None] = silent,
        frozen: Collection[str] = (),
        neftune_alpha: float = 0.0,
    ) -> None:
        self._anatomy = anatomy
        self._store = store
        self._dtype = compute_dtype
        self._device = device
        self._seed = seed
        self._observer = observer or Observer()
        self._frozen, self._neftune_alpha = frozenset(frozen), neftune_alpha
        self._trains_embedding = anatomy.embed_name not in self._frozen
        trained = [name for name in anatomy.parameter_shapes() if name not in self._frozen]
        self._num_idle = count_idle_layers(anatomy.layer_names, anatomy.embed_name, trained)
        at_once = AtOnce(min(keep_layers, len(anatomy.layers) - self._num_idle), logits_chunk_bytes)
        self._relief = Relief(at_once, on_oom, say, device)
        self._layers = Layers(anatomy, store, compute_dtype, device, seed, self._observer, self._frozen)

    @property
    def at_once(self) -> AtOnce:
        """How much is in memory at once, as was asked or as was learned since."""
        return self._relief.at_once

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
        asked = Asked(step, projector, chooser, sampled_labels)
        noise = Noise(self._neftune_alpha, self._seed, step) if self._neftune_alpha else None
        way = self._set_out(batches, noise)
        self._enter(way, step)
        while len(way.inputs) <= len(anatomy.layers):
            self._forward(way, asked)
        head, loss, grads = self._through_head(way, asked)
        self._hand_on(apply, grads)
        for index in reversed(range(len(anatomy.layers))):
            self._hand_on(apply, self._backward(way, index, asked))
        rows_grad, grads = None, {}
        with observer.phase("backward"):
            if self._trains_embedding:
                rows_grad = way.embedded.rows_grad(way.out_grads, anatomy.padding_idx)
        with observer.phase("head" if anatomy.tied else "backward"):
            if rows_grad is not None:
                grads = {anatomy.embed_name: head.embedding_grad(way.embedded.tokens, rows_grad)}
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
        way = self._set_out(batches)
        was_training = anatomy.model.training
        anatomy.model.eval()

        def forward() -> list[Tensor]:
            embedded = way.embed(way.batches)
            hidden = list(embedded.hidden)
            for index in range(len(anatomy.layers)):
                self._layers.evaluate(index, hidden, [calls[index] for calls in embedded.calls])
            return hidden

        try:
            with self._observer.phase("eval"):
                hidden = self._relief.run(lambda: "evaluation", forward, lambda: self._fewer_rows(way))
                loss = self._relief.run(
                    lambda: "the head in evaluation",
                    lambda: self._head(hidden, way.batches).loss_sum(),
                    lambda: self._fewer_logits(way),
                )
                return loss, sum(batch.num_counted for batch in batches)
        finally:
            anatomy.model.train(was_training)

    def _set_out(self, batches: Sequence[MicroBatch], noise: Noise | None = None) -> Passage:
        on_device = [to_device(batch, self._device) for batch in batches]
        how = partial(embed, self._anatomy, self._store, dtype=self._dtype, trains=self._trains_embedding, noise=noise)
        return Passage(on_device, how, self._relief.at_once.most_rows)

    def _enter(self, way: Passage, step: int) -> None:
        def part() -> None:
            with self._observer.phase("forward"):
                way.enter()

        self._relief.run(lambda: f"the embedding at step {step}", part, lambda: self._fewer_rows(way))

    def _forward(self, way: Passage, asked: Asked) -> None:
        """One layer on."""

        def next_layer() -> int:
            return len(way.inputs) - 1  # another one, once a remedy began anew

        def part() -> None:
            with self._observer.phase("forward"):
                index = next_layer()
                inputs, calls = way.inputs[-1], way.calls(index)
                if index < self._first_kept():
                    out = self._layers.forward(index, inputs, calls, asked.step)
                else:
                    out, way.graphs[index] = self._layers.keep(index, inputs, calls, asked.step, asked.projector)
                way.inputs.append(out)

        def remedy() -> Remedy | None:
            is_kept = next_layer() >= self._first_kept()
            return self._fewer_graphs(way) if way.graphs or is_kept else self._fewer_rows(way)

        self._relief.run(lambda: f"forward of layer {next_layer()} at step {asked.step}", part, remedy)

    def _through_head(self, way: Passage, asked: Asked) -> tuple[Head, float, Grads]:
        """The loss, and back through the head."""
        step, is_choosing = asked.step, False

        def part() -> tuple[Head, float, Grads]:
            nonlocal is_choosing
            with self._observer.phase("head"):
                way.out_grads = []
                sampled = asked.sampled_labels
                sampler = generator(self._seed, "sampled labels", step, device=self._device) if sampled else None
                head = self._head(self._take_output(way, step), way.batches, asked.projector, sampler, asked.chooser)
                loss, way.out_grads, grads = head.backward()
                if not math.isfinite(loss):
                    raise NonFiniteError(
                        f"The loss is {loss} at step {step}.",
                        "Lower training.learning_rate, or compute in fp32 (training.compute_dtype=fp32).",
                    )
                is_choosing = True
                return head, loss, grads | head.chosen_grad()

        def remedy() -> Remedy | None:
            if is_choosing:
                return None  # the optimizer's basis may have been refreshed
            return self._fewer_graphs(way) if way.graphs else self._fewer_logits(way)

        return self._relief.run(lambda: f"the head at step {step}", part, remedy)

    def _take_output(self, way: Passage, step: int) -> list[Tensor]:
        """What came out of the last layer; at a repetition it is computed once more, since nobody kept it."""
        last = len(self._anatomy.layers) - 1
        if len(way.inputs) > last + 1:
            return way.inputs.pop()
        if last in way.graphs:
            return [out.detach() for _, out in way.graphs[last].kept]
        return self._layers.forward(last, way.inputs[-1], way.calls(last), step)

    def _head(
        self,
        hidden: list[Tensor],
        batches: Sequence[MicroBatch],
        projector: Projectors = whole_gradients,
        sampler: torch.Generator | None = None,
        chooser: Choosers = no_choosers,
    ) -> Head:
        parts = (self._anatomy, self._store, self._dtype, self._observer, hidden, batches, projector, sampler)
        chunk_bytes = self._relief.at_once.chunk_bytes or default_chunk_bytes(self._device)
        return Head(*parts, chooser=chooser, chunk_bytes=chunk_bytes, frozen=self._frozen)

    def _backward(self, way: Passage, index: int, asked: Asked) -> Grads:
        """One layer back; returns its gradients."""
        if index < self._num_idle:
            with self._observer.phase("backward"):
                way.inputs.pop()
                return {}

        def part() -> tuple[Grads, list[Tensor]]:
            with self._observer.phase("backward"):
                graph = way.graphs.pop(index, None)
                inputs, calls = way.inputs[-1], way.calls(index)
                parts = (inputs, calls, way.out_grads, asked.step, asked.projector, graph)
                return self._layers.backward(index, *parts, spends=not self._relief.adapts)

        def remedy() -> Remedy | None:
            # A layer that can't be computed once more has no room for its graph beside others either.
            if way.graphs or index >= self._first_kept():
                return self._fewer_graphs(way)
            # In forward, dropout drew for the micro-batches as they are.
            return None if self._anatomy.has_dropout else self._fewer_rows(way)

        grads, in_grads = self._relief.run(lambda: f"backward of layer {index} at step {asked.step}", part, remedy)
        way.out_grads = in_grads
        way.inputs.pop()
        return grads

    def _first_kept(self) -> int:
        return len(self._anatomy.layers) - self._relief.at_once.keep_layers

    def _fewer_graphs(self, way: Passage) -> Remedy | None:
        return self._relief.fewer_graphs(lambda: way.keep_graphs(self._first_kept()))

    def _fewer_logits(self, way: Passage) -> Remedy | None:
        num_tokens = sum(batch.num_counted for batch in way.batches)
        shape = self._store[self._anatomy.head_name].shape
        default_bytes = default_chunk_bytes(self._device)
        words = shape[0]
        if not self._store[self._anatomy.head_name].is_ready(self._dtype):
            chunk_bytes = self._relief.at_once.chunk_bytes or default_bytes
            words = block_words(shape[0], shape[1] * self._dtype.itemsize, chunk_bytes)
        return self._relief.fewer_logits(num_tokens, words, default_bytes)

    def _fewer_rows(self, way: Passage) -> Remedy | None:
        # Dropout draws other numbers for smaller micro-batches, so all layers have to see these.
        return self._relief.fewer_rows(
            way.batches, lambda most_rows: way.split(most_rows, anew=self._anatomy.has_dropout)
        )

    def _hand_on(self, apply: Apply, grads: Grads) -> None:
        with self._observer.phase("step"), torch.no_grad():
            if not grads:
                return  # all of them are frozen
            for name in grads:  # no name for a gradient itself: it would live as long as `apply` runs
                self._observer.tag(grads[name], "gradients")
            apply(grads)
            grads.clear()
