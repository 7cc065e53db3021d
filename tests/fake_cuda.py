"""Streams and events of CUDA on a CPU, in the worst order that CUDA allows.

What is ordered on a stream waits in a queue: copies on side streams, and on the stream of the computation every
operation of a thread that is watched. There are two worst orders, and values are wrong in one of them where a wait is
missing:

- late: a copy runs once something waits for it, and computation as early as it may. Wrong if what follows a copy does
  not wait for it.
- early: a copy runs as early as it may, and computation once something waits for it. Wrong if a copy does not wait for
  what it follows.

Memory of the device is filled when it is allocated, as torch does if bits shall repeat: what comes before that is lost.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

Order = Literal["late", "early"]

_EMPTY = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}
_ON_THE_SPOT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded}
# They change what a tensor is, not its values.
_SHAPING = {"aten::set_", "aten::resize_", "aten::detach_"}
# Kernels run below autograd, which counts a change when it is ordered.
_ABOVE = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView).add(torch._C.DispatchKey.AutogradCPU)


class Event:
    """A place in the queue of a stream."""

    def __init__(self, stream: Stream, place: int) -> None:
        self.stream, self.place = stream, place

    @property
    def is_done(self) -> bool:
        return self.stream.num_done >= self.place

    def synchronize(self) -> None:
        self.stream.fake.run(self.stream, self.place)


class Stream:
    """A queue of operations."""

    device = torch.device("cuda", 0)

    def __init__(self, fake: FakeCuda) -> None:
        self.fake = fake
        self.queue: deque[Event | Callable[[], None]] = deque()
        self.num_done = 0

    def order(self, what: Event | Callable[[], None]) -> None:
        with self.fake.lock:
            self.queue.append(what)
            self.fake.advance()

    def record_event(self) -> Event:
        with self.fake.lock:
            return Event(self, self.num_done + len(self.queue))

    def wait_event(self, event: Event) -> None:
        self.order(event)
        if not self.fake.is_watching and self is self.fake.current_stream():
            self.synchronize()  # what this thread orders next runs at once

    def synchronize(self) -> None:
        self.record_event().synchronize()


class FakeCuda:
    """What stands for `torch.cuda`.

    Args:
        copies: When the copies of side streams run.

    Attributes:
        devices: The device that each thread chose, by its name.
    """

    def __init__(self, copies: Order) -> None:
        self.lock = threading.RLock()
        self.devices: dict[str, torch.device] = {}
        self._copies = copies
        self._compute = Stream(self)
        self._side: list[Stream] = []
        self._local = threading.local()

    def new_stream(self, device: torch.device) -> Stream:
        self._side.append(Stream(self))
        return self._side[-1]

    def current_stream(self, device: torch.device | None = None) -> Stream:
        return getattr(self._local, "stream", self._compute)

    def set_device(self, device: torch.device) -> None:
        self.devices[threading.current_thread().name] = device

    @property
    def is_watching(self) -> bool:
        """Whether operations of this thread run later than they are ordered."""
        return getattr(self._local, "is_watched", False)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._local.stream = self.current_stream(), stream
        try:
            with self.watching():
                yield
        finally:
            self._local.stream = before

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Operations of this thread run later than they are ordered."""
        if self.is_watching:
            yield
            return
        self._local.is_watched = True
        try:
            with _Watch(self):
                yield
        finally:
            self._local.is_watched = False

    def run(self, stream: Stream, place: int) -> None:
        """Run a queue up to a place, and what that waits for."""
        with self.lock:
            while stream.num_done < place:
                if isinstance(head := stream.queue[0], Event) and not head.is_done:
                    self.run(head.stream, head.place)
                else:
                    self._take(stream)
                self.advance()

    def advance(self) -> None:
        """Run what runs as early as it may."""
        for stream in self._side if self._copies == "early" else [self._compute]:
            while stream.queue and (not isinstance(head := stream.queue[0], Event) or head.is_done):
                self._take(stream)

    def _take(self, stream: Stream) -> None:
        what = stream.queue.popleft()
        if not isinstance(what, Event):
            with _disable_current_modes(), torch.no_grad(), torch._C._ExcludeDispatchKeyGuard(_ABOVE):
                what()
        stream.num_done += 1


class _Watch(TorchDispatchMode):
    """Orders operations on the stream of the thread instead of running them."""

    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self._fake = fake

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        schema, stream = func._schema, self._fake.current_stream()
        if schema.name in _SHAPING:
            return func(*args, **kwargs)
        if _ON_THE_SPOT & set(func.tags):
            stream.synchronize()  # the processor needs values
            return func(*args, **kwargs)
        call = partial(func, *args, **kwargs)
        if schema.is_mutable:
            stream.order(call)
            given = [
                args[place] if place < len(args) else kwargs.get(arg.name) for place, arg in enumerate(schema.arguments)
            ]
            changed = [
                value
                for value, arg in zip(given, schema.arguments, strict=True)
                if arg.alias_info is not None and arg.alias_info.is_write
            ]
            return None if not schema.returns else changed[0] if len(schema.returns) == 1 else tuple(changed)
        made = call()
        if any(given.alias_info is not None for given in schema.returns):
            return made  # a view
        tensors = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
        for tensor in tensors:
            if schema.name in _EMPTY and tensor.numel():
                stream.order(partial(tensor.untyped_storage().fill_, 0xA5))
        if tensors and schema.name not in _EMPTY:
            stream.order(partial(_fill_in, tensors, call))
        return made


def _fill_in(tensors: list[Tensor], call: Callable[[], Any]) -> None:
    """Compute again: the first time was for shapes, and its values may have been too old."""
    for tensor, value in zip(tensors, (leaf for leaf in tree_leaves(call()) if isinstance(leaf, Tensor)), strict=True):
        tensor.copy_(value)


@contextmanager
def fake_cuda(copies: Order) -> Iterator[FakeCuda]:
    """Put fake streams and events in the place of those of `torch.cuda`.

    Args:
        copies: When the copies of side streams run.
    """
    fake = FakeCuda(copies)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Event", Event)
        patch.setattr(torch.cuda, "Stream", fake.new_stream)
        for name in ("current_stream", "stream", "set_device"):
            patch.setattr(torch.cuda, name, getattr(fake, name))
        patch.setattr(torch, "empty", _unpinned(torch.empty))
        patch.setattr(torch, "zeros", _unpinned(torch.zeros))
        yield fake


def _unpinned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that makes memory of the host where pinned memory is asked for."""

    def made(*size: Any, pin_memory: bool = False, **how: Any) -> Tensor:
        if not pin_memory:
            return make(*size, **how)
        with _disable_current_modes():
            return make(*size, **how)

    return made
