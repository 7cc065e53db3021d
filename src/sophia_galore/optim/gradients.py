"""The checks of parameters and gradients before the `torch.optim` classes change a weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sophia_galore.errors import NonFiniteError, StepError
from sophia_galore.optim.limits import LARGEST_GRAD, is_usable
from sophia_galore.optim.members import TRAINABLE_DTYPES, param_shape, untrainable
from sophia_galore.optim.sharding import all_true, groups_of, local_of


def refuse_untrainable(name: str, param: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a parameter that can't be updated because its dtype, shape or gradient is unsuitable.

    Args:
        name: The parameter's name.
        param: The parameter, with a gradient.
        shape: Its `param_shape` when the optimizer was made.

    Raises:
        StepError: Its dtype can't be trained, its shape changed, or its gradient is sparse.
    """
    if param.dtype not in TRAINABLE_DTYPES:
        raise StepError(*untrainable(name, param))
    if param_shape(param) != shape:
        raise StepError(
            f"{name} has the shape {tuple(param.shape)}, but had {shape} when the optimizer was made.",
            "Make the optimizer after the model has its final shape. Flat parameters (the first FSDP, ZeRO) can't be "
            "stepped: shard with fully_shard (FSDP2).",
        )
    if param.grad is not None and param.grad.layout != torch.strided:
        raise StepError(f"The gradient of {name} is sparse.", "Make the embedding with sparse=False.")


def refuse_valueless(name: str, param: Tensor) -> None:
    """Refuse a trained parameter on the meta device, which has no values.

    Args:
        name: The parameter's name.
        param: The parameter.

    Raises:
        StepError: It is on the meta device. Loading weights replaced it by another parameter, which this optimizer
            would never update.
    """
    if param.is_meta and param.requires_grad:
        raise StepError(
            f"{name} is on the meta device, where it has no values; loading weights replaces such parameters.",
            "Make the optimizer after loading the weights.",
        )


def refuse_non_finite(grads: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Refuse gradients with a NaN, an infinity or an entry above 1e15.

    Args:
        grads: Pairs of name and gradient; no gradient is empty. If some are sharded, each process gives the same names,
            and all refuse what one of them has seen.
        step: Number of the step, counted from 1, for the message.

    Raises:
        NonFiniteError: A gradient has such an entry; the message names the first one.
    """
    looked_at = list(grads)
    if not looked_at:
        return
    parts = [local_of(grad) for _, grad in looked_at]
    # A process may have no row of a sharded gradient.
    flags = [is_usable(part) if part.numel() else torch.tensor(True, device=part.device) for part in parts]
    # One transfer for all gradients, since each one makes the host wait for the device.
    together = torch.stack([flag.to(flags[0].device) for flag in flags])
    finite = all_true(together, groups_of(dict(looked_at))).tolist()
    for (name, _), is_finite in zip(looked_at, finite, strict=True):
        if not is_finite:
            raise NonFiniteError(
                f"The gradient of {name} is not finite at step {step} (or above {LARGEST_GRAD:g}).",
                "Lower the learning rate, or compute in float32 or bfloat16; with fp16, use a GradScaler.",
            )


def in_vectors(tensor: Tensor) -> Tensor:
    """Return a scalar as a vector of one element (a view), and any other tensor unchanged."""
    return tensor.view(1) if tensor.ndim == 0 else tensor


class SampledGradients:
    """Gradients for labels that were sampled from the model, summed over the micro-batches of a step.

    The Gauss-Newton-Bartlett estimate squares the gradient of the mean loss over all labels of the effective batch. So
    the gradients of micro-batches are weighted by their numbers of labels and summed before they are squared.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.count = 0
        self.num_batches = 0

    def add(self, grads: Mapping[str, Tensor], count: int) -> None:
        """Add a micro-batch.

        Args:
            grads: Gradients of the mean loss over its sampled labels, by the parameter's name.
            count: Number of these labels.
        """
        for name, grad in grads.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(grad, dtype=torch.float32)
            self.sums[name].add_(grad, alpha=count)
        self.count += count
        self.num_batches += 1

    def take(self) -> tuple[dict[str, Tensor], int]:
        """Return the gradients of the mean loss over all sampled labels and the number of labels, and reset."""
        sums, count = self.sums, self.count
        self.sums, self.count, self.num_batches = {}, 0, 0
        return {name: total.div_(count) for name, total in sums.items()}, count
