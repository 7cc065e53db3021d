"""The whole Hugging Face model with the weights of a store; packed weights are decoded one at a time.

Weights that live elsewhere are lent while their layer runs, and the next layer is fetched meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from sophia_galore.model.architecture import Architecture
from sophia_galore.model.experts import ExpertWeights
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.weights.store import WeightStore
from sophia_galore.weights.weight import Weight


@contextmanager
def whole_model(architecture: Architecture, store: WeightStore) -> Iterator[Any]:
    """Put the stored weights into the model; a packed weight, or one that lives elsewhere, only while its module runs.

    Args:
        architecture: The model's modules; parameters on the meta device, before and after.
        store: The weights; no second copy of them is made.

    Yields:
        The Hugging Face model, in evaluation mode.
    """
    names = {
        id(parameter): name
        for name, parameter in architecture.model.named_parameters()
        if not store[name].held_by_module  # its module holds and decodes such a weight itself
    }
    places = [
        (module, key, parameter)
        for module in architecture.model.modules()
        for key, parameter in module.named_parameters(recurse=False)
        if id(parameter) in names
    ]
    dtype, device = store.plain_dtype(), _device_of(store)
    hooks: list[RemovableHandle] = []
    whole: dict[int, nn.Parameter] = {}
    by_rows: list[nn.Module] = []
    decoding: list[ExpertWeights] = []
    loans = _Loans(store)
    for name, layer, following in zip(
        architecture.layer_names, architecture.layers, (*architecture.layer_names[1:], ""), strict=True
    ):
        hooks += loans.while_working(layer, name, then=following)
    for module, key, meta in places:
        name = names[id(meta)]
        stored = store[name]
        if not stored.is_packed and not _is_elsewhere(stored):
            whole.setdefault(id(meta), nn.Parameter(stored.values(stored.dtype), requires_grad=False))
            continue
        # The placeholder has the right shape, precision and device, and takes no memory.
        empty = torch.empty((), dtype=dtype, device=device).expand(stored.shape)
        placeholder = whole.setdefault(id(meta), nn.Parameter(empty, requires_grad=False))
        if _is_elsewhere(stored) and module is architecture.head:
            # The whole head may be larger than the memory that there is.
            vars(module)["forward"] = _by_rows(store, name, dtype)
            by_rows.append(module)
            continue
        if isinstance(module, ExpertWeights):
            # Its layer, which lends the weight, takes it by its number: no forward of its own runs.
            module.decode = partial(_decoded, store, name.rpartition(".")[0], dtype)
            decoding.append(module)
            continue
        if not isinstance(module, nn.Embedding):
            hooks += loans.while_working(module, name)
        hooks += _decode_while_working(module, key, store, name, placeholder)
    was_training = architecture.model.training
    try:
        for module, key, meta in places:
            setattr(module, key, whole[id(meta)])
        architecture.model.eval()
        yield architecture.model
    finally:
        loans.end()
        for hook in hooks:
            hook.remove()
        for module in by_rows:
            del vars(module)["forward"]
        for experts in decoding:
            experts.decode = None
        for module, key, meta in places:
            setattr(module, key, meta)
        architecture.model.train(was_training)


class _Loans:
    """Lends weights while modules run."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self._open: dict[int, ExitStack] = {}

    def while_working(self, module: nn.Module, name: str, *, then: str = "") -> list[RemovableHandle]:
        """Lend a weight or the weights of a module while a module runs.

        Args:
            module: The module that runs.
            name: What is lent.
            then: What is needed next.
        """

        def before(module: nn.Module, args: Any) -> None:
            self._end(module)  # after Ctrl-C, it may still be open
            self._open[id(module)] = loan = ExitStack()
            loan.enter_context(self._store.borrow(name, then=then))

        def after(module: nn.Module, args: Any, out: Any) -> None:
            self._end(module)

        return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def end(self) -> None:
        """End all loans."""
        while self._open:
            self._open.popitem()[1].close()

    def _end(self, module: nn.Module) -> None:
        if (loan := self._open.pop(id(module), None)) is not None:
            loan.close()


def _device_of(store: WeightStore) -> torch.device:
    """Return the device of the weights that always stay there, such as those of the last norm."""
    return next(weight.device for _, weight in store.items() if not _is_elsewhere(weight))


def _is_elsewhere(weight: Weight) -> bool:
    return weight.settled.first.is_meta


def _by_rows(store: WeightStore, name: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the forward of a head whose weight is fetched block of rows by block of rows."""

    def forward(hidden: Tensor) -> Tensor:
        parts: list[Tensor] = []
        for rows in row_blocks(store[name].shape):
            with store.borrow_rows(name, rows, dtype) as (weight,):
                parts.append(functional.linear(hidden, weight))
        return torch.cat(parts, -1)

    return forward


def _decoded(store: WeightStore, experts: str, dtype: torch.dtype, number: int) -> Tensor:
    return store[f"{experts}.{number}"].values(dtype)


def _decode_while_working(
    module: nn.Module, key: str, store: WeightStore, name: str, placeholder: nn.Parameter
) -> list[RemovableHandle]:
    """Add hooks that decode a module's weight before its forward and remove it after."""
    dtype = placeholder.dtype

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if isinstance(module, nn.Embedding):  # decode only the rows in use
            tokens, places = torch.unique(args[0], return_inverse=True)
            with store.borrow_rows(name, tokens, dtype) as (rows,):
                setattr(module, key, nn.Parameter(rows, requires_grad=False))
            return (places, *args[1:])
        setattr(module, key, nn.Parameter(store[name].values(dtype), requires_grad=False))
        return args

    def after(module: nn.Module, args: Any, out: Any) -> None:
        # Always the placeholder: after Ctrl-C, the module's previous weight may still be a decoded one.
        setattr(module, key, placeholder)

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
