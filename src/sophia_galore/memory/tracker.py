"""Counts live tensor storages on any device, and refuses those that exceed a limit.

A dispatch mode sees the result of every tensor operation; a weak reference to its storage tells when it is freed. Sums
are kept by category, and the largest sum with its categories. What an operation allocates and frees inside itself (a
library's workspace) is not seen.

With a limit, a result that would exceed it is dropped and not counted, and the operation raises. So the numbers stay
right, and whoever catches the error can go on with less. The caller has to drop the error first: its traceback holds
the tensors of the failed calls.
"""

from __future__ import annotations

import gc
import heapq
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sophia_galore.config.size import bytes_in_words
from sophia_galore.engine.observe import Category
from sophia_galore.errors import OutOfMemory


def state_category(name: str) -> Category:
    """What a tensor of the optimizer's state counts as, by its name."""
    return "projections" if "/basis" in name else "optimizer state"


class Live(NamedTuple):
    """A storage that is alive.

    Args:
        reference: A weak reference to the storage.
        num_bytes: Its size.
        category: What it is for.
        born: How many storages were counted before it, and it.
        shape: Shape of the tensor that it was first seen with.
        dtype: That tensor's dtype.
    """

    reference: weakref.ref[Any]
    num_bytes: int
    category: Category
    born: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Held:
    """What is alive at a moment.

    Args:
        allocated_bytes: All of it.
        by_category: The same by what it is for.
        largest: The largest storages, largest first, with the keys that `storage_key` gives.
    """

    allocated_bytes: int
    by_category: Mapping[str, int]
    largest: Sequence[tuple[int, Live]]


@dataclass(frozen=True)
class Refusal:
    """An allocation that was refused.

    Args:
        asked_bytes: Bytes that it would have added.
        shape: Shape of its tensor.
        dtype: Its dtype.
        held: What was alive then.
    """

    asked_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    held: Held


class StorageTracker(TorchDispatchMode):
    """Follows the storages of one device while it is entered; a context manager.

    Args:
        device: The device whose storages count.
        limit_bytes: Most bytes that may be alive at once; None: no limit.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None = None) -> None:
        super().__init__()
        self._device_type = device.type
        self._live: dict[int, Live] = {}
        self._born = 0  # storages taken in so far
        self._born_at_peak = 0
        self.limit_bytes = limit_bytes
        self.refusal: Refusal | None = None  # the last one
        self.default: Category = "other"
        self.by_category: Counter[str] = Counter()
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self.peak_by_category: Counter[str] = Counter()

    def reset_peak(self) -> None:
        """Start a new peak at what is allocated now."""
        self.peak_bytes = self.allocated_bytes
        self._born_at_peak = self._born
        self.peak_by_category = Counter({key: value for key, value in self.by_category.items() if value})

    def held(self) -> Held:
        """What is alive now."""
        return Held(self.allocated_bytes, dict(self.by_category), self.largest())

    def largest(self, count: int = 3) -> list[tuple[int, Live]]:
        """The largest storages that are alive, largest first, with the keys that `storage_key` gives."""
        return heapq.nlargest(count, self._live.items(), key=lambda item: item[1].num_bytes)

    @staticmethod
    def storage_key(tensor: Tensor) -> int:
        """What a tensor's storage is told by while it lives."""
        key: int = tensor.untyped_storage()._cdata
        return key

    def tag(self, tensor: Tensor, category: Category) -> None:
        """Count this tensor's storage under `category`, at the peak too; unknown ones are taken in.

        Raises:
            OutOfMemory: It is unknown, and beyond the limit.
        """
        storage_key = self.storage_key(tensor)
        live = self._live.get(storage_key)
        if live is None:
            if not self._add(tensor, category):
                del tensor
                self._refuse()
            return
        if live.category == category:
            return
        self._live[storage_key] = live._replace(category=category)
        # A storage that was alive at the peak moves there too: it was made before anyone could say what it is for.
        for counts in (self.by_category, *([self.peak_by_category] if live.born <= self._born_at_peak else [])):
            counts[live.category] -= live.num_bytes
            counts[category] += live.num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.took_in(func(*args, **(kwargs or {})))

    def took_in(self, out: Any) -> Any:
        """Count what an operation made.

        Args:
            out: Its result.

        Returns:
            The same.

        Raises:
            OutOfMemory: It is beyond the limit.
        """
        if isinstance(out, Tensor):  # nearly always, and faster than asking for leaves
            fits = self._add(out, self.default)
        else:
            fits = all(self._add(leaf, self.default) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        if not fits:
            del out  # before the error, whose traceback would keep it alive
            self._refuse()
        return out

    def _add(self, tensor: Tensor, category: Category) -> bool:
        """Begin to count a tensor's storage, if it is a new one; False: it is beyond the limit."""
        storage = tensor.untyped_storage()
        storage_key, num_bytes = storage._cdata, storage.nbytes()
        live = self._live.get(storage_key)
        if live is not None:
            return live.num_bytes == num_bytes or self._resize(storage_key, live, num_bytes)
        if tensor.device.type != self._device_type:  # after the storage, which is asked for faster
            return True
        if self._exceeds(num_bytes) and (not gc.collect() or self._exceeds(num_bytes)):
            # What only a cycle of references held is no reason.
            self.refusal = Refusal(num_bytes, tuple(tensor.shape), tensor.dtype, self.held())
            return False
        self._born += 1
        reference = weakref.ref(storage, lambda _: self._drop(storage_key))
        self._live[storage_key] = Live(reference, num_bytes, category, self._born, tensor.shape, tensor.dtype)
        self._count(category, num_bytes)
        return True

    def _resize(self, storage_key: int, live: Live, num_bytes: int) -> bool:
        """A storage has another size than it had, by `out=` or by a resize; False: that is beyond the limit."""
        # Others hold it, so it can't be dropped: it counts as it is.
        self._live[storage_key] = live._replace(num_bytes=num_bytes)
        self._count(live.category, num_bytes - live.num_bytes)
        if num_bytes < live.num_bytes or not self._exceeds(0):
            return True
        self.refusal = Refusal(num_bytes - live.num_bytes, tuple(live.shape), live.dtype, self.held())
        return False

    def _exceeds(self, num_bytes: int) -> bool:
        return self.limit_bytes is not None and self.allocated_bytes + num_bytes > self.limit_bytes

    def _refuse(self) -> NoReturn:
        assert self.refusal is not None and self.limit_bytes is not None
        raise OutOfMemory(
            f"{bytes_in_words(self.refusal.asked_bytes)} more do not fit: {bytes_in_words(self.allocated_bytes)} of "
            f"{bytes_in_words(self.limit_bytes)} are taken."
        )

    def _drop(self, storage_key: int) -> None:
        live = self._live.pop(storage_key)
        self.by_category[live.category] -= live.num_bytes
        self.allocated_bytes -= live.num_bytes

    def _count(self, category: Category, num_bytes: int) -> None:
        self.by_category[category] += num_bytes
        self.allocated_bytes += num_bytes
        if self.allocated_bytes > self.peak_bytes:
            self.reset_peak()
