"""Estimate Sophia's curvature in any training loop, with labels sampled from the logits of the model's forward."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sophia_galore.errors import ArgumentError, StepError
from sophia_galore.numerics.random import draw_classes, generator
from sophia_galore.optim.attach import refuse_strangers
from sophia_galore.optim.sharding import is_sharded
from sophia_galore.optim.torch_optimizer import TorchOptimizer

_IGNORED = -100
_WATCHING: weakref.WeakSet[TorchOptimizer] = weakref.WeakSet()


class Watch:
    """The handle of a forward hook that estimates the curvature, until `remove` or the end of the `with` block.

    Args:
        optimizer: The optimizer whose curvature is estimated.
        model: The model.
    """

    def __init__(self, optimizer: TorchOptimizer, model: torch.nn.Module) -> None:
        self._optimizer = optimizer
        self._hook = model.register_forward_hook(self._look, with_kwargs=True)
        _WATCHING.add(optimizer)

    def remove(self) -> None:
        """Remove the hook; the last estimate of the curvature stays in use."""
        self._hook.remove()
        _WATCHING.discard(self._optimizer)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _look(self, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        optimizer = self._optimizer
        if not (model.training and torch.is_grad_enabled() and optimizer.curvature_is_due()):
            return
        _refuse_processes()
        logits = _logits(output)
        counted = _counted(logits, kwargs)
        rows = logits.flatten(0, -2)
        if counted is not None:
            rows = rows[counted.flatten().to(rows.device)]
        if not len(rows):
            return
        draw = generator(
            optimizer.seed,
            "sampled labels",
            optimizer.num_steps + 1,
            optimizer.sampled.num_batches,
            device=rows.device,
        )
        rows = rows.float()
        loss = functional.cross_entropy(rows, draw_classes(rows.detach(), draw))
        params = {name: param for name, param in optimizer.curved_parameters().items() if param.requires_grad}
        grads = _grads(loss, list(params.values()))
        found = {name: grad for name, grad in zip(params, grads, strict=True) if grad is not None}
        optimizer.sampled.add(found, len(rows))


def watch(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> Watch:
    """Estimate Sophia's curvature whenever it is due, in any training loop.

    Every `curvature_every` steps, beginning with the first, each forward of the model in training mode is followed by
    an extra backward: labels are drawn from the model's softmax, and the gradient of their mean cross-entropy is
    summed over the micro-batches. `optimizer.step()` squares it (Gauss-Newton-Bartlett; arXiv 2305.14342, algorithm 2).
    At these steps, a second set of gradients of all parameters is in memory, in float32.

    The model must be a causal language model that returns `logits` (B, T, V), as Hugging Face's do, or logits alone,
    (B, T, V) or (N, V). Which positions count depends on the keyword arguments of forward: `labels` (shifted, as
    Hugging Face does, and -100 is left out) or `shift_labels`; else `attention_mask`; else all count. The `Trainer`
    passes labels. TRL's `SFTTrainer` computes no logits: use the `Trainer` with its data, or pass a
    `compute_loss_func`. Activation checkpointing needs `use_reentrant=False`. Train in one process; with sharded
    parameters, call `optimizer.observe_curvature` instead.

    Args:
        optimizer: A `Sophia`, or a `GaLore` with rule="sophia".
        model: The model, or the part of it that returns the logits.

    Returns:
        A handle with `remove()`; also a context manager.

    Raises:
        ArgumentError: The optimizer has no curvature, is watched already, or does not fit the model; or the parameters
            are sharded.
    """
    if not isinstance(optimizer, TorchOptimizer):
        raise ArgumentError(
            f"A {type(optimizer).__name__} has no curvature to watch.",
            "Pass the sophia_galore.Sophia itself, not the object in which accelerate wraps it.",
        )
    if not optimizer.curved_parameters():
        raise ArgumentError(
            f"No parameter of this {type(optimizer).__name__} has the rule 'sophia', so none has a curvature.",
            "Use sophia_galore.Sophia, or GaLore(..., rule='sophia').",
        )
    refuse_strangers(optimizer, model)
    if any(is_sharded(param) for param in optimizer.curved_parameters().values()):
        raise ArgumentError(
            "The parameters are sharded (fully_shard), and the graph of a forward holds gathered copies of them: the "
            "extra backward for the curvature would find no gradient.",
            "Call backward on the loss with sampled labels and then optimizer.observe_curvature(num_samples), with the "
            "labels of all processes counted, every curvature_every steps.",
        )
    if optimizer in _WATCHING:
        raise ArgumentError("This optimizer is watched already.", "Call remove() on the first handle.")
    return Watch(optimizer, model)


def _logits(output: Any) -> Tensor:
    logits = output
    if not isinstance(output, Tensor):
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise StepError(
            f"The curvature is made from the model's logits, but its output ({type(output).__name__}) has none.",
            "Return them (return_dict=True, no fused or chunked loss), or call optimizer.observe_curvature by hand.",
        )
    return logits


def _counted(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return which positions count, in the shape of the logits without their last dimension; None: all."""
    labels, shifted, mask = (inputs.get(key) for key in ("labels", "shift_labels", "attention_mask"))
    places = logits.shape[:-1]
    counted: Tensor | None = None
    if isinstance(shifted, Tensor):
        counted = shifted != _IGNORED
    elif isinstance(labels, Tensor):
        counted = labels != _IGNORED
        # The last position has no label: nothing follows it.
        counted = functional.pad(counted[:, 1:], (0, 1)) if logits.ndim == 3 else counted
    elif isinstance(mask, Tensor) and mask.ndim == 2 and logits.ndim == 3:
        real = mask.bool()
        counted = functional.pad(real[:, 1:] & real[:, :-1], (0, 1))
    if counted is not None and counted.shape != places:
        raise StepError(
            f"The logits are for {tuple(places)} positions, but labels or attention_mask for {tuple(counted.shape)}.",
            "Let the model return the logits of all positions (no logits_to_keep).",
        )
    return counted


def _grads(loss: Tensor, params: list[Tensor]) -> tuple[Tensor | None, ...]:
    try:
        # The backward of the training loss needs the graph again.
        return torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "checkpoint" not in str(error):
            raise
        raise StepError(
            "The curvature needs an extra backward, which reentrant checkpointing does not support.",
            "Use gradient_checkpointing_kwargs={'use_reentrant': False}.",
        ) from error


def _refuse_processes() -> None:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise StepError(
            "Each process would estimate a different curvature, and the copies of the model would diverge.",
            "Train with Sophia in one process, or call optimizer.observe_curvature after a backward on sampled labels, "
            "whose gradients are averaged over the processes.",
        )
