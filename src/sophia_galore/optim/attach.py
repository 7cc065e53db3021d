"""Update parameters during backward: each is updated, and its gradient freed, as soon as its gradient is ready.

So only one gradient exists at a time. Whatever needs all gradients at once is not possible: clipping by the norm over
the model, gradient accumulation, loss scaling, and Sophia's curvature.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from sophia_galore.errors import ArgumentError, StepError
from sophia_galore.optim.arguments import Group, check_settings
from sophia_galore.optim.gradients import refuse_non_finite
from sophia_galore.optim.limits import clip_, grad_norm
from sophia_galore.optim.sharding import is_sharded, local_of, whole_norm
from sophia_galore.optim.torch_optimizer import TorchOptimizer

_ATTACHED: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""By parameter, a weak reference to the attachment that updates it."""


class Attachment:
    """The handle of an optimizer that updates in backward, until `remove` is called or the `with` block ends.

    Args:
        optimizer: The optimizer.
        max_grad_norm: Largest norm of one parameter's gradient; 0: no limit.
    """

    def __init__(self, optimizer: TorchOptimizer, max_grad_norm: float) -> None:
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._stepped: set[str] = set()
        self._hooks: list[RemovableHandle] = []
        for group, name, param in optimizer.members():
            _ATTACHED[param] = weakref.ref(self)
            # torch allows the hook only on parameters that require a gradient; others get none.
            if param.requires_grad:
                self._hooks.append(param.register_post_accumulate_grad_hook(partial(self._ready, group, name)))
        optimizer.end_attached_step = self.end_step

    def remove(self) -> None:
        """Make the optimizer update in `step()` again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for _, _, param in self._optimizer.members():
            _ATTACHED.pop(param, None)
        self._optimizer.end_attached_step = None

    def end_step(self) -> None:
        """End the step, so that the next backward may update parameters again; `step()` calls this.

        Raises:
            StepError: A parameter has an unused gradient: it was frozen, or not in the optimizer, at `attach`.
        """
        for _, name, param in self._optimizer.members():
            if param.grad is not None and name not in self._stepped and param.numel():
                raise StepError(
                    f"{name} has a gradient that nothing used: it was frozen or missing when attach was called.",
                    "Call remove() on the handle, and attach again after parameters were added or unfrozen.",
                )
        self._stepped.clear()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    @torch.no_grad()
    def _ready(self, group: Group, name: str, param: Tensor) -> None:
        if param.grad is None or not param.numel():
            return
        if name in self._stepped:
            raise StepError(
                f"{name} got a second gradient before optimizer.step(); the first one was already used and dropped.",
                "With attach there is one backward a step: set gradient_accumulation_steps to 1. A weight that several "
                "checkpointed layers share needs use_reentrant=False.",
            )
        if not self._stepped:
            self._optimizer.follow_settings()
        self._optimizer.check(name, param)
        refuse_non_finite([(name, param.grad)], self._optimizer.num_steps + 1)
        grad = param.grad.float()
        norm = whole_norm(grad) if is_sharded(grad) else grad_norm([grad])
        clip_([local_of(grad)], norm, self._max_grad_norm)
        self._optimizer.step_one(group, name, param, grad)
        param.grad = None
        self._stepped.add(name)


def attach(optimizer: torch.optim.Optimizer, model: torch.nn.Module, max_grad_norm: float = 0.0) -> Attachment:
    """Move the update into backward: each parameter is updated, and its gradient freed, as soon as it is ready.

    `optimizer.step()` then only ends the step, and must still be called once after each backward, before the
    scheduler; `zero_grad()` does no harm. In the `Trainer`, set `gradient_accumulation_steps=1` and `max_grad_norm=0`
    (no gradients are left when the `Trainer` clips). Accumulation is refused at the second backward, before any
    weight is updated twice. Don't scale the loss (`GradScaler`, fp16): use bfloat16. Parameters that `fully_shard`
    sharded are updated when their gradients are averaged; DDP averages them too late, so don't use it.

    A gradient that is not finite raises `NonFiniteError` in backward; parameters whose gradients came before it are
    already updated. To go on, call `optimizer.step()`, which ends this step.

    Args:
        optimizer: A `GaLore` or an `Apollo` over parameters of `model`. Rules with a curvature are refused, since its
            estimate needs the gradients of all parameters at once.
        model: The model.
        max_grad_norm: Scale each parameter's gradient by itself to at most this norm; 0: no limit.

    Returns:
        A handle: its `remove()`, or the end of a `with` block, restores the normal `step()`.

    Raises:
        ArgumentError: The optimizer is neither a `GaLore` nor an `Apollo`, has a curvature, is attached already, or
            does not fit the model; or another one is attached to the model; or each of several processes has all of a
            parameter.
    """
    if not isinstance(optimizer, TorchOptimizer):
        raise ArgumentError(
            f"attach can't move the update of a {type(optimizer).__name__} into backward.",
            "Pass the sophia_galore.GaLore or Apollo itself, not the object in which accelerate wraps it.",
        )
    owner = type(optimizer).__name__
    check_settings("attach", {"max_grad_norm": max_grad_norm})
    if optimizer.end_attached_step is not None:
        raise ArgumentError(f"This {owner} is attached already.", "Call remove() on the first handle.")
    if optimizer.curved_parameters():
        raise ArgumentError(
            f"This {owner} estimates a curvature from gradients of all parameters at once; attach keeps only one.",
            "Train with optimizer.step(), or choose a rule without a curvature.",
        )
    refuse_strangers(optimizer, model)
    _refuse_copies(optimizer)
    if any(holder() is not None for param in model.parameters() if (holder := _ATTACHED.get(param))):
        raise ArgumentError("Another optimizer is attached to this model.", "Call remove() on its handle first.")
    return Attachment(optimizer, max_grad_norm)


def _refuse_copies(optimizer: TorchOptimizer) -> None:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return
    for _, name, param in optimizer.members():
        if param.requires_grad and not is_sharded(param):
            raise ArgumentError(
                f"Each process has all of {name} and would update it with its own gradient: DDP averages gradients "
                "only after each is ready.",
                "Shard the model (fully_shard), or train with optimizer.step().",
            )


def refuse_strangers(optimizer: TorchOptimizer, model: Any) -> None:
    """Refuse an optimizer whose parameters are not those of a model.

    Args:
        optimizer: The optimizer.
        model: The model.

    Raises:
        ArgumentError: The model lacks a parameter of the optimizer; the message names the first one.
    """
    if not isinstance(model, torch.nn.Module):
        raise ArgumentError(f"A {type(model).__name__} was given in place of the model.", "Give the torch.nn.Module.")
    own = {id(param) for param in model.parameters()}
    strangers = [name for _, name, param in optimizer.members() if id(param) not in own]
    if strangers:
        raise ArgumentError(
            f"{strangers[0]} (and {len(strangers) - 1} more) of this {type(optimizer).__name__} is not in the model.",
            "Make the optimizer from this model's named_parameters().",
        )
