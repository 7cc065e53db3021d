"""Who stepped a parameter last: two optimizers on one parameter are almost always a mistake."""

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
    """Remember who steps a parameter, and warn once if somebody else, who still lives, did before.

    Args:
        name: The parameter's name.
        param: It.
        optimizer: Who steps it now.
    """
    last = _LAST_STEPPED_BY.get(param)
    if last is not None and last() is optimizer:
        return
    if last is not None and last() is not None and not {optimizer, last()} & set(_WARNED):
        # One that was left behind may merely wait for the collector: schedulers keep their optimizer in a cycle.
        gc.collect()
        if last() is not None:
            warnings.warn(
                f"{name} is stepped by a second {type(optimizer).__name__}; each keeps moments of its own, and neither "
                "knows of the other's steps. Use one optimizer, or delete the old one.",
                stacklevel=4,
            )
            _WARNED.add(optimizer)
    _LAST_STEPPED_BY[param] = weakref.ref(optimizer)
