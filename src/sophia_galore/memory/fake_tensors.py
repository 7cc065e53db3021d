"""Fake tensors: inside the context, code runs on tensors that have a shape and a dtype but no memory.

Floating-point tensors are PyTorch's `FakeTensor`, whose storages have the right size and no content. Token ids, labels,
masks and positions stay real, since shapes depend on their values. Code that reads the value of a fake tensor gets a
harmless one: everything is finite, and a tensor that was made as zeros and never written to still holds zeros.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from sophia_galore.memory.fake_cache import cache_key, lookup, remember
from sophia_galore.memory.tracker import StorageTracker

_aten = torch.ops.aten
# Operations that make integers with known values, such as positions, counts and masks. Not those that are drawn or
# filled in later, such as the noise of a rounding.
_COUNTING = (_aten.arange, _aten.zeros, _aten.ones, _aten.full, _aten.scalar_tensor)
# Narrower integers are the codes of something large.
_REAL = (torch.int64, torch.bool)
_INDEXING = (_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_)
# Operations that take a generator, which fake tensors can not.
_DRAWN = (_aten.exponential_,)
_ZEROS = (_aten.zeros, _aten.zeros_like, _aten.new_zeros, _aten.zero_)
# Results that take only shape and dtype from an argument.
_LIKE_ANOTHER = (_aten.empty_like, _aten.new_empty, _aten.ones_like, _aten.new_ones, _aten.full_like, _aten.new_full)
# Not 1: code that scales by a factor may skip 1, and then would need less memory than in practice.
_USUAL = 0.5


class FakeTensors(StorageTracker):
    """While it is entered, floating-point tensors are made fake, and their storages are counted; a context manager.

    Tensors that exist already stay real: a result is fake if one of the arguments is. It is one mode in place of two,
    since each mode costs as much time as what it does.

    Args:
        device: The device whose storages count.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        # Real tensors, such as positions, may meet fake ones.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and torch would switch its compiler off and on again at each operation.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # first: it is asked for as often as everything else together
        return self.took_in(self._run(func, types, args, kwargs or {}))

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        tensors = _tensors_in((*args, *kwargs.values()))
        if not tensors:
            if _is_counting(func.overloadpacket, args, kwargs):
                return func(*args, **kwargs)
            out = self._fake.__torch_dispatch__(func, types, args, kwargs)
        elif not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return func(*args, **kwargs)
        elif func is _aten._local_scalar_dense.default:
            return _harmless_value(args[0])
        elif func.overloadpacket in _DRAWN:
            out = args[0]
        else:
            if func.overloadpacket in _INDEXING:
                args = (args[0], _by_position(args[1]), *args[2:])
            out = self._run_cached(func, types, args, kwargs)
            if func is _aten.topk.default:
                out = (out[0], _most_uneven(tensors[0].shape, out[1].shape[-1]))
        _note_zeros(func, tensors, out)
        return out

    def _run_cached(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        key = cache_key(func, args, kwargs)
        make = lookup(key)
        if make is not None:
            return make(self._fake, args)
        # Calling the operation would dispatch to the tensors' own class first.
        out = self._fake.__torch_dispatch__(func, types, args, kwargs)
        if key is not None:
            remember(key, func, args, out)
        return out


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments, which are no deeper than in a list."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(one for one in value if isinstance(one, Tensor))
    return found


def _is_counting(operation: Any, args: Any, kwargs: Any) -> bool:
    """Whether a tensor that is made from no other holds integers whose values matter."""
    if operation not in _COUNTING:
        return False
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return dtype in _REAL
    values = args[1] if operation is _aten.full else args[:3] if operation is _aten.arange else 0.0
    return all(isinstance(value, int) for value in (values if isinstance(values, tuple) else (values,)))


def _by_position(indices: Any) -> list[Any]:
    """Indices with each real mask turned into the positions that it selects, since shapes depend on their number."""
    numbered: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype == torch.bool:
            numbered.extend(index.nonzero().unbind(1))
        else:
            numbered.append(index)
    return numbered


def _most_uneven(shape: Sequence[int], num_chosen: int) -> Tensor:
    """Return the choice of experts that needs the most memory, as their numbers.

    Every expert gets a token, since each has a gradient then; all other tokens go to the first ones, since what an
    expert computes is in memory at once.

    Args:
        shape: Shape of the scores, (..., experts).
        num_chosen: How many are chosen for each token.
    """
    num_experts, num_tokens = shape[-1], math.prod(shape[:-1])
    chosen = torch.arange(num_chosen).repeat(num_tokens, 1)
    others = torch.arange(num_chosen, num_experts)[: max(0, num_tokens - 1) * num_chosen]
    if len(others):
        chosen.view(-1)[num_chosen : num_chosen + len(others)] = others
        last, width = divmod(len(others), num_chosen)
        if width:  # one token may choose an expert only once
            chosen[1 + last, width:] = torch.arange(num_chosen - width)
    return chosen.view(*shape[:-1], num_chosen)


def _note_zeros(func: Any, tensors: list[Tensor], out: Any) -> None:
    """Note on storages whether they hold only zeros; what is computed from zeros alone counts as zeros."""
    operation = func.overloadpacket
    if operation is _aten.any:
        # Code asks whether any comparison shows a fault: none does.
        are_zeros = tensors[0].dtype == torch.bool or _is_zero(tensors[0])
    else:
        draws = torch.Tag.nondeterministic_seeded in func.tags
        follows = bool(tensors) and not draws and operation not in _LIKE_ANOTHER and all(map(_is_zero, tensors))
        are_zeros = operation in _ZEROS or (follows and not _is_bool(out))
    if are_zeros or func._schema.is_mutable:
        for leaf in tree_leaves(out):
            if isinstance(leaf, FakeTensor):
                vars(leaf.untyped_storage())["zeros"] = are_zeros


def _is_bool(out: Any) -> bool:
    return isinstance(out, Tensor) and out.dtype == torch.bool


def _is_zero(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) and vars(tensor.untyped_storage()).get("zeros", False)


def _harmless_value(asked: Tensor) -> bool | int | float:
    """The value of a fake tensor of one element."""
    if asked.dtype == torch.bool:
        return not _is_zero(asked)
    return _USUAL if asked.dtype.is_floating_point else 1
