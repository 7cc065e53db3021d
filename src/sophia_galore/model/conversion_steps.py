"""Apply one of transformers' converters to tensors, and undo it.

A step is a function of named tensors. It keeps no tensor, so the same one serves any number of times.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sophia_galore.weights.layout import Shapes


def is_by_expert(converter: Any) -> bool:
    """Return whether a converter stacks a tensor of each expert, and treats each slice by itself."""
    from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose

    first, *others = converter.operations
    apart = (
        (isinstance(one, Concatenate) and one.dim > 0 and one.num_shards_attribute is None)
        or (isinstance(one, Transpose) and min(one.dim0, one.dim1) > 0 and not one.check_dims)
        for one in others
    )
    return isinstance(first, MergeModulelist) and first.dim == 0 and len(converter.target_patterns) == 1 and all(apart)


@dataclass(frozen=True)
class Forward:
    """Applies a converter to tensors, given by their keys; returns tensors by transformers' names."""

    converter: Any
    name: str
    reader: Any
    keys: Mapping[str, Sequence[str]]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return _applied(
            copy.deepcopy(self.converter),
            self.name,
            self.reader,
            {pattern: [tensors[key] for key in keys] for pattern, keys in self.keys.items()},
        )


class Reversed:
    """Undoes a converter.

    Args:
        converter: The converter.
        name: The first tensor that it makes.
        reader: The model.
        targets: Shapes of the tensors that it makes.
        sources: Shapes of the tensors that it takes.
    """

    def __init__(
        self, converter: Any, name: str, reader: Any, targets: Shapes | None = None, sources: Shapes | None = None
    ) -> None:
        from transformers.core_model_loading import Transpose

        self._converter = converter.reverse_transform()
        self._reader = reader
        for one in self._converter.operations:
            if isinstance(one, Transpose) and one.check_dims and targets and sources:
                # On the way back it would find the shape that it is to have, and do nothing.
                one.check_dims = False
                if set(targets.values()) == set(sources.values()):
                    one.dim0 = one.dim1
        self._name = self._converter.rename_source_key(name)[0]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by their names before the renamings are undone, from tensors by transformers' names."""
        collected: dict[str, list[Tensor]] = {}
        for name, tensor in tensors.items():
            pattern = self._converter.rename_source_key(name)[1]
            collected.setdefault(pattern, []).append(tensor)
        return _applied(copy.deepcopy(self._converter), self._name, self._reader, collected)


@dataclass(frozen=True)
class OneExpert:
    """Converts the tensors of one expert, given by their keys."""

    converter: Any
    name: str
    reader: Any
    keys: Mapping[str, str]
    target: str

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parts = {pattern: [tensors[key]] for pattern, key in self.keys.items()}
        (made,) = _applied(copy.deepcopy(self.converter), self.name, self.reader, parts).values()
        return {self.target: made[0]}


@dataclass(frozen=True)
class OneExpertBack:
    """Undoes this."""

    back: Reversed
    name: str
    patterns: Mapping[str, str]
    keys: Mapping[str, str]
    target: str

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made = self.back({self.name: tensors[self.target][None]})
        return {self.keys[self.patterns[name]]: tensor for name, tensor in made.items()}


@dataclass(frozen=True)
class Apart:
    """Converts, and cuts the tensors of all experts into those of each."""

    forward: Forward
    owns: Mapping[str, tuple[str, ...]]
    stacks: frozenset[str]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        apart: dict[str, Tensor] = {}
        for name, tensor in self.forward(tensors).items():
            parts = tensor.unbind() if name in self.stacks else (tensor,)
            apart |= dict(zip(self.owns[name], parts, strict=True))
        return apart


@dataclass(frozen=True)
class Stacking:
    """Undoes this."""

    back: Reversed
    owns: Mapping[str, tuple[str, ...]]
    stacks: frozenset[str]
    keys: Mapping[str, str]

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        whole = {
            name: torch.stack([tensors[own] for own in owns]) if name in self.stacks else tensors[owns[0]]
            for name, owns in self.owns.items()
        }
        return {self.keys[name]: tensor for name, tensor in self.back(whole).items()}


def _applied(converter: Any, name: str, reader: Any, collected: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    converter.collected_tensors.update(collected)
    made = converter.convert(name, model=reader, config=reader.config)
    return {each: tensor[0] if isinstance(tensor, list) else tensor for each, tensor in made.items()}
