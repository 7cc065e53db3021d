"""What operations make of fake tensors, remembered: nearly all of them come again, layer by layer and rung by rung.

PyTorch's own cache of fake tensors looks at all that may ever matter. Here there are no symbolic shapes, no sparse
tensors and no constants, so what an operation gives follows from the forms of what it is given, which are a key that
is quickly made. Remembered are results that are new tensors, views of an argument, or the argument that was written
to; everything else is left to PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

_MOST = 50_000
"""So many results are remembered, of a few hundred bytes each; then all are forgotten."""
_UNLIKE = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view}
_SIMPLE = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)

Made = Callable[[FakeTensorMode, Any], Any]
"""Makes a result anew, from a mode and an operation's arguments."""

_known: dict[Any, Made] = {}


class _Kind(NamedTuple):
    """What the result of an operation is: an argument that it wrote to, a view of one, or, without a place, new."""

    place: int | None
    writes: bool = False


_kinds: dict[Any, _Kind | None] = {}


class _Unknown(Exception):
    """An argument is of a kind whose form is not all that matters."""


def key_of(func: Any, args: Any, kwargs: Any) -> Any:
    """What the form of an operation's result depends on.

    Args:
        func: The operation.
        args: Its arguments.
        kwargs: Those with a name.

    Returns:
        Something hashable; None: the result is not to be remembered.
    """
    if _kind(func) is None:
        return None
    # What works element by element makes the same form of every number.
    form = _form_without_numbers if torch.Tag.pointwise in func.tags else _form
    try:
        return func, tuple(map(form, args)), tuple((name, form(value)) for name, value in kwargs.items())
    except _Unknown:
        return None


def recall(key: Any) -> Made | None:
    """Who makes the result of an operation that was seen before.

    Args:
        key: From `key_of`.
    """
    return _known.get(key)


def remember(key: Any, func: Any, args: Any, out: Any) -> None:
    """Take note of a result.

    Args:
        key: From `key_of`.
        func: The operation.
        args: Its arguments.
        out: What it gave.
    """
    kind = _kind(func)
    made: Made | None = None
    if kind is None:
        return
    if kind.place is not None:
        made = _argument(kind.place, args, out) if kind.writes else _view(kind.place, args, out)
    elif isinstance(out, FakeTensor):
        # Some operations give a view and do not say so, as `_unsafe_view` does.
        place = next((place for place, one in enumerate(args) if _shares(one, out)), None)
        made = _new(out) if place is None else _view(place, args, out)
    elif isinstance(out, tuple) and out and all(isinstance(one, FakeTensor) for one in out):
        parts = [part for part in map(_new, out) if part is not None]
        made = _together(parts) if len(parts) == len(out) else None
    if made is not None:
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = made


def _form(value: Any) -> Any:
    if isinstance(value, FakeTensor):
        if value.constant is not None or value.layout != torch.strided:
            raise _Unknown
        return value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device
    if type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided:
        # A real one. Operations whose result's form depends on values are not remembered.
        return "real", value.shape, value.stride(), value.storage_offset(), value.dtype, value.device
    if isinstance(value, _SIMPLE):
        return type(value), value  # 1, 1.0 and True are equal, but make other tensors
    if isinstance(value, (list, tuple)):
        return tuple(map(_form, value))
    if isinstance(value, torch.Generator):
        return torch.Generator
    raise _Unknown


def _form_without_numbers(value: Any) -> Any:
    return type(value) if isinstance(value, (int, float)) else _form(value)


def _kind(func: Any) -> _Kind | None:
    """What an operation does; None: nothing that can be remembered."""
    if func not in _kinds:
        _kinds[func] = _find_kind(func)
    return _kinds[func]


def _find_kind(func: Any) -> _Kind | None:
    if not isinstance(func, torch._ops.OpOverload) or _UNLIKE & set(func.tags):
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


def _argument(place: int, args: Any, out: Any) -> Made | None:
    return (lambda mode, args: args[place]) if out is args[place] else None


def _view(place: int, args: Any, out: Any) -> Made | None:
    """Who makes a tensor of some form over an argument's storage."""
    if not isinstance(out, FakeTensor) or out is args[place] or not _is_simple(out):
        return None
    if (
        out.untyped_storage()._cdata != args[place].untyped_storage()._cdata
        or out.fake_device != args[place].fake_device
    ):
        return None
    shape, stride, offset, dtype, device = out.shape, out.stride(), out.storage_offset(), out.dtype, out.fake_device

    def make(mode: FakeTensorMode, args: Any) -> Tensor:
        made = torch.empty(0, dtype=dtype, device="meta")
        # Where kernels run, and a storage is one of the meta device, as which it was made.
        with in_kernel_invocation_manager(mode):
            made.set_(args[place].untyped_storage(), offset, shape, stride)
        return FakeTensor(mode, made, device)

    return make


def _shares(one: Any, out: FakeTensor) -> bool:
    return isinstance(one, FakeTensor) and one.untyped_storage()._cdata == out.untyped_storage()._cdata


def _is_simple(tensor: FakeTensor) -> bool:
    return tensor.constant is None and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())


def _new(like: FakeTensor) -> Made | None:
    """Who makes tensors of a form, if that is all there is to it."""
    shape, stride, dtype, device = like.shape, like.stride(), like.dtype, like.fake_device
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    is_plain = like.storage_offset() == 0 and like.untyped_storage().nbytes() == extent * dtype.itemsize
    if not is_plain or not _is_simple(like):
        return None

    def make(mode: FakeTensorMode, args: Any) -> Tensor:
        return FakeTensor(mode, torch.empty_strided(shape, stride, dtype=dtype, device="meta"), device)

    return make


def _together(parts: list[Made]) -> Made:
    return lambda mode, args: tuple(part(mode, args) for part in parts)
