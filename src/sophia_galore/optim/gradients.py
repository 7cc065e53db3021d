"""What the `torch.optim` classes ask of gradients before they move a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sophia_galore.errors import NonFiniteError, StepError
from sophia_galore.optim.limits import LARGEST_GRAD, is_usable
from sophia_galore.optim.members import TRAINABLE_DTYPES, param_shape, untrainable


def refuse_untrainable(name: str, param: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a parameter or a gradient that can't be stepped as it is now.

    Args:
        name: The parameter's name.
        param: It, with a gradient.
        shape: The `param_shape` that it had when the optimizer was made.

    Raises:
        StepError: Its dtype or its shape is another one by now, or its gradient is sparse.
    """
    if param.dtype not in TRAINABLE_DTYPES:
        raise StepError(*untrainable(name, param))
    if param_shape(param) != shape:
        raise StepError(
            f"{name} has the shape {tuple(param.shape)}, but had {shape} when the optimizer was made.",
            "Make the optimizer after the model has its final shape; sharded parameters (FSDP, ZeRO) can't be stepped.",
        )
    if param.grad is not None and param.grad.layout != torch.strided:
        raise StepError(f"The gradient of {name} is sparse.", "Make the embedding with sparse=False.")


def refuse_valueless(name: str, param: Tensor) -> None:
    """Refuse a parameter that has no values, though it is to be trained.

    Args:
        name: The parameter's name.
        param: It.

    Raises:
        StepError: It is on the meta device. Whoever loaded weights since then made other parameters, which would
            never be stepped.
    """
    if param.is_meta and param.requires_grad:
        raise StepError(
            f"{name} is on the meta device, where it has no values; weights that were loaded made other parameters.",
            "Make the optimizer after the weights were loaded.",
        )


def refuse_non_finite(grads: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Refuse a NaN or an infinity in any of several gradients.

    Args:
        grads: Names and gradients, each with an element.
        step: Number of the step, counted from 1, for the message.

    Raises:
        NonFiniteError: Naming the first parameter that has one.
    """
    looked_at = list(grads)
    flags = [is_usable(grad) for _, grad in looked_at]
    # One answer for all, since for each the host would wait for the device.
    finite = torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else []
    for (name, _), is_finite in zip(looked_at, finite, strict=True):
        if not is_finite:
            raise NonFiniteError(
                f"The gradient of {name} is not finite at step {step} (or above {LARGEST_GRAD:g}).",
                "Lower the learning rate, or compute in float32 or bfloat16; with fp16, use a GradScaler.",
            )


def in_vectors(tensor: Tensor) -> Tensor:
    """A scalar as a vector of one element, anything else as it is; a view."""
    return tensor.view(1) if tensor.ndim == 0 else tensor


class SampledGradients:
    """Gradients with labels that were sampled from the model, summed over the micro-batches of a step.

    The Gauss-Newton-Bartlett estimate squares the gradient of the mean loss over all labels of the effective
    batch, so means of micro-batches are weighted by their labels and squared only when all are there.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.num_batches = 0

    def add(self, grads: Mapping[str, Tensor], count: int) -> None:
        """Take in a micro-batch.

        Args:
            grads: Gradients of the mean loss over its sampled labels, by the parameter's name.
            count: How many labels these were.
        """
        for name, grad in grads.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(grad, dtype=torch.float32)
            self.sums[name].add_(grad, alpha=count)
        self.count += count
        self.num_batches += 1

    def take(self) -> tuple[dict[str, Tensor], int]:
        """Gradients of the mean loss over all sampled labels, and how many these were; begins anew."""
        sums, count = self.sums, self.count
        self.sums, self.count, self.num_batches = {}, 0, 0
        return {name: total.div_(count) for name, total in sums.items()}, count
