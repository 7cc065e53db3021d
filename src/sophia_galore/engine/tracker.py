"""Counting live tensor storages, on any device.

A dispatch mode sees the result of every tensor operation; a weak reference to its storage tells when
it dies. Sums are kept by category, and the largest sum is remembered with its composition. What an
operation allocates and frees inside itself (a library's workspace) is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sophia_galore.engine.observe import Category


class StorageTracker(TorchDispatchMode):
    """Follows the storages of one device while it is entered; a context manager.

    Args:
        device: The device whose storages count.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device_type = device.type
        self._live: dict[int, tuple[weakref.ref[Any], int, Category, int]] = {}
        self._born = 0  # storages taken in so far
        self._born_at_peak = 0
        self.default: Category = "other"
        self.by_category: Counter[str] = Counter()
        self.allocated_bytes = 0
        self.peak_bytes = 0
        self.peak_by_category: Counter[str] = Counter()

    def reset_peak(self) -> None:
        """Start a new peak at what is allocated now."""
        self._set_peak()

    def tag(self, tensor: Tensor, category: Category) -> None:
        """Count this tensor's storage under `category`, at the peak too; unknown ones are taken in."""
        self._add(tensor, category)
        storage_key = tensor.untyped_storage()._cdata
        if storage_key not in self._live:
            return  # of another device
        reference, num_bytes, old, born = self._live[storage_key]
        if old == category:
            return
        self._live[storage_key] = (reference, num_bytes, category, born)
        self._move(self.by_category, old, category, num_bytes)
        if born <= self._born_at_peak:
            # Alive now and there then: a tensor gets its name only after it was made, which may be the peak.
            self._move(self.peak_by_category, old, category, num_bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf, self.default)
        return out

    def _add(self, tensor: Tensor, category: Category) -> None:
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        storage_key = storage._cdata
        if storage_key in self._live:
            return
        num_bytes = storage.nbytes()
        self._born += 1
        reference = weakref.ref(storage, lambda _: self._drop(storage_key))
        self._live[storage_key] = (reference, num_bytes, category, self._born)
        self.by_category[category] += num_bytes
        self.allocated_bytes += num_bytes
        if self.allocated_bytes > self.peak_bytes:
            self._set_peak()

    def _drop(self, storage_key: int) -> None:
        _, num_bytes, category, _ = self._live.pop(storage_key)
        self.by_category[category] -= num_bytes
        self.allocated_bytes -= num_bytes

    def _set_peak(self) -> None:
        self.peak_bytes = self.allocated_bytes
        self._born_at_peak = self._born
        self.peak_by_category = Counter({key: value for key, value in self.by_category.items() if value})

    @staticmethod
    def _move(counts: Counter[str], old: str, new: str, num_bytes: int) -> None:
        counts[old] -= num_bytes
        counts[new] += num_bytes
