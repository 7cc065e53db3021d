"""The whole Hugging Face model with the weights of a store; packed weights are decoded one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from sophia_galore.model.architecture import Architecture
from sophia_galore.weights.store import WeightStore
from sophia_galore.weights.weight import Weight


@contextmanager
def whole_model(architecture: Architecture, store: WeightStore) -> Iterator[Any]:
    """Put the stored weights into the model; a packed weight is decoded only while its module runs.

    Args:
        architecture: The model's modules; parameters on the meta device, before and after.
        store: The weights; no second copy of them is made.

    Yields:
        The Hugging Face model, in evaluation mode.
    """
    names = {
        id(parameter): name
        for name, parameter in architecture.model.named_parameters()
        if not store[name].held_by_module  # its module holds and decodes such a weight itself
    }
    places = [
        (module, key, parameter)
        for module in architecture.model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if id(parameter) in names
    ]
    dtype = store.plain_dtype()
    hooks: list[RemovableHandle] = []
    whole: dict[int, nn.Parameter] = {}
    for module, key, meta in places:
        stored = store[names[id(meta)]]
        if not stored.is_packed:
            whole.setdefault(id(meta), nn.Parameter(stored.values(stored.dtype), requires_grad=False))
            continue
        # The placeholder has the right shape, precision and device, and takes no memory.
        empty = torch.empty((), dtype=dtype, device=stored.device).expand(stored.shape)
        placeholder = whole.setdefault(id(meta), nn.Parameter(empty, requires_grad=False))
        hooks += _decode_while_working(module, key, stored, placeholder)
    was_training = architecture.model.training
    try:
        for module, key, meta in places:
            setattr(module, key, whole[id(meta)])
        architecture.model.eval()
        yield architecture.model
    finally:
        for hook in hooks:
            hook.remove()
        for module, key, meta in places:
            setattr(module, key, meta)
        architecture.model.train(was_training)


def _decode_while_working(
    module: nn.Module, key: str, stored: Weight, placeholder: nn.Parameter
) -> list[RemovableHandle]:
    """Add hooks that decode a module's weight before its forward and remove it after."""
    dtype = placeholder.dtype

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(module, nn.Embedding):  # decode only the rows in use
            tokens, places = torch.unique(args[0], return_inverse=True)
            setattr(module, key, nn.Parameter(stored[tokens].values(dtype), requires_grad=False))
            return (places, *args[1:])
        setattr(module, key, nn.Parameter(stored.values(dtype), requires_grad=False))
        return args

    def after(module: nn.Module, args: Any, out: Any) -> None:
        # Always the placeholder: after Ctrl-C, the module's previous weight may still be a decoded one.
        setattr(module, key, placeholder)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
