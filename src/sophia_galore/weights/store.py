"""The weight store: it keeps a model's weights between uses, and lends them for one use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from sophia_galore.weights.plain import as_weight
from sophia_galore.weights.tensor_stream import FinishedFile
from sophia_galore.weights.weight import Rows, Weight


class Borrowed:
    """Weights that can be used inside a context of `borrow`.

    Args:
        weights: The weights by full name.
    """

    def __init__(self, weights: dict[str, Weight]) -> None:
        self._weights = weights

    def __getitem__(self, name: str) -> Weight:
        """Return a stored weight by its full name; writing to it changes the model."""
        return self._weights[name]

    def weights_of(self, module: str) -> dict[str, Weight]:
        """Return the weights of a module by their names inside it, except those that the module holds itself.

        Args:
            module: Name of the module, without the final dot.
        """
        return {
            name.removeprefix(f"{module}."): weight
            for name, weight in self._weights.items()
            if name.startswith(f"{module}.") and not weight.held_by_module
        }

    def values_of(self, module: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the weights of a module by their names inside it, except those that the module holds itself.

        Args:
            module: Name of the module, without the final dot.
            dtype: Compute precision.

        Returns:
            The values, to be read only: weights stored in that precision are not copied. Deleting the dictionary frees
            the decoded ones.
        """
        return {name: weight.values(dtype) for name, weight in self.weights_of(module).items()}


class WeightStore:
    """Named weights, each in its own format.

    Args:
        weights: Name to weight, in the model's order; a tensor is stored in its precision. They are not copied.
    """

    def __init__(self, weights: Mapping[str, Weight | Tensor]) -> None:
        self._weights = {name: as_weight(weight) for name, weight in weights.items()}

    def __getitem__(self, name: str) -> Weight:
        """Return a stored weight, for its shape, format or files. To compute with it, borrow it."""
        return self._weights[name]

    def __setitem__(self, name: str, weight: Weight) -> None:
        """Replace an existing weight."""
        if name not in self._weights:
            raise KeyError(name)
        self._weights[name] = weight

    def items(self) -> Iterable[tuple[str, Weight]]:
        """Return the names and weights, in the model's order, for their shapes and formats."""
        return self._weights.items()

    def each(self) -> Iterator[tuple[str, Weight]]:
        """Yield every weight, one after the other, for its values; each is valid until the next one is asked for."""
        yield from self._weights.items()

    def opened(self) -> Iterator[tuple[str, Callable[[], Weight]]]:
        """Yield the same, but for each weight a function that returns it, as weights of files have it."""
        for name, weight in self.each():
            yield name, partial(_itself, weight)

    def finished(self) -> Sequence[FinishedFile]:
        """Return files that hold the tensors of some weights as they are now."""
        return ()

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all weights by their names in a file: `name`, and with a suffix its scales."""
        return {
            name + ending: tensor
            for name, weight in self._weights.items()
            for ending, tensor in weight.tensors().items()
        }

    def first_non_finite(self) -> str | None:
        """Return the first weight that holds a NaN or an infinity; None: there is none."""
        return next((name for name, weight in self.each() if not weight.is_finite()), None)

    def plain_dtype(self) -> torch.dtype:
        """Return the precision of the weights that need no decoding."""
        return next(weight.dtype for weight in self._weights.values() if not weight.is_packed)

    @contextmanager
    def borrow(self, *names: str, trains: bool = False, then: str = "") -> Iterator[Borrowed]:
        """Lend weights, or all weights of modules such as a layer.

        Inside the context they can be read and written; changes are permanent.

        Args:
            names: Names of weights, or of modules without the final dot.
            trains: Whether the weights are to be updated, so that their optimizer state is needed too.
            then: What is borrowed next, a weight or a module; "": it is not known.
        """
        prefixes = tuple(f"{name}." for name in names)
        found = {key: weight for key, weight in self._weights.items() if key in names or key.startswith(prefixes)}
        try:
            yield Borrowed(found)
        finally:
            found.clear()

    @contextmanager
    def borrow_rows(self, name: str, rows: Rows, dtype: torch.dtype) -> Iterator[list[Tensor]]:
        """Lend some rows of a weight in compute precision, such as those of a batch's tokens.

        Args:
            name: Name of the weight.
            rows: The rows.
            dtype: Compute precision.

        Yields:
            One tensor (k, n), to be read only, in a list so that its memory can be freed inside the context.
        """
        with self.borrow(name) as borrowed:
            lent = [borrowed[name][rows].values(dtype)]
            try:
                yield lent
            finally:
                lent.clear()


def _itself(weight: Weight) -> Weight:
    return weight
