"""The autograd graph of one layer, and its runs: what is between its forward with gradients and its backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sophia_galore.engine.capture import LayerCall
from sophia_galore.engine.experts import ExpertGraph
from sophia_galore.engine.passes import Passes
from sophia_galore.engine.projected_gradient import ProjectedSum
from sophia_galore.engine.projected_linear import ProjectedLinears
from sophia_galore.engine.routing import Routing
from sophia_galore.engine.shared import FinishedRun, Visit
from sophia_galore.numerics.subspace import Gradient

Tensors = dict[str, Tensor]
Gradients = dict[str, Gradient]
"""Finished gradients, full or projected, by the full names of their parameters."""


@dataclass(frozen=True, eq=False)
class LayerRun:
    """A run of a layer with gradients, for one micro-batch.

    Args:
        entering: (B, T, d), its input, a leaf.
        out: (B, T, d), its output.
        visits: What it read and wrote of each mapping that layers share.
        probs: (E,), the summed probabilities of its experts, if a loss depends on them.
    """

    entering: Tensor
    out: Tensor
    visits: list[Visit]
    probs: Tensor | None = None

    def outputs(
        self, call: LayerCall, out_grad: Tensor, scale: float, routing: Routing | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return what was computed for later layers and for losses, and the gradients of all of it, times `scale`."""
        outputs, grads = [self.out], [out_grad.to(self.out.dtype)]
        if self.probs is not None and routing is not None and routing.prob_grad is not None:
            outputs.append(self.probs)
            grads.append(routing.prob_grad.to(self.probs.device) * scale)
        for states, visit in zip(call.states, self.visits, strict=True):
            tensors, found = states.outputs(visit)
            outputs += tensors
            grads += [(grad * scale).to(each.dtype) for each, grad in zip(tensors, found, strict=True)]
        return outputs, grads


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """The autograd graph of one layer.

    Args:
        leaves: The weights in compute precision, by name; those that are trained require a gradient. A weight that is
            stored in compute precision is not copied. Those of experts are not among them.
        experts: The weights of experts.
        trained: The names of all weights whose gradients the pass forms, in the model's order, with their shapes.
        products: Sums for the weights whose gradients are projected, by name.
        linears: Context manager that adds to these sums in place of forming the gradients.
        passes: The passes, of which this graph is for the next one.
        routing: The choices of experts in forward; None: they are not watched.
        kept: The layer's run, for each micro-batch between its forward and its backward.
        sums: In half precision, float32 sums of the gradients so far.
        finished: After the last pass, what goes back through tensors that layers share, for each micro-batch.
        are_finite: In fp16, whether each gradient that only a later pass forms is finite, as bool tensors.
    """

    leaves: Tensors
    experts: ExpertGraph
    trained: Mapping[str, torch.Size]
    products: dict[str, ProjectedSum]
    linears: ProjectedLinears
    passes: Passes
    routing: Routing | None = None
    kept: list[LayerRun] = field(default_factory=list)
    sums: Tensors = field(default_factory=dict)
    finished: list[FinishedRun] = field(default_factory=list)
    are_finite: list[Tensor] = field(default_factory=list)

    def take_sums(self) -> Tensors:
        """Return the sums of all gradients so far, full or projected, by name; the next ones begin anew."""
        taken = dict(self.sums)
        self.sums.clear()
        for key, leaf in self.leaves.items():
            if leaf.grad is not None:
                taken[key], leaf.grad = leaf.grad, None
        for key, product in self.products.items():
            if product.touched:
                taken[key] = product.take()
        return taken
