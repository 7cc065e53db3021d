"""Warn about two optimizers that update the same parameter, which is almost always a mistake."""

from __future__ import annotations

import gc
import warnings
import weakref

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_LAST_STEPPED_BY: WeakIdKeyDictionary = WeakIdKeyDictionary()
_WARNED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def note_owner(name: str, param: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Record which optimizer updates a parameter; warn once if another one that still exists did so before.

    Args:
        name: The parameter's name.
        param: The parameter.
        optimizer: The optimizer that updates it now.
    """
    last = _LAST_STEPPED_BY.get(param)
    if last is not None and last() is optimizer:
        return
    if last is not None and last() is not None and not {optimizer, last()} & set(_WARNED):
        # A deleted optimizer may not be collected yet, since schedulers form a reference cycle with it.
        gc.collect()
        if last() is not None:
            warnings.warn(
                f"{name} is stepped by a second {type(optimizer).__name__}. Each keeps its own moments and ignores the "
                "other's steps. Use one optimizer, or delete the old one.",
                stacklevel=4,
            )
            _WARNED.add(optimizer)
    _LAST_STEPPED_BY[param] = weakref.ref(optimizer)
