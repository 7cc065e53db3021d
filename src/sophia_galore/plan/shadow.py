"""Arithmetic without memory: inside the context real code runs on tensors that have shapes and no bytes.

Floating-point tensors are made fake: PyTorch's `FakeTensor` has shape, precision and a storage of the right size in
which nothing lies. Integers that say how many there are of something (token ids, labels, masks, positions) stay
real, since shapes follow from their values. Where code asks a fake tensor for a value, it is told that all is well:
everything is finite, and what was never written to holds nothing but zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
# Integers that are made out of nothing, and whose values are known: positions, counts, masks. Not those that are
# drawn or filled in later, such as the noise of a rounding.
_COUNTING = (_aten.arange, _aten.zeros, _aten.ones, _aten.full, _aten.scalar_tensor)
# Codes of eight bits and less are the bytes of something large.
_KEPT = (torch.int64, torch.bool)
_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)


class Shadow(TorchDispatchMode):
    """While it is entered, floating-point tensors are made without memory; a context manager.

    Tensors that exist already stay what they are: an operation is fake if one of its arguments is.
    """

    def __init__(self) -> None:
        super().__init__()
        # Real tensors, such as positions, may meet fake ones.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Of the arguments' types those are named that are more than plain tensors; this is said at each operation.
        if FakeTensor not in types:
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
                return func(*args, **kwargs)
            if _is_counting(func.overloadpacket, args, kwargs):
                return func(*args, **kwargs)
            with self._fake:
                return func(*args, **kwargs)
        if func is _aten._local_scalar_dense.default:
            return _reassuring(args[0])
        if func.overloadpacket in _INDEXING:
            args = (args[0], _by_number(args[1]), *args[2:])
        out = func(*args, **kwargs)
        if func.overloadpacket is _aten.any:
            _mark_as_no(out)
        return out


def _is_counting(operation: Any, args: Any, kwargs: Any) -> bool:
    """Whether a tensor that is made from no other holds integers whose values matter."""
    if operation not in _COUNTING:
        return False
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return dtype in _KEPT
    values = args[1] if operation is _aten.full else args[:3] if operation is _aten.arange else 0.0
    return all(isinstance(value, int) for value in (values if isinstance(values, tuple) else (values,)))


def _by_number(indices: Any) -> list[Any]:
    """Indices with each real mask turned into the numbers of its places: how many there are, shapes depend on."""
    numbered: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool:
            numbered.extend(index.nonzero().unbind(1))
        else:
            numbered.append(index)
    return numbered


def _mark_as_no(answer: Tensor) -> None:
    vars(answer)["says_no"] = True


def _reassuring(asked: Tensor) -> bool | int | float:
    """The value of a fake tensor of one element."""
    if asked.dtype == torch.bool:
        return not vars(asked).get("says_no", False)
    return 1.0 if asked.dtype.is_floating_point else 1
