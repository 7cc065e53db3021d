"""What the tensors of a folder are in a model, by transformers' own tables of conversions.

transformers renames, merges, cuts and transposes what it reads, as a table says for each architecture, and undoes it
when it saves. Its tables and operations are used as they are: first on the meta device, to know names and shapes, and
later on the tensors of one layer, or of one expert where each can be converted apart.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sophia_galore.errors import ModelError, short
from sophia_galore.model.conversion_steps import (
    Apart,
    Forward,
    OneExpert,
    OneExpertBack,
    Reversed,
    Stacking,
    is_by_expert,
)
from sophia_galore.weights.folder import INVERSE_FREQUENCIES
from sophia_galore.weights.layout import Computed, Conversion, Layout, Renamed, Shape, Shapes, Stacked

# Saved by earlier versions of transformers, which ignores them since.
_OLD_BUFFERS = (r"(^|\.)position_ids$",)


@dataclass(frozen=True)
class Names:
    """Names of a model's tensors.

    Args:
        parameters: Shapes of the parameters that are trained, by name.
        experts: For each tensor of all experts, by transformers' name, the names of its slices.
        buffers: Names of the buffers that are saved.
        copies: Further names of parameters: of a tied head.
    """

    parameters: Shapes
    experts: Mapping[str, tuple[str, ...]]
    buffers: frozenset[str]
    copies: frozenset[str]

    def has(self, name: str) -> bool:
        """Return whether a name that transformers uses belongs to a parameter."""
        return name in self.parameters or name in self.experts

    def own(self, name: str) -> tuple[str, ...]:
        """Return the names of the parameters behind a name that transformers uses."""
        return self.experts.get(name, (name,))


@dataclass
class _Group:
    """Tensors that are converted together."""

    converter: Any
    keys: dict[str, list[str]] = field(default_factory=dict)
    """By the pattern that they match."""

    @property
    def all_keys(self) -> list[str]:
        return [key for keys in self.keys.values() for key in keys]


def plan_layout(found: Shapes, reader: Any, names: Names, to_own: Mapping[str, str] | None = None) -> Layout:
    """Find out what the tensors of a folder are in a model.

    Args:
        found: Shapes of the folder's tensors, by name.
        reader: The model that transformers would make of the folder, on the meta device.
        names: Names of the tensors of the model that is trained.
        to_own: Its name for what it has of the reader's tensors, by their names there; None: all, under the same names.

    Returns:
        The layout. What is unknown stays under the name that it has, so that it is reported as unknown.

    Raises:
        ModelError: Tensors that are converted together do not fit together.
    """
    return _Planner(found, reader, names, to_own).layout()


class _Planner:
    def __init__(self, found: Shapes, reader: Any, names: Names, to_own: Mapping[str, str] | None) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._found, self._reader, self._names = found, reader, names
        self._state = reader.state_dict()
        self._to_own = {name: name for name in self._state} if to_own is None else to_own
        table = get_model_conversion_mapping(reader)
        self._renamings = [one for one in table if isinstance(one, WeightRenaming)]
        self._converters = [one for one in table if isinstance(one, WeightConverter)]
        self._of_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self._conversions: list[Conversion] = []
        self._carried: list[str] = []
        self._buffers: dict[str, str] = {}
        self._ignored: set[str] = set()

    def layout(self) -> Layout:
        groups: dict[str, _Group] = {}
        plain: dict[str, str] = {}
        for key in self._sorted_keys():
            name, pattern = self._renamed(key)
            if name not in self._state:
                self._unmatched(key, name)
            elif pattern is not None:
                group = groups.setdefault(name, _Group(copy.deepcopy(self._of_pattern[pattern])))
                group.keys.setdefault(pattern, []).append(key)
            elif name in plain:
                self._conversions.append(Renamed(key, key))  # a second tensor for the same weight
            else:
                plain[name] = key
        for name, key in plain.items():
            self._add_plain(key, name, plain)
        for name, group in groups.items():
            self._add_group(name, group)
        return Layout(tuple(self._conversions), tuple(self._carried), self._buffers, frozenset(self._ignored))

    def _sorted_keys(self) -> list[str]:
        from transformers.core_model_loading import dot_natural_key

        return sorted(self._found, key=dot_natural_key)  # the order in which experts are numbered

    def _renamed(self, key: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self._reader.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self._state)
        if name not in self._state and key in self._state:
            return key, None
        return name, pattern

    def _unmatched(self, key: str, name: str) -> None:
        ignorable = {*(self._reader._keys_to_ignore_on_load_unexpected or ()), *_OLD_BUFFERS}
        if name.endswith(INVERSE_FREQUENCIES):
            self._ignored.add(key)
        elif any(re.search(pattern, name) for pattern in ignorable):
            self._carried.append(key)
        else:
            self._conversions.append(Renamed(key, key))

    def _add_plain(self, key: str, name: str, plain: Mapping[str, str]) -> None:
        own = self._to_own.get(name)
        if own in self._names.copies:
            original = self._original_of(name)
            if original in plain:
                self._ignored.add(key)
            else:
                self._conversions.append(Renamed(key, self._to_own[original]))
        elif own is None or not self._names.has(own):
            self._carried.append(key)
            if own in self._names.buffers:
                self._buffers[key] = own
        elif own in self._names.experts:
            self._conversions.append(Stacked(key, self._names.experts[own]))
        else:
            self._conversions.append(Renamed(key, own))

    def _original_of(self, copied: str) -> str:
        """Return the name of the parameter that has a further name."""
        tensor = dict(self._reader.named_parameters(remove_duplicate=False))[copied]
        return next(str(name) for name, parameter in self._reader.named_parameters() if parameter is tensor)

    def _add_group(self, name: str, group: _Group) -> None:
        own = self._to_own.get(name)
        if own is None or not self._names.has(own):
            if own in self._names.buffers:
                raise ModelError(f"{group.all_keys[0]} can't be read into {own}.", "Take another model.")
            self._carried += group.all_keys
            return
        try:
            if own in self._names.experts and is_by_expert(group.converter):
                self._conversions += self._by_expert(name, own, group)
            else:
                self._conversions.append(self._together(name, group))
        except ModelError:
            raise
        except Exception as error:  # whatever the operations say of tensors that don't fit together
            raise self._misfit(name, group, short(error)) from error

    def _misfit(self, name: str, group: _Group, reason: str) -> ModelError:
        return ModelError(
            f"{group.all_keys[0]} and {len(group.all_keys) - 1} other tensors are to become {name}, but do not fit "
            f"together: {reason}.",
            "Files may be missing, or config.json belongs to another model.",
        )

    def _by_expert(self, name: str, own: str, group: _Group) -> list[Conversion]:
        """Return a conversion for each expert."""
        from transformers.core_model_loading import apply_renamings

        slices, converter = self._names.experts[own], group.converter
        shape = self._names.parameters[slices[0]]
        lacking = [each for each in converter.source_patterns if len(group.keys.get(each, ())) != len(slices)]
        if lacking:
            count = len(group.keys.get(lacking[0], ()))
            raise self._misfit(name, group, f"{count} of {len(slices)} experts have {lacking[0]}")
        self._refuse_shape(name, group, [shape], [self._shape_of_first(name, group)])
        back = Reversed(converter, name, self._reader)
        places = {apply_renamings(keys[0], self._renamings): pattern for pattern, keys in group.keys.items()}
        conversions: list[Conversion] = []
        for number, target in enumerate(slices):
            keys = {pattern: keys[number] for pattern, keys in group.keys.items()}
            for pattern, key in keys.items():
                self._refuse_shape(name, group, [self._found[group.keys[pattern][0]]], [self._found[key]])
            conversions.append(
                Computed(
                    {key: self._found[key] for key in keys.values()},
                    {target: shape},
                    OneExpert(converter, name, self._reader, keys, target),
                    OneExpertBack(back, name, places, keys, target),
                )
            )
        return conversions

    def _shape_of_first(self, name: str, group: _Group) -> Shape:
        keys = {pattern: keys[0] for pattern, keys in group.keys.items()}
        made = OneExpert(group.converter, name, self._reader, keys, "")(self._meta(list(keys.values())))
        return tuple(made[""].shape)

    def _together(self, name: str, group: _Group) -> Conversion:
        """Return one conversion for all tensors of a group."""
        from transformers.core_model_loading import apply_renamings

        forward = Forward(group.converter, name, self._reader, group.keys)
        made = forward(self._meta(group.all_keys))
        unknown = [each for each in made if not self._names.has(self._to_own.get(each, ""))]
        if unknown:
            raise self._misfit(name, group, f"{unknown[0]} is no part of the model that is trained")
        self._refuse_shape(
            name,
            group,
            [tuple(self._state[each].shape) for each in made],
            [tuple(each.shape) for each in made.values()],
        )
        owns = {each: self._names.own(self._to_own[each]) for each in made}
        stacks = frozenset(each for each in made if self._to_own[each] in self._names.experts)
        keys = {apply_renamings(key, self._renamings): key for key in group.all_keys}
        sources = {key: self._found[key] for key in group.all_keys}
        back = Reversed(group.converter, name, self._reader, {each: tuple(made[each].shape) for each in made}, sources)
        computed = Computed(
            sources,
            {each: self._names.parameters[each] for every in owns.values() for each in every},
            Apart(forward, owns, stacks),
            Stacking(back, owns, stacks, keys),
        )
        again = computed.back(computed.forward(self._meta(group.all_keys)))
        self._refuse_shape(name, group, list(sources.values()), [tuple(again[key].shape) for key in sources])
        return computed

    def _meta(self, keys: Sequence[str]) -> dict[str, Tensor]:
        return {key: torch.empty(self._found[key], device="meta") for key in keys}

    def _refuse_shape(self, name: str, group: _Group, wanted: Sequence[Shape], got: Sequence[Shape]) -> None:
        for right, shape in zip(wanted, got, strict=True):
            if tuple(right) != tuple(shape):
                raise self._misfit(name, group, f"a shape is {tuple(shape)} instead of {tuple(right)}")
