"""`optimizer.state` of the `torch.optim` classes: what they keep of each parameter, where torch looks for it.

An entry holds the live state tensors of a parameter, its number of steps, and its place in the gap between refreshes:
tensors and numbers, since distributed checkpoints keep nothing else. Whoever looks into `optimizer.state` finds
complete entries from the beginning: where torch finds none, it makes them by a step with zero gradients, which would
count (`torch.distributed.checkpoint.state_dict`). Until somebody looks, or a step needs them, they take no memory.

Entries are kept by the parameter's name, because whoever shards a model replaces its parameters in `param_groups`. A
step takes the tensors from its entry, so they may be replaced too, for example to wait on another device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sophia_galore.optim.sharding import Sharding, copy_parts, is_sharded, shard_states, sharding_of
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.optim.state import COUNTER, ParamState
from sophia_galore.optim.states import ParamStates

Entry = dict[str, Any]
"""What is kept of a parameter: "step", "place", and state tensors and counters by name."""

NUMBERS = {"step": int, "place": float}
"""The numbers of an entry that are no part of the rule's state, and their types."""

# The host reads these counters, so they stay out of the device's memory, where torch wants the tensors of all states.
_COUNTERS = {"next_refresh": ("next_refresh", "refresh_gap")}


class TorchStates:
    """The entries of an optimizer's parameters.

    Args:
        specs: The parameters, by name.
        states: Where the functions of a step look for state tensors.

    Attributes:
        entries: By the parameter's name.
        places: Place of each projected matrix among all of them, in [0, 1), by name.
    """

    def __init__(self, specs: Mapping[str, ParamSpec], states: ParamStates) -> None:
        self.entries: dict[str, Entry] = {}
        self.places: dict[str, float] = {}
        self._specs = specs
        self._states = states

    def existing(self) -> dict[str, Entry]:
        """Return the entries that take memory, and the places of all other matrices."""
        places: dict[str, Entry] = {name: {"place": place} for name, place in self.places.items()}
        return places | self.entries

    def fill(self, name: str, param: Tensor, *, begins: bool = False) -> Entry:
        """Return the entry of a parameter; what it lacks is created.

        Args:
            name: The parameter's name.
            param: The parameter. If it is frozen and was never trained, it has no step and no tensors, as in torch.
            begins: Whether it needs them anyway.
        """
        entry = self.entries.setdefault(name, {})
        if name in self.places:
            entry["place"] = self.places[name]
        sharding = sharding_of(name, param)
        if (begins or param.requires_grad) and "step" not in entry:
            entry["step"] = 0
            entry |= self._fresh(name, param, sharding)
        elif sharding is not None and any(isinstance(one, Tensor) and not is_sharded(one) for one in entry.values()):
            # The model was sharded after its states were made.
            whole = from_entry(entry)
            entry |= {key: one for key, one in self._fresh(name, param, sharding).items() if key in whole}
            for key, tensor in whole.items():
                if tensor.dtype != COUNTER:
                    copy_parts(entry[key], tensor, sharding)
        return entry

    def _fresh(self, name: str, param: Tensor, sharding: Sharding | None) -> Entry:
        spec = self._specs[name]
        if sharding is None:
            return to_entry(ParamState(spec, param.device).tensors)
        whole = ParamState(spec, torch.device("meta")).tensors
        kinds = {key: (tuple(one.shape), one.dtype) for key, one in whole.items() if one.dtype != COUNTER}
        counters = {key: one for key, one in whole.items() if one.dtype == COUNTER}
        return shard_states(kinds, spec, sharding, param.device) | to_entry(counters)

    def step_of(self, name: str) -> int:
        """Return the number of steps of a parameter so far."""
        return int(self.entries.get(name, {}).get("step", 0))

    @contextmanager
    def lend(self, name: str, param: Tensor) -> Iterator[Entry]:
        """Lend the state of a parameter to the functions of a step, on the parameter's device.

        Args:
            name: The parameter's name.
            param: The parameter.

        Yields:
            Its entry.
        """
        entry = self.fill(name, param, begins=True)
        tensors = from_entry(entry)
        for key, tensor in tensors.items():
            if tensor.dtype != COUNTER and tensor.device != param.device:
                # A state without values is as it was made: its parameter had none either.
                fresh = ParamState(self._specs[name], param.device).tensors if tensor.is_meta else {}
                tensors[key] = fresh[key] if tensor.is_meta else tensor.to(param.device)
        with self._states.using(name, param.device, tensors):
            yield entry
        entry |= to_entry(tensors)

    def load(self, name: str, param: Tensor, saved: Mapping[str, Any]) -> None:
        """Take over a saved entry; tensors are copied.

        Args:
            name: The parameter's name.
            param: The parameter.
            saved: Its saved entry, with tensors of the right shapes; without a step: nothing was kept, so that the
                parameter begins anew.
        """
        if "step" not in saved:
            self.entries.pop(name, None)
            return
        entry, sharding = self.fill(name, param, begins=True), sharding_of(name, param)
        numbers = {*NUMBERS, *(part for parts in _COUNTERS.values() for part in parts)}
        for key, value in saved.items():
            if key in numbers:
                entry[key] = NUMBERS.get(key, int)(value)
            else:
                copy_parts(entry[key], value, sharding)


class StateView(MutableMapping[Tensor, Entry]):
    """`optimizer.state`: the entries by parameter, for as long as the parameter is in `param_groups`.

    Args:
        members: Returns the pairs of name and parameter.
        states: The entries.
    """

    def __init__(self, members: Callable[[], Iterator[tuple[str, Tensor]]], states: TorchStates) -> None:
        self._members = members
        self._states = states

    def __getitem__(self, param: Tensor) -> Entry:
        return self._states.fill(self._name(param), param)

    def __setitem__(self, param: Tensor, entry: Entry) -> None:
        self._states.entries[self._name(param)] = entry

    def __delitem__(self, param: Tensor) -> None:
        self._states.entries.pop(self._name(param), None)

    def __iter__(self) -> Iterator[Tensor]:
        return (param for name, param in self._members() if self._states.fill(name, param))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr({name: self._states.fill(name, param) for name, param in self._members()})

    def _name(self, param: Tensor) -> str:
        for name, own in self._members():
            if own is param:
                return name
        raise KeyError(param)


def to_entry(tensors: Mapping[str, Tensor]) -> Entry:
    """Return state tensors as an entry has them: counters as numbers.

    Args:
        tensors: From `ParamState`, by name; not copied.
    """
    entry: Entry = {}
    for key, tensor in tensors.items():
        entry |= zip(_COUNTERS[key], tensor.tolist(), strict=True) if key in _COUNTERS else {key: tensor}
    return entry


def from_entry(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state tensors of an entry, by name; the opposite of `to_entry`."""
    tensors = {key: value for key, value in entry.items() if isinstance(value, Tensor) and key not in NUMBERS}
    for key, parts in _COUNTERS.items():
        if all(part in entry for part in parts):
            tensors[key] = torch.tensor([int(entry[part]) for part in parts], dtype=COUNTER)
    return tensors
