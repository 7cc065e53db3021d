"""The layer-wise step: the layer is the unit of work, the micro-batch is the inner loop.

    forward, no grad:  for layer: for micro-batch: hidden = layer(hidden)          layer inputs are kept
    head:              for tile of logits: loss, gradient with respect to the hidden states
    backward:          for layer, last to first: for micro-batch: recompute, backward; then update the layer's weights
    embedding:         scatter; update

Gradients are summed over the whole effective batch, and only those of one layer exist at a time. `forward` computes
the loss. `backward` is a generator: it yields the finished gradients of one layer after the other while that layer's
weights are borrowed. Each gradient is full or projected, as the optimizer requested.

A tied head and embedding are one weight whose gradient has two parts. The head's part is formed last, together with
the embedding's, so that it does not take memory during the layers' backward; this costs one more computation of the
logits. A projected gradient is small, so the head's part is formed with the head and kept. If the basis is made from
the gradient, head and embedding compute several products one after the other.

The last layers may run without activation checkpointing: their graphs are kept in forward and they are not recomputed.

If a layer's full gradients are formed apart from one another, its backward runs several times (`passes.py`), all within
one phase.

An observer sees a step of L layers as these phases, none inside another. The memory forecast relies on this order:

    forward            the embedding
    forward      x L   a layer, first to last; with its graph if it is kept
    head               the loss; the gradients with respect to the hidden states, the norm and an untied head
    step               the update with these gradients
    backward, step     x L: a layer, last to first, and the update with its gradients
    backward           the gradient with respect to the embedding's rows
    head or backward   the embedding's gradient; `head` if it is tied, since the logits are computed once more
    step               the update with it

The caller of `backward` enters the phase `step` with `using`. A part that is repeated enters its phase again. If
gradients are summed over processes during the backward of the next part, an update comes one phase `step` later: the
first of these phases is empty, and the last one has two updates.

Evaluation is one phase, `eval`. There is no backward through the first layers if they and all weights before them are
frozen, but their phases are entered all the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sophia_galore.data.batches import MicroBatch, by_block
from sophia_galore.data.portion import Portion
from sophia_galore.engine.activations import StepActivations, StepRequest, to_device
from sophia_galore.engine.cross_entropy import default_chunk_bytes
from sophia_galore.engine.embedding import EmbeddingNoise, TokenRows, embed, embed_blocks
from sophia_galore.engine.head import Head
from sophia_galore.engine.heads import Heads
from sophia_galore.engine.layer import Layers
from sophia_galore.engine.layer_graph import Gradients, Tensors
from sophia_galore.engine.objective import CrossEntropy, Objective
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.passes import FullGradients
from sophia_galore.engine.reducer import Reducer
from sophia_galore.engine.retry import ChunkSizes, OnOom, silent
from sophia_galore.engine.routing import Routing
from sophia_galore.engine.step_results import FinishedGradients, ForwardPass, StepResult
from sophia_galore.engine.step_retry import StepRetry
from sophia_galore.errors import NonFiniteError, RunError
from sophia_galore.model.architecture import Architecture, count_idle_layers
from sophia_galore.numerics.clocks import Clocks
from sophia_galore.numerics.pairwise_sum import PairwiseSum
from sophia_galore.numerics.subspace import tensor_of
from sophia_galore.optim.request import Wants, whole_gradients
from sophia_galore.streaming.spill import Spill
from sophia_galore.weights.store import WeightStore

_CROSS_ENTROPY = CrossEntropy()


@dataclass(frozen=True)
class _Part:
    """A part of backward.

    Args:
        names: The modules and weights that it uses, and whose gradients it forms.
        then: The layer or weight that is needed next.
        form: Forms the gradients, in this process.
    """

    names: tuple[str, ...]
    then: str
    form: Callable[[], Gradients]


class LayerwiseEngine:
    """Runs a model layer by layer over an effective batch.

    Args:
        architecture: The model's modules; parameters on the meta device.
        store: The weights.
        compute_dtype: float32, bfloat16 or float16.
        device: The compute device.
        seed: The run's seed, for dropout and drawn labels.
        observer: Receives phases and the category of each tensor.
        logits_chunk_bytes: Size of the float32 logits that are computed at once, in bytes; 0: the device's default.
        keep_layers: Number of last layers that run without activation checkpointing; at most all of them.
        on_oom: When memory runs out in forward, in the head or in backward: "stop", or "adapt", which repeats that part
            with smaller chunks (`engine/retry.py`) and keeps these sizes.
        say: Receives a sentence about each adaptation.
        frozen: Names of weights that get no gradient.
        neftune_alpha: Scale of the noise on embeddings in a step (`EmbeddingNoise`); 0: no noise.
        spill: Where layer inputs wait for their backward; None: on the device.
        full_gradients: Which full gradients of a layer's matrices may be in memory together, if only products of them
            are needed.
        reducer: Sums gradients over the processes that share an effective batch.
        counts_routing: Whether to count which experts tokens go to; a loss that depends on it needs it.
    """

    def __init__(
        self,
        architecture: Architecture,
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
        spill: Spill | None = None,
        full_gradients: FullGradients = "layer",
        reducer: Reducer | None = None,
        counts_routing: bool = True,
    ) -> None:
        self._architecture = architecture
        self._store = store
        self._dtype = compute_dtype
        self._device = device
        self._seed = seed
        self._observer = observer or Observer()
        self._spill, self._counts_routing = spill, counts_routing
        self._reducer = reducer or Reducer()
        self._frozen, self._neftune_alpha = frozenset(frozen), neftune_alpha
        self._entry = (architecture.embed_name, *architecture.lookups, *architecture.entry_names)
        trained = [name for name in architecture.parameter_shapes() if name not in self._frozen]
        self._num_idle = count_idle_layers(architecture.layer_names, self._entry, trained)
        most_kept = len(architecture.layers) - self._num_idle
        sizes = ChunkSizes(min(keep_layers, most_kept), logits_chunk_bytes or default_chunk_bytes(device))
        self._retry = StepRetry(architecture, store, compute_dtype, sizes, on_oom, say, device)
        self._layers = Layers(
            architecture, store, compute_dtype, device, seed, self._observer, self._frozen, full_gradients
        )

    @property
    def chunk_sizes(self) -> ChunkSizes:
        """The current chunk sizes: as configured, or smaller after memory ran out."""
        return self._retry.sizes

    def forward(
        self,
        portion: Portion,
        *,
        step: int,
        wants: Wants = whole_gradients,
        objective: Objective = _CROSS_ENTROPY,
    ) -> ForwardPass:
        """Run the embedding, the layers and the head, and compute the loss.

        Args:
            portion: This process's micro-batches of one optimizer step.
            step: Number of the optimizer step, for dropout and sampled labels.
            wants: Returns the form in which a parameter's gradient is needed: full, (m, n); or as a product, G A (m, k)
                or A^T G (k, n). In half precision A is rounded to it; in fp16 its columns should have about unit
                length, or products may overflow. If the basis is made from the gradient, head and embedding do so
                without forming it. The gradient of a layer's weight is full in this case or, with
                `full_gradients="matrix"`, reduced at once.
            objective: The loss to minimise; sampled labels are a function of seed and step.

        Returns:
            The state from which `backward` continues; for one use.

        Raises:
            NonFiniteError: The loss is not finite.
        """
        is_divided = not self._reducer.is_alone or portion.batches[0].block != portion.batches[-1].block
        if objective.needs_log_probs and is_divided:
            raise RunError(
                f"{type(objective).__name__} weighs tokens of the whole batch.",
                "Train in one process, with distributed.sum_blocks=1.",
            )
        routing = None
        if self._counts_routing and any(self._architecture.routers) and not objective.samples_labels:
            routing = Routing(self._architecture)
        request = StepRequest(step, self._reducer.wants(wants), objective, portion, routing)
        noise = None
        if self._neftune_alpha:
            noise = EmbeddingNoise(self._neftune_alpha, self._seed, step, portion.first_row)
        acts = self._start(portion.batches, noise, portion.first_batch, step)
        self._retry.run_part(
            partial(self._enter, acts),
            acts,
            lambda: f"the embedding at step {step}",
            partial(self._retry.in_rows, acts),
        )
        while len(acts.inputs) <= len(self._architecture.layers):
            self._retry.run_part(
                partial(self._forward_layer, acts, request),
                acts,
                lambda: f"forward of layer {len(acts.inputs) - 1} at step {step}",
                partial(self._retry.in_forward, acts),
            )
        if routing is not None:
            routing.finish(self._reducer)
        head, loss, gradients = self._retry.run_part(
            partial(self._through_head, acts, request),
            acts,
            lambda: f"the head at step {step}",
            partial(self._retry.in_head, acts),
        )
        loss = self._reducer.total(loss)
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The loss is {loss} at step {step}.",
                "Lower training.learning_rate, or compute in fp32 (training.compute_dtype=fp32).",
            )
        summary = routing.summary if routing else None
        result = StepResult(loss, portion.num_tokens, portion.num_counted, summary)
        return ForwardPass(result, request, acts, head, gradients)

    def backward(self, done: ForwardPass) -> Generator[FinishedGradients]:
        """Run backward through the layers and the embedding.

        Args:
            done: From `forward`; used up.

        Yields:
            The finished float32 gradients, over the whole effective batch: of head and norm; of each layer, last to
            first; and of the embedding. They are empty if all weights of that part are frozen. The weights may be
            changed until the generator is resumed. Close the generator if you do not exhaust it.
        """
        if not self._reducer.overlaps:
            for part in self._parts(done):
                with self._store.borrow(*part.names, trains=True, then=part.then) as weights:
                    gradients = self._reducer.start(part.form())()
                    finished = FinishedGradients(weights, gradients, (tuple(gradients),))
                    del gradients  # else they would live during the next part's backward
                    yield finished
                    del finished
            return
        before: tuple[str, ...] = ()
        sums: Callable[[], Gradients] = Gradients
        for part in self._parts(done):
            with self._store.borrow(*part.names, trains=True, then=part.then):
                own_sums = self._reducer.start(part.form())
            gradients, names = sums(), before
            parts: tuple[tuple[str, ...], ...] = (tuple(gradients),)
            before, sums = part.names, own_sums
            if not part.then:  # the last part
                gradients, names, sums = gradients | own_sums(), (*names, *part.names), Gradients
                parts = (*parts, tuple(name for name in gradients if name not in parts[0]))
            with self._store.borrow(*names, trains=True) as weights:
                finished = FinishedGradients(weights, gradients, parts)
                del gradients, own_sums
                yield finished
                del finished

    def _parts(self, done: ForwardPass) -> Iterator[_Part]:
        """Yield the parts of backward, in order; the gradients of one must be formed before the next one is taken."""
        architecture, acts = self._architecture, done.activations
        names = architecture.layer_names
        yield _Part(architecture.exit_names, names[-1], lambda: done.gradients)
        for index in reversed(range(len(names))):
            is_idle = index < self._num_idle
            then = names[index - 1] if index > self._num_idle else architecture.embed_name
            yield _Part(() if is_idle else (names[index],), then, partial(self._layer_part, acts, index, done.request))
        yield _Part(self._entry, "", partial(self._through_embedding, acts, done.head))

    @contextmanager
    def using(self, finished: FinishedGradients) -> Iterator[Gradients]:
        """Enter the phase `step`, without autograd; drop the gradients that are left at its end."""
        with self._observer.phase("step"), torch.no_grad():
            for name in finished.gradients:  # no name for a gradient itself: it would live as long as the context
                self._observer.tag(tensor_of(finished.gradients[name]), "gradients")
            yield finished.gradients
            finished.gradients.clear()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, int]:
        """Compute the loss only, without dropout.

        Args:
            batches: Micro-batches that go through the layers together.

        Returns:
            Summed cross-entropy in nats and the number of counted tokens.
        """
        acts = self._start(batches, None)
        was_training = self._architecture.model.training
        self._architecture.model.eval()
        try:
            with self._observer.phase("eval"):
                hidden = self._retry.run_part(
                    partial(self._evaluate_layers, acts), acts, lambda: "evaluation", partial(self._retry.in_rows, acts)
                )
                loss = self._retry.run_part(
                    partial(self._evaluate_head, hidden, acts),
                    acts,
                    lambda: "the head in evaluation",
                    partial(self._retry.in_logits, acts, keeps=False),
                )
                return loss, _num_counted(batches)
        finally:
            self._architecture.model.train(was_training)

    # The parts of a step. Each may be repeated.

    def _start(
        self, batches: Sequence[MicroBatch], noise: EmbeddingNoise | None, first_batch: int = 0, step: int = 0
    ) -> StepActivations:
        on_device = [to_device(batch, self._device) for batch in batches]
        of_block = partial(
            embed,
            self._architecture,
            self._store,
            dtype=self._dtype,
            frozen=self._frozen,
            noise=noise,
            seed=self._seed,
            step=step,
        )
        how = partial(embed_blocks, of_block, first_batch=first_batch)
        return StepActivations(on_device, how, self.chunk_sizes.max_rows, self._spill)

    def _enter(self, acts: StepActivations) -> None:
        with self._observer.phase("forward"):
            acts.enter()

    def _forward_layer(self, acts: StepActivations, request: StepRequest) -> None:
        """Run the next layer, which is the first one again if a retry restarted with smaller micro-batches."""
        with self._observer.phase("forward"):
            index = len(acts.inputs) - 1
            inputs, calls = acts.inputs[-1], acts.calls(index)
            routing = request.routing
            if routing is not None:
                routing.begin(index)
            if index < self._retry.first_kept:
                out = self._layers.forward(index, inputs, calls, request.step, routing)
            else:
                out, acts.graphs[index] = self._layers.keep(index, inputs, calls, request.step, request.wants, routing)
            # The first layer's input is a part of the embedding's graph.
            acts.advance(out, leaves=max(1, self._num_idle) <= index < self._retry.first_kept)

    def _through_head(self, acts: StepActivations, request: StepRequest) -> tuple[Heads, float, Gradients]:
        """Run forward and backward through the head."""
        architecture = self._architecture
        with (
            self._observer.phase("head"),
            self._store.borrow(*architecture.exit_names, trains=True),
        ):
            acts.out_grads, acts.head_is_final = [], False
            hidden = self._take_output(acts, request.step)
            head = self._heads(hidden, acts, request)
            del hidden
            loss, acts.out_grads, gradients = head.backward()
            if math.isfinite(loss):
                acts.head_is_final = True  # from here on, the optimizer may refresh its basis
                gradients |= head.late_gradient()
            return head, loss, gradients

    def _take_output(self, acts: StepActivations, step: int) -> list[Tensor]:
        """Return the last layer's output; a repetition of the head computes it again, since it was not kept."""
        last = len(self._architecture.layers) - 1
        if len(acts.inputs) > last + 1:
            return acts.inputs.pop()
        if last in acts.graphs:
            return [run.out.detach() for run in acts.graphs[last].kept]
        return self._layers.forward(last, acts.inputs[-1], acts.calls(last), step)

    def _heads(self, hidden: list[Tensor], acts: StepActivations, request: StepRequest | None = None) -> Heads:
        """Return the head of each block of micro-batches."""
        heads: dict[int, Head] = {}
        start = num_before = 0
        for of_block in by_block(acts.batches):
            end = start + len(of_block)
            heads[of_block[0].block] = self._head(hidden[start:end], of_block, num_before, request)
            start, num_before = end, num_before + _num_counted(of_block)
        return Heads(heads)

    def _head(
        self, hidden: list[Tensor], batches: Sequence[MicroBatch], num_before: int, request: StepRequest | None
    ) -> Head:
        """Return the head over a block; `num_before`: counted tokens of this process before it."""
        clocks = None
        if request and request.objective.samples_labels:
            first = request.portion.first_counted + num_before
            clocks = Clocks(self._seed, ("sampled labels", request.step), first)
        return Head(
            self._architecture,
            self._store,
            self._dtype,
            self._observer,
            hidden,
            batches,
            objective=request.objective if request else _CROSS_ENTROPY,
            clocks=clocks,
            wants=request.wants if request else whole_gradients,
            chunk_bytes=self.chunk_sizes.logits_bytes,
            frozen=self._frozen,
            num_counted=request.portion.num_counted if request else None,
        )

    def _layer_part(self, acts: StepActivations, index: int, request: StepRequest) -> Gradients:
        """Form the gradients of a layer; in smaller chunks if memory runs out."""
        if index < self._num_idle:
            return self._backward_layer(acts, index, request)
        return self._retry.run_part(
            partial(self._backward_layer, acts, index, request),
            acts,
            partial("backward of layer {} at step {}".format, index, request.step),
            partial(self._retry.in_backward, acts, index),
        )

    def _backward_layer(self, acts: StepActivations, index: int, request: StepRequest) -> Gradients:
        """Run the backward pass of one layer and return its gradients."""
        with self._observer.phase("backward"):
            if index < self._num_idle:
                acts.inputs.pop()
                return {}
            graph = acts.graphs.pop(index, None)
            inputs, calls = acts.last_input(), acts.calls(index)
            acts.passes = acts.passes or (graph.passes if graph else self._layers.new_passes())
            parts = (inputs, calls, acts.out_grads, request.step, request.wants, graph, acts.passes, request.routing)
            gradients, in_grads = self._layers.backward(index, *parts, spends=not self._retry.adapts)
        acts.out_grads, acts.passes = in_grads, None
        acts.inputs.pop()
        return gradients

    def _through_embedding(self, acts: StepActivations, head: Heads) -> Gradients:
        architecture, rows = self._architecture, list[Tensors]()
        gradients: Gradients = {}
        with self._observer.phase("backward"):
            if any(name not in self._frozen for name in self._entry):
                sums, out_grads = PairwiseSum(), iter(acts.out_grads)
                for batches, part in zip(by_block(acts.batches), acts.embedded, strict=True):
                    of_rows, of_weights = part.grads([next(out_grads) for _ in batches], architecture.padding_idx)
                    rows.append(of_rows)
                    sums.add(batches[0].block, of_weights)
                gradients |= sums.total()
        with self._observer.phase("head" if architecture.tied else "backward"):
            for name in list(rows[0] if rows else ()):
                # Taken out inside the phase, so that the observer sees them freed there.
                taken = [
                    TokenRows(part.tokens, of_rows.pop(name)) for part, of_rows in zip(acts.embedded, rows, strict=True)
                ]
                gradients[name] = head.embedding_grad(name, taken)
                del taken
            return gradients

    def _evaluate_layers(self, acts: StepActivations) -> list[Tensor]:
        embedded = acts.embed(acts.batches)
        hidden = [first for part in embedded for first in part.hidden]
        for index in range(len(self._architecture.layers)):
            self._layers.evaluate(index, hidden, [calls[index] for part in embedded for calls in part.calls])
        return hidden

    def _evaluate_head(self, hidden: list[Tensor], acts: StepActivations) -> float:
        with self._store.borrow(self._architecture.head_name):
            return self._heads(hidden, acts).loss_sum()


def _num_counted(batches: Sequence[MicroBatch]) -> int:
    return sum(batch.num_counted for batch in batches)
