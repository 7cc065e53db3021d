"""Linear layers whose weight's gradient is needed only in a product with a known matrix.

The modules of Hugging Face stay unchanged. A `TorchFunctionMode` around the layer's forward intercepts the calls of
`torch.nn.functional.linear` with one of the projected weights. It calls a function with the same output instead, whose
backward adds to a `ProjectedSum` and does not form the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sophia_galore.engine.projected_gradient import ProjectedSum
from sophia_galore.numerics.subspace import Projector


class _ProjectedLinear(torch.autograd.Function):
    """x W^T + b; backward adds a term to the `ProjectedSum` and gives the weight no gradient."""

    @staticmethod
    def forward(ctx: Any, entering: Tensor, weight: Tensor, bias: Tensor | None, product: ProjectedSum) -> Tensor:
        ctx.product = product
        ctx.save_for_backward(product.save_input(entering.reshape(-1, entering.shape[-1])), weight)
        return functional.linear(entering, weight, bias)

    @staticmethod
    def backward(ctx: Any, *out_grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        (out_grad,) = out_grads
        kept, weight = ctx.saved_tensors
        flat = out_grad.reshape(-1, out_grad.shape[-1])
        ctx.product.add(flat, kept)
        wants_entering, _, wants_bias, _ = ctx.needs_input_grad
        return out_grad @ weight if wants_entering else None, None, flat.sum(0) if wants_bias else None, None


def projected_linear(entering: Tensor, weight: Tensor, bias: Tensor | None, product: ProjectedSum) -> Tensor:
    """Apply a linear map whose backward adds G A or A^T G to `product`, without a gradient for the weight.

    Args:
        entering: The input, (..., n).
        weight: (m, n).
        bias: (m,) or None.
        product: Receives the term of this call's tokens.

    Returns:
        (..., m).
    """
    out: Tensor = _ProjectedLinear.apply(entering, weight, bias, product)
    return out


def plain_product(entering: Tensor, out_grad: Tensor, projector: Projector) -> Tensor:
    """Compute what `projected_linear` adds from the full gradient G; a reference for tests.

    Args:
        entering: The input, (..., n).
        out_grad: (..., m), the gradient with respect to the linear map's output.
        projector: A and its side.

    Returns:
        (m, k) or (k, n).
    """
    return projector.of(out_grad.flatten(0, -2).T @ entering.flatten(0, -2))


class ProjectedLinears(TorchFunctionMode):
    """A context manager in which linear maps with given weights are replaced by `projected_linear`.

    Args:
        products: Pairs of weight and sum; weights are recognized by identity.
        more: Returns the sum for a weight that is made later; None: there is none.
    """

    def __init__(
        self,
        products: Iterable[tuple[Tensor, ProjectedSum]],
        more: Callable[[Tensor], ProjectedSum | None] = lambda weight: None,
    ) -> None:
        super().__init__()
        self._products = {id(weight): product for weight, product in products}
        self._more = more

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is functional.linear:
            entering, weight, bias = _linear_arguments(*args, **given)
            product = self._products.get(id(weight)) or self._more(weight)
            if product is not None:
                return projected_linear(entering, weight, bias, product)
        return func(*args, **given)


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Bind the arguments of `torch.nn.functional.linear`, whose parameter names it has."""
    return input, weight, bias
