"""One layer over all micro-batches: forward, and backward with or without activation checkpointing.

A layer's weights are lent once for all micro-batches (`layer_forward.py`). Its gradients, full or projected, are
summed over the micro-batches and are finished when its backward ends.

With activation checkpointing, backward recomputes the layer. Without it, the layer's autograd graph is kept from
forward; the graph begins at the layer's input, which is detached from the previous layer. Backward uses it once,
micro-batch by micro-batch, and frees each part at once. If full gradients are formed apart from one another
(`passes.py`), the first pass uses the graph, and later ones recompute the layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sophia_galore.data.batches import by_block
from sophia_galore.engine.capture import LayerCall
from sophia_galore.engine.determinism import strictly_repeatable
from sophia_galore.engine.experts import ExpertGraph, take_gradient
from sophia_galore.engine.layer_forward import LayerForward
from sophia_galore.engine.layer_graph import Gradients, LayerGraph, LayerRun, Tensors
from sophia_galore.engine.observe import Observer
from sophia_galore.engine.passes import FullGradients, Passes
from sophia_galore.engine.projected_gradient import ProjectedSum
from sophia_galore.engine.projected_linear import ProjectedLinears
from sophia_galore.engine.routing import Routing
from sophia_galore.engine.shared import FinishedRun, visiting
from sophia_galore.errors import RunError
from sophia_galore.model.architecture import Architecture
from sophia_galore.numerics.pairwise_sum import PairwiseSum
from sophia_galore.numerics.subspace import ProjectedGradient, Projector, tensor_of
from sophia_galore.optim.request import FromGradient, Reduction, Wants
from sophia_galore.weights.store import WeightStore

# In fp16 the gradient with respect to a layer's output is scaled so that its largest entry is about 1. If sums over
# tokens still overflow, the layer's backward is repeated with a scale that is smaller by this factor.
_FP16_BACKOFF = 16.0
_FP16_MAX_TRIES = 6


class Layers:
    """The layers of a model, run one at a time.

    Args:
        architecture: The model's modules; parameters on the meta device.
        store: The weights.
        dtype: Compute precision.
        device: The compute device.
        seed: The run's seed, for dropout.
        observer: Receives the category of each tensor.
        frozen: Names of weights that get no gradient.
        full_gradients: Which full gradients may be in memory together.
    """

    def __init__(
        self,
        architecture: Architecture,
        store: WeightStore,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        observer: Observer,
        frozen: Collection[str] = (),
        full_gradients: FullGradients = "layer",
    ) -> None:
        self._architecture, self._dtype, self._device = architecture, dtype, device
        self._observer, self._frozen = observer, frozen
        self._forward = LayerForward(architecture, store, dtype, device, seed, observer)
        self.new_passes = partial(Passes, full_gradients)

    def evaluate(self, index: int, hidden: list[Tensor], calls: Sequence[LayerCall]) -> None:
        """Run a layer for evaluation; its output replaces its input.

        Args:
            index: Layer number.
            hidden: Per micro-batch (B, T, d); replaced by the layer's output.
            calls: Per micro-batch, the layer's other arguments.
        """
        with self._forward.weights(index, then=self._forward.after(index)) as (weights, experts):
            for number, call in enumerate(calls):
                with visiting(call.states), experts.lent():
                    hidden[number] = self._forward.run(index, weights, call, hidden[number])

    @torch.no_grad()
    def forward(
        self,
        index: int,
        inputs: Sequence[Tensor],
        calls: Sequence[LayerCall],
        step: int,
        routing: Routing | None = None,
    ) -> list[Tensor]:
        """Run a layer without a graph.

        Args:
            index: Layer number.
            inputs: Per micro-batch (B, T, d).
            calls: Per micro-batch, the layer's other arguments.
            step: Number of the optimizer step, for dropout.
            routing: Receives the choices of experts.

        Returns:
            The output, per micro-batch (B, T, d).
        """
        out: list[Tensor] = []
        with self._forward.weights(index, then=self._forward.after(index)) as (weights, experts):
            for entering, call in zip(inputs, calls, strict=True):
                shares, watches = visiting(call.states), _watching(routing, index)
                with self._forward.dropout_stream(step, index, call), shares, experts.lent(), watches as seen:
                    out.append(self._forward.run(index, weights, call, entering))
                if routing is not None:
                    routing.see(index, call, seen)
        return out

    def keep(
        self,
        index: int,
        inputs: Sequence[Tensor],
        calls: Sequence[LayerCall],
        step: int,
        wants: Wants,
        routing: Routing | None = None,
    ) -> tuple[list[Tensor], LayerGraph]:
        """Run a layer and keep its graph for `backward`. Its weights must stay on the device until then.

        Args:
            index: Layer number.
            inputs: Per micro-batch (B, T, d), without a graph.
            calls: Per micro-batch, the layer's other arguments.
            step: Number of the optimizer step, for dropout.
            wants: Returns the form in which a parameter's gradient is needed.
            routing: Receives the choices of experts.

        Returns:
            The output, per micro-batch (B, T, d), detached from the graph; and the graph.
        """
        graph = self._begin(index, wants, self.new_passes(), routing)
        for entering, call in zip(inputs, calls, strict=True):
            graph.kept.append(self._forward_with_graph(index, graph, call, entering, step, sees=True))
        return [run.out.detach() for run in graph.kept], graph

    def backward(
        self,
        index: int,
        inputs: list[Tensor],
        calls: Sequence[LayerCall],
        out_grads: list[Tensor],
        step: int,
        wants: Wants,
        graph: LayerGraph | None = None,
        passes: Passes | None = None,
        routing: Routing | None = None,
        *,
        spends: bool = False,
    ) -> tuple[Gradients, list[Tensor]]:
        """Run the backward passes of a layer, each for all micro-batches.

        The caller lends the layer's weights together with their optimizer state.

        Args:
            index: Layer number.
            inputs: Per micro-batch (B, T, d), the layer's input.
            calls: Per micro-batch, the layer's other arguments.
            out_grads: Per micro-batch (B, T, d), the gradient with respect to the layer's output.
            step: As in forward.
            wants: Returns the form in which a parameter's gradient is needed.
            graph: From `keep`; used up. None: the layer is recomputed.
            routing: The choices of experts in forward.
            passes: Those of the graph or, without one, from `new_passes`; passes that are finished are not repeated.
            spends: Whether to remove the entries of `inputs` and `out_grads` as they are used, which frees memory but
                makes a repetition impossible.

        Returns:
            The layer's gradients (float32) and, per micro-batch, the gradient with respect to its input.
        """
        name = self._architecture.layer_names[index]
        passes = passes or (graph.passes if graph else self.new_passes())
        while True:
            graph = graph or self._begin(index, wants, passes, routing)
            is_last = passes.is_last
            given = (inputs, out_grads) if spends and is_last else (list(inputs), list(out_grads))
            if self._dtype != torch.float16:
                grads, in_grads = self._one_pass(index, graph, calls, *given, step, 1.0, spends=spends)
            else:
                grads, in_grads, graph = self._finite_pass(index, graph, calls, *given, step, wants)
            finished, graph = graph.finished, None  # a graph can be used only once
            passes.finish(grads, self._observer)
            if is_last:
                for each in finished:
                    each.hand_back()
                return {f"{name}.{inner}": grad for inner, grad in passes.take().items()}, in_grads
            del in_grads

    def _finite_pass(
        self,
        index: int,
        graph: LayerGraph,
        calls: Sequence[LayerCall],
        inputs: list[Tensor],
        out_grads: list[Tensor],
        step: int,
        wants: Wants,
    ) -> tuple[Gradients, list[Tensor], LayerGraph]:
        """Run the next pass in fp16; the first pass finds the scale with which all gradients are finite.

        Returns:
            As `_one_pass`, and the graph that was used in the end.
        """
        passes = graph.passes
        if passes.is_first:
            largest = max(float(grad.abs().amax()) for grad in out_grads)
            passes.scale = 2.0 ** -math.floor(math.log2(largest)) if largest > 0 else 1.0
        for left in reversed(range(_FP16_MAX_TRIES)):
            grads, in_grads = self._one_pass(index, graph, calls, list(inputs), list(out_grads), step, passes.scale)
            graph.are_finite.extend(torch.isfinite(grad).all() for grad in [*map(tensor_of, grads.values()), *in_grads])
            if not left or not passes.is_first or all(map(bool, graph.are_finite)):
                break
            passes.scale /= _FP16_BACKOFF
            graph = self._begin(index, wants, passes, graph.routing)  # a graph can be used only once
        return grads, in_grads, graph

    def _one_pass(
        self,
        index: int,
        graph: LayerGraph,
        calls: Sequence[LayerCall],
        inputs: list[Tensor],
        out_grads: list[Tensor],
        step: int,
        scale: float,
        *,
        spends: bool = False,
    ) -> tuple[Gradients, list[Tensor]]:
        """Run the next pass; remove each micro-batch from inputs and gradients once it is done.

        With `spends`, the pass is not repeated, so that gradients of experts may be reduced before it ends.

        Returns:
            The gradients that this pass forms, by names inside the layer; and those with respect to the layer's input,
            if a first pass in fp16 has to check them or no other pass comes.
        """
        passes, leaves, products = graph.passes, graph.leaves, graph.products
        is_kept, needs_in_grads = bool(graph.kept), passes.is_last or self._dtype == torch.float16
        in_grads: list[Tensor] = []
        blocks = PairwiseSum()
        has_one_block = calls[0].block == calls[-1].block
        for of_block in by_block(calls):
            for product in products.values():
                self._observer.tag(product.sum, "gradients")
            for call in of_block:
                passes.reduces_at_once = spends and has_one_block and call is calls[-1] and not call.alone
                layer_input, out_grad = inputs.pop(0), out_grads.pop(0)
                run = graph.kept.pop(0) if is_kept else self._forward_with_graph(index, graph, call, layer_input, step)
                if scale != 1.0:
                    out_grad = out_grad * scale
                for each in call.inputs:
                    each.leaf.grad = None
                with strictly_repeatable(self._device):
                    torch.autograd.backward(*run.outputs(call, out_grad, scale, graph.routing))
                del layer_input, out_grad
                assert run.entering.grad is not None  # the layer's output depends on its input
                # In fp16 the gradient travels between layers in float32, where it can't underflow.
                if needs_in_grads:
                    grad = run.entering.grad
                    in_grads.append(grad if self._dtype != torch.float16 else grad.float() / scale)
                    graph.finished.append(FinishedRun.of(call.inputs, call.states, run.visits, scale))
                    del grad
                del run
            blocks.add(call.block, graph.take_sums())
        sums = blocks.total()
        name = self._architecture.layer_names[index]
        formed = [key for key in graph.trained if passes.forms(key) and not passes.is_finished(key)]
        idle = {key for key in formed if key not in sums and self._forward.is_expert(index, key)}
        if graph.routing is not None:
            for key in [key for key in idle if not graph.routing.rests(index, key)]:
                # It has tokens in another process only, with whose gradient this one is summed.
                sums[key] = (
                    products[key].sum
                    if key in products
                    else torch.zeros(graph.trained[key], dtype=torch.float32, device=self._device)
                )
                idle.remove(key)
        leaves.clear()  # the caller may still hold the graph
        formed = [key for key in formed if key not in idle]  # experts without tokens take no step
        without = set(formed) - sums.keys()
        if without:
            raise RunError(f"{name}.{min(without)} gets no gradient: the layer's output does not depend on it.")
        if scale != 1.0:
            for grad in sums.values():
                grad.div_(scale)
        return {key: ProjectedGradient(sums[key]) if key in products else sums[key] for key in formed}, in_grads

    def _begin(self, index: int, wants: Wants, passes: Passes, routing: Routing | None) -> LayerGraph:
        """Return an empty graph for the next pass; before the first one, plan the passes."""
        layer = self._architecture.layer_names[index]
        with self._forward.weights(index) as (weights, experts):
            leaves = {
                key: weight.detach().requires_grad_(f"{layer}.{key}" not in self._frozen)
                for key, weight in weights.items()
            }
            trained = {
                key: shape for key, shape in self._forward.shapes(index).items() if f"{layer}.{key}" not in self._frozen
            }
        products = self._products(index, trained, wants, passes) if passes.is_first else {}
        checks = passes.is_first and self._dtype == torch.float16  # one scale has to do for all passes
        sums, are_finite = Tensors(), list[Tensor]()
        of_experts = ExpertGraph(
            experts,
            frozenset(key for key in trained if checks or passes.forms(key)),
            products,
            # Not the graph, which holds this: a cycle would keep all of it until Python looks for cycles.
            partial(take_gradient, self._observer, passes, products, sums, are_finite),
        )
        linears = ProjectedLinears(
            ((leaves[key], product) for key, product in products.items() if key in leaves), of_experts.product_of
        )
        graph = LayerGraph(
            leaves, of_experts, trained, products, linears, passes, routing, sums=sums, are_finite=are_finite
        )
        for name, leaf in leaves.items():
            if not leaf.requires_grad:
                continue
            take = partial(self._take_gradient, name, products.get(name), graph.sums)
            if not passes.forms(name):
                leaf.requires_grad_(checks)
                take = partial(_check_gradient, graph.are_finite)
            if leaf.requires_grad:
                leaf.register_post_accumulate_grad_hook(take)
        return graph

    def _take_gradient(self, name: str, product: ProjectedSum | None, sums: Tensors, leaf: Tensor) -> None:
        """Add a weight's gradient of one micro-batch to its sum; a hook that autograd calls."""
        grad = leaf.grad
        if grad is None:
            return  # the projected sum took it
        self._observer.tag(grad, "gradients")
        if product is not None:
            product.add_whole(grad)  # the weight was used outside of functional.linear
        elif self._dtype == torch.float32:
            return  # autograd itself sums float32 gradients
        elif name in sums:
            sums[name].add_(grad)
        else:
            sums[name] = grad.float()
            self._observer.tag(sums[name], "gradients")
        leaf.grad = None

    def _forward_with_graph(
        self, index: int, graph: LayerGraph, call: LayerCall, entering: Tensor, step: int, *, sees: bool = False
    ) -> LayerRun:
        """Run a micro-batch with gradients; its input becomes a leaf, which shares memory. `sees`: count choices."""
        routing = graph.routing
        leaf = entering.detach().requires_grad_()
        # The mode costs some microseconds at every operation, so it is entered only if it has something to do.
        linears = graph.linears if graph.products else nullcontext()
        shares, watches = visiting(call.states), _watching(routing, index)
        with (
            self._forward.dropout_stream(step, index, call),
            graph.experts.running(),
            linears,
            shares as visits,
            watches as seen,
        ):
            out = self._forward.run(index, graph.leaves, call, leaf)
        if routing is None:
            return LayerRun(leaf, out, visits)
        if sees:
            routing.see(index, call, seen)
        return LayerRun(leaf, out, visits, routing.summed_probs(index, call, seen))

    def _products(
        self, index: int, trained: Mapping[str, torch.Size], wants: Wants, passes: Passes
    ) -> dict[str, ProjectedSum]:
        """Return empty sums for those of a layer's weights whose gradients are wanted projected; plan the passes."""
        products: dict[str, ProjectedSum] = {}
        reductions: dict[str, Reduction] = {}
        layer = self._architecture.layer_names[index]
        for name, shape in trained.items():
            wanted = wants(f"{layer}.{name}")
            if isinstance(wanted, Projector):
                products[name] = ProjectedSum(wanted, shape, self._dtype, self._device)
            elif isinstance(wanted, FromGradient):
                reductions[name] = wanted.reduce
        experts = [name for name in trained if self._forward.is_expert(index, name)]
        passes.plan({name: shape.numel() for name, shape in trained.items()}, reductions, experts)
        return products


def _watching(routing: Routing | None, index: int) -> AbstractContextManager[list[Any]]:
    return nullcontext([]) if routing is None else routing.watching(index)


def _check_gradient(are_finite: list[Tensor], leaf: Tensor) -> None:
    """Note whether a weight's gradient of one micro-batch is finite, and drop it; a hook that autograd calls."""
    if leaf.grad is not None:
        are_finite.append(torch.isfinite(leaf.grad).all())
        leaf.grad = None
