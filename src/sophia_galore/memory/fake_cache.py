"""A cache of operations on fake tensors: nearly all of them come again, in each layer and for each setting tried.

PyTorch's own cache of fake tensors covers every case. Here there are no symbolic shapes, sparse tensors or constants,
so the form of a result (shape, strides, dtype, device) depends on the forms of the arguments alone, and a key is made
quickly. Cached are results that are new tensors, views of an argument, or the argument that was written to. All others
are left to PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_MAX_ENTRIES = 50_000
"""A few hundred bytes each; a full cache is emptied."""
_UNCACHED_TAGS = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view}
_SIMPLE = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

Maker = Callable[[FakeTensorMode, Any], Any]
"""Makes a result from a mode and an operation's arguments."""

_known: dict[Any, Maker] = {}


class _Kind(NamedTuple):
    """The result of an operation: an argument that it wrote to, a view of one or, without a place, a new tensor."""

    place: int | None
    writes: bool = False


class _Uncacheable(Exception):
    """The result depends on more than the forms of the arguments."""


def cache_key(func: Any, args: Any, kwargs: Any) -> Any:
    """What the form of an operation's result depends on, as a key.

    Args:
        func: The operation.
        args: Its arguments.
        kwargs: Those with a name.

    Returns:
        Something hashable; None: the result is not cached.
    """
    if _kind(func) is None:
        return None
    # What works element by element makes the same form of every number.
    form = _form_without_numbers if torch.Tag.pointwise in func.tags else _form
    try:
        return func, tuple(map(form, args)), tuple((name, form(value)) for name, value in kwargs.items())
    except _Uncacheable:
        return None


def lookup(key: Any) -> Maker | None:
    """How to make the result of an operation that was seen before.

    Args:
        key: From `cache_key`.
    """
    return _known.get(key)


def remember(key: Any, func: Any, args: Any, out: Any) -> None:
    """Add a result to the cache.

    Args:
        key: From `cache_key`.
        func: The operation.
        args: Its arguments.
        out: What it gave.
    """
    kind = _kind(func)
    make: Maker | None = None
    if kind is None:
        return
    if kind.place is not None:
        make = _argument(kind.place, args, out) if kind.writes else _view(kind.place, args, out)
    elif isinstance(out, FakeTensor):
        # Some operations give a view and do not say so, as `_unsafe_view` does.
        place = next((place for place, one in enumerate(args) if _shares_storage(one, out)), None)
        make = _new(out) if place is None else _view(place, args, out)
    elif isinstance(out, tuple) and out and all(isinstance(one, FakeTensor) for one in out):
        make = _several(out)
    if make is not None:
        if len(_known) >= _MAX_ENTRIES:
            _known.clear()
        _known[key] = make


def _form(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        if value.constant is not None or value.layout != torch.strided:
            raise _Uncacheable
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided:
        # A real one. Operations whose result's form depends on values are not cached.
        return "real", value.shape, value.stride(), value.storage_offset(), value.dtype, value.device
    if isinstance(value, _SIMPLE):
        return type(value), value  # 1, 1.0 and True are equal, but make other tensors
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    if isinstance(value, torch.Generator):
        return torch.Generator
    raise _Uncacheable


def _form_without_numbers(value: Any) -> Any:
    return type(value) if isinstance(value, (int, float)) else _form(value)


@cache
def _kind(func: Any) -> _Kind | None:
    """The kind of an operation's result; None: it is not cached."""
    if not isinstance(func, torch._ops.OpOverload) or _UNCACHED_TAGS & set(func.tags):
        return None
    schema = func._schema
    aliased = [
        (place, argument, argument.alias_info)
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None
    ]
    returned = [one.alias_info is not None and str(one.type) == "Tensor" for one in schema.returns]
    if not aliased:
        return _Kind(None) if returned and not any(one.alias_info for one in schema.returns) else None
    (place, argument, alias), *more = aliased
    if more or returned != [True] or argument.kwarg_only or str(argument.type) != "Tensor":
        return None
    return _Kind(place, alias.is_write)


def _argument(place: int, args: Any, out: Any) -> Maker | None:
    return (lambda mode, args: args[place]) if out is args[place] else None


def _view(place: int, args: Any, out: Any) -> Maker | None:
    """Makes a tensor of this form over an argument's storage."""
    if not isinstance(out, FakeTensor) or out is args[place] or not _is_simple(out):
        return None
    if not _shares_storage(args[place], out) or out.fake_device != args[place].fake_device:
        return None
    shape, stride, offset, dtype, device = out.shape, out.stride(), out.storage_offset(), out.dtype, out.fake_device

    def make(mode: FakeTensorMode, args: Any) -> Tensor:
        made = torch.empty(0, dtype=dtype, device="meta")
        # As inside a kernel, where the storage is one of the meta device, on which it was made.
        with in_kernel_invocation_manager(mode):
            made.set_(args[place].untyped_storage(), offset, shape, stride)
        return FakeTensor(mode, made, device)

    return make


def _shares_storage(one: Any, out: FakeTensor) -> bool:
    return isinstance(one, FakeTensor) and one.untyped_storage()._cdata == out.untyped_storage()._cdata


def _is_simple(tensor: FakeTensor) -> bool:
    return tensor.constant is None and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())


def _new(like: FakeTensor) -> Maker | None:
    """Makes tensors of this form, if the form says everything."""
    shape, stride, dtype, device = like.shape, like.stride(), like.dtype, like.fake_device
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    is_plain = like.storage_offset() == 0 and like.untyped_storage().nbytes() == extent * dtype.itemsize
    if not is_plain or not _is_simple(like):
        return None

    def make(mode: FakeTensorMode, args: Any) -> Tensor:
        return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)

    return make


def _several(out: tuple[FakeTensor, ...]) -> Maker | None:
    makers = [make for make in map(_new, out) if make is not None]
    return (lambda mode, args: tuple(make(mode, args) for make in makers)) if len(makers) == len(out) else None
