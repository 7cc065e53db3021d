"""Weights that stay in the files of a folder, for models larger than memory: a matrix is read whenever it is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sophia_galore.weights.layout import Layout
from sophia_galore.weights.saved import SavedWeight, matching_weights
from sophia_galore.weights.store import Borrowed, WeightStore
from sophia_galore.weights.weight import Rows


class FileStore(WeightStore):
    """The weights of a model's folder, to be read only.

    Args:
        saved: The weights in their files, in the model's order.
        device: Where they are used.
    """

    def __init__(self, saved: Mapping[str, SavedWeight], device: torch.device) -> None:
        vectors = {name: one.opened().copied_to(device) for name, one in saved.items() if len(one.kind.shape) < 2}
        super().__init__({name: vectors.get(name, one.kind) for name, one in saved.items()})
        self._saved = {name: one for name, one in saved.items() if name not in vectors}
        self._device, self._users = device, Counter[str]()

    @classmethod
    def of(
        cls,
        folder: Path,
        shapes: Mapping[str, torch.Size],
        *,
        tied_head: str | None,
        device: torch.device,
        layout: Layout | None = None,
    ) -> FileStore:
        """Open a folder.

        Args:
            folder: The model's folder.
            shapes: Name and shape of each parameter of the model.
            tied_head: Name of a second copy of the tied embedding in files; it is ignored.
            device: Where the weights are used.
            layout: What the folder's tensors are in the model; None: its weights under the same names.

        Raises:
            ModelError: A tensor is missing, unknown or of another shape, or a file is damaged.
        """
        found = {
            saved.name: saved for saved in matching_weights(folder, shapes, tied_head, layout.read if layout else iter)
        }
        return cls({name: found[name] for name in shapes}, device)

    @contextmanager
    def borrow(self, *names: str, trains: bool = False, then: str = "") -> Iterator[Borrowed]:
        """See `WeightStore`; matrices are read from their files."""
        prefixes = tuple(f"{name}." for name in names)
        lent = [name for name in self._saved if name in names or name.startswith(prefixes)]
        for name in lent:
            self._users[name] += 1
            if self._users[name] == 1:
                self._weights[name] = self._saved[name].opened().copied_to(self._device)
        try:
            with super().borrow(*names) as borrowed:
                yield borrowed
        finally:
            for name in lent:
                self._users[name] -= 1
                if not self._users[name]:
                    self._weights[name] = self._saved[name].kind

    @contextmanager
    def borrow_rows(self, name: str, rows: Rows, dtype: torch.dtype) -> Iterator[list[Tensor]]:
        """See `WeightStore`; only these rows are read."""
        at_hand = self._saved[name].opened() if name in self._saved else self._weights[name]
        lent = [at_hand[rows.cpu() if isinstance(rows, Tensor) else rows].values(dtype).to(self._device)]
        del at_hand
        try:
            yield lent
        finally:
            lent.clear()
