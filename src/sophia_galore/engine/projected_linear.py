"""Linear layers whose weight's gradient is wanted only in a product with a known matrix.

The modules are those of Hugging Face and stay as they are: a mode around the layer's forward sees each call of
`torch.nn.functional.linear` and, where the weight is one of the projected ones, puts a function in its place that
gives the same output, and in backward adds to a `ProjectedSum` instead of forming the weight's gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from sophia_galore.engine.projected_gradient import ProjectedSum
from sophia_galore.numerics.subspace import Projector


class _ProjectedLinear(torch.autograd.Function):
    """x W^T + b, whose backward gives the weight no gradient but its `ProjectedSum` a term."""

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
    """A linear map; its backward adds G A or A^T G to `product` and leaves the weight without gradient.

    Args:
        entering: (..., n).
        weight: (m, n).
        bias: (m,) or None.
        product: Takes the term of this call's tokens.

    Returns:
        (..., m).
    """
    out: Tensor = _ProjectedLinear.apply(entering, weight, bias, product)
    return out


def plain_product(entering: Tensor, out_grad: Tensor, projector: Projector) -> Tensor:
    """What `projected_linear` adds, the plain way: form G, then multiply. The tests compare the two.

    Args:
        entering: (..., n).
        out_grad: (..., m), the gradient with respect to the linear map's output.
        projector: A and its side.

    Returns:
        (m, k) or (k, n).
    """
    return projector.of(out_grad.flatten(0, -2).T @ entering.flatten(0, -2))


class ProjectedLinears(TorchFunctionMode):
    """While it is entered, linear maps by some weights are `projected_linear`; a context manager.

    Args:
        products: Weight and product; weights are known by identity, as they are handed to the module.
    """

    def __init__(self, products: Iterable[tuple[Tensor, ProjectedSum]]) -> None:
        super().__init__()
        self._products = {id(weight): product for weight, product in products}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is functional.linear:
            entering, weight, bias = _linear_arguments(*args, **given)
            product = self._products.get(id(weight))
            if product is not None:
                return projected_linear(entering, weight, bias, product)
        return func(*args, **given)


def _linear_arguments(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The arguments of `torch.nn.functional.linear`, by place or by name; hence the names."""
    return input, weight, bias
