"""The experts of one layer, decoded one at a time.

A layer of many experts has most of its weights in them, and a model's loop over its experts takes one matrix after the
other. So a matrix exists in compute precision only while its tokens go through it. For backward, autograd keeps the
inputs of the operations; where that is a decoded matrix, it keeps the matrix's name instead, and the matrix is decoded
once more. Decoding gives the same bits each time.

The gradient of a matrix is taken from the graph when it is formed, as a hook of a leaf would take it: a leaf itself
would stay in memory as long as the graph.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sophia_galore.engine.observe import Observer
from sophia_galore.engine.passes import Passes
from sophia_galore.engine.projected_gradient import ProjectedSum
from sophia_galore.model.experts import ExpertWeights
from sophia_galore.weights.weight import Weight

TakeGradient = Callable[[str, Tensor], None]
"""Receives the gradient of an expert's weight for one use of it: the weight's name inside the layer, and it."""


@dataclass(frozen=True, eq=False)
class Experts:
    """The weights of a layer's experts; they can be read as long as the layer is lent.

    Args:
        modules: What the model's loop takes its experts from, by name inside the layer.
        stored: The weights by their names inside the layer, such as `mlp.experts.down_proj.3`.
        dtype: Compute precision.
        observer: Receives the category of what is decoded.
    """

    modules: Mapping[str, ExpertWeights]
    stored: Mapping[str, Weight]
    dtype: torch.dtype
    observer: Observer

    def decode(self, key: str) -> Tensor:
        """Return the values of a weight in compute precision, to be read only."""
        values = self.stored[key].values(self.dtype)
        self.observer.tag(values, "weights")
        return values

    @contextmanager
    def lent(self, take: Callable[[str], Tensor] | None = None) -> Iterator[None]:
        """Let the model's loop take its experts from here, inside the context.

        Args:
            take: Returns a weight by its name inside the layer; None: `decode`.
        """
        give = take or self.decode
        for name, module in self.modules.items():
            module.decode = partial(_by_number, give, name)
        try:
            yield
        finally:
            for module in self.modules.values():
                module.decode = None


@dataclass(eq=False)
class ExpertGraph:
    """The experts of a layer in its autograd graph.

    Args:
        experts: The weights.
        trained: Names inside the layer of those whose gradients are formed.
        products: Sums for weights whose gradients are projected, by name inside the layer.
        take: Receives gradients.
    """

    experts: Experts
    trained: Collection[str] = frozenset()
    products: Mapping[str, ProjectedSum] = field(default_factory=dict)
    take: TakeGradient = lambda key, grad: None
    _anchor: Tensor | None = None
    _alive: dict[int, tuple[weakref.ref[Tensor], str]] = field(default_factory=dict)

    def running(self) -> AbstractContextManager[Any]:
        """Return a context manager around the layer's forward with gradients."""
        return self._running() if self.experts.modules else nullcontext()

    @property
    def _is_packed(self) -> bool:
        return any(not weight.is_ready(self.experts.dtype) for weight in self.experts.stored.values())

    @contextmanager
    def _running(self) -> Iterator[None]:
        # Asking about every tensor that autograd saves takes time, so it is done only if weights are decoded.
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack) if self._is_packed else nullcontext()
        with self.experts.lent(self._with_graph), hooks:
            yield

    def product_of(self, weight: Tensor) -> ProjectedSum | None:
        """Return the sum for the gradient of a weight that was given to the model's loop; None: there is none."""
        known = self._alive.get(id(weight))
        return self.products.get(known[1]) if known is not None and known[0]() is weight else None

    def _with_graph(self, key: str) -> Tensor:
        values = self.experts.decode(key)
        if key in self.trained:
            if self._anchor is None:
                # Something that requires a gradient, so that backward comes here.
                self._anchor = torch.empty(0, device=values.device, requires_grad=True)
            values = _Expert.apply(self._anchor, values, partial(self._take, key))
        for dead in [place for place, (reference, _) in self._alive.items() if reference() is None]:
            del self._alive[dead]
        self._alive[id(values)] = weakref.ref(values), key
        return values

    def _take(self, key: str, grad: Tensor | None) -> None:
        if grad is not None:  # where it is wanted in a product, the product has it
            self.take(key, grad)

    def _pack(self, saved: Tensor) -> Any:
        """Return what autograd keeps for backward: of a decoded weight, or of a view of one, not the values."""
        place = saved.untyped_storage()._cdata
        for reference, key in self._alive.values():
            weight = reference()
            if weight is None or weight.untyped_storage()._cdata != place:
                continue
            if self.experts.stored[key].is_ready(self.experts.dtype):
                break  # it is the stored tensor itself
            return key, saved.shape, saved.stride(), saved.storage_offset()
        return saved

    def _unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        key, *form = kept
        return self.experts.decode(key).as_strided(*form)


class _Expert(torch.autograd.Function):
    """The values of a weight, as a part of the graph whose gradient is handed over when it is formed."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, values: Tensor, take: Callable[[Tensor | None], None]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.take = take
        return values.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, None, None]:
        ctx.take(grads[0])
        return None, None, None


def take_gradient(
    observer: Observer,
    passes: Passes,
    products: Mapping[str, ProjectedSum],
    sums: dict[str, Tensor],
    are_finite: list[Tensor],
    key: str,
    grad: Tensor,
) -> None:
    """Add the gradient of an expert's weight, for one use of it, to its sum.

    Args:
        observer: Receives the category of the gradient.
        passes: The backward passes over the layer; the gradient may be reduced here.
        products: Sums for weights whose gradients are projected, by name inside the layer.
        sums: Sums of full gradients, float32.
        are_finite: In fp16, whether each gradient that only a later pass forms is finite.
        key: The weight's name inside the layer.
        grad: Of the weight's shape, in compute precision.
    """
    if not passes.forms(key):
        are_finite.append(torch.isfinite(grad).all())
        return
    observer.tag(grad, "gradients")
    product = products.get(key)
    if product is not None:
        product.add_whole(grad)
        return
    before = sums.pop(key, None)
    if before is not None:
        total = before.add_(grad)
    else:
        # A copy if it is a view, such as the same numbers in another shape, since more may be added to it.
        total = grad.to(torch.float32, copy=grad._base is not None).contiguous()
        observer.tag(total, "gradients")
    if passes.reduces_at_once and passes.reduces(key):
        del grad
        passes.reduce_expert(key, total, observer)
    else:
        sums[key] = total


def _by_number(give: Callable[[str], Tensor], name: str, number: int) -> Tensor:
    return give(f"{name}.{number}")
