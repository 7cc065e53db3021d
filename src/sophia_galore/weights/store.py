"""The weight store: where a model's weights live between uses, and how they are borrowed for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from sophia_galore.weights.plain import as_weight
from sophia_galore.weights.weight import Rows, Weight


class Borrowed:
    """Weights that are on the device where they are computed with, for as long as a context of `borrow` lasts.

    Args:
        weights: By full name.
    """

    def __init__(self, weights: dict[str, Weight]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Weight:
        """Return a stored weight by its full name: whoever writes it changes the model."""
        return self._weights[name]

    def values_of(self, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the weights that a module has to be given, by their names inside of it; not those that it holds itself.

        Args:
            module: Its name without the final dot.
            dtype: Compute precision.

        Returns:
            Read only: what is stored in that precision is not copied. Dropping it frees what was decoded.
        """
        return {
            name.removeprefix(f"{module}."): weight.values(dtype)
            for name, weight in self._weights.items()
            if name.startswith(f"{module}.") and not weight.held_by_module
        }


class WeightStore:
    """Named weights, each in its own format.

    Args:
        weights: Name to weight, in the model's order; a tensor is one in its own precision. Taken over, not copied.
    """

    def __init__(self, weights: Mapping[str, Weight | Tensor]) -> None:
        self._weights = {name: as_weight(weight) for name, weight in weights.items()}

    def __getitem__(self, name: str) -> Weight:
        """What is stored under a name, wherever it is: for its shape, its format, its files. To compute, borrow it."""
        return self._weights[name]

    def __setitem__(self, name: str, weight: Weight) -> None:
        """Put another weight in a known one's place."""
        if name not in self._weights:
            raise KeyError(name)
        self._weights[name] = weight

    def items(self) -> Iterable[tuple[str, Weight]]:
        """Return the names and weights, in the model's order."""
        return self._weights.items()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that the store consists of, as a file keeps them: `name`, and beside codes their scales."""
        return {
            name + ending: tensor
            for name, weight in self._weights.items()
            for ending, tensor in weight.tensors().items()
        }

    def first_non_finite(self) -> str | None:
        """Return the first weight that holds a NaN or an infinity; None: there is none."""
        return next((name for name, weight in self._weights.items() if not weight.is_finite()), None)

    def plain_dtype(self) -> torch.dtype:
        """Precision of the weights that need no decoding."""
        return next(weight.dtype for weight in self._weights.values() if not weight.is_packed)

    @contextmanager
    def borrow(self, *names: str) -> Iterator[Borrowed]:
        """Weights, or all weights of modules such as a layer, for as long as they are used.

        Inside of the context they may be read and written; what is written stays.

        Args:
            names: Names of weights, or of modules without the final dot.
        """
        prefixes = tuple(f"{name}." for name in names)
        found = {key: weight for key, weight in self._weights.items() if key in names or key.startswith(prefixes)}
        try:
            yield Borrowed(found)
        finally:
            found.clear()

    @contextmanager
    def borrow_rows(self, name: str, rows: Rows, dtype: torch.dtype) -> Iterator[list[Tensor]]:
        """Some rows of a weight in compute precision, such as those of a batch's tokens, or a tile of the vocabulary.

        Args:
            name: Which weight.
            rows: Which rows.
            dtype: Compute precision.

        Yields:
            One tensor (k, n), in a list so that its memory can be freed inside of the context; read only.
        """
        lent = [self._weights[name][rows].values(dtype)]
        try:
            yield lent
        finally:
            lent.clear()
