"""A weight store, some of whose weights and optimizer states live elsewhere and visit the compute device to be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from sophia_galore.streaming.streams import Streams
from sophia_galore.streaming.units import Key
from sophia_galore.weights.store import Borrowed, WeightStore
from sophia_galore.weights.tensor_stream import FinishedFile
from sophia_galore.weights.weight import Weight

States = Mapping[str, MutableMapping[str, Tensor]]
"""The state tensors of each parameter that has some, by the parameter's name and theirs."""


class StreamedStore(WeightStore):
    """Named weights, of which those in units are lent in buffers.

    Between loans, their tensors and those of their states are on the meta device: shapes and dtypes without values. A
    loan replaces them with tensors in a buffer.

    Args:
        weights: Name to weight, in the model's order; those of units are on the meta device.
        streams: Lends the units.
        states: The live states, with meta tensors for those in units.
        join: Joins a weight with the deferred update in its state.
    """

    def __init__(
        self,
        weights: Mapping[str, Weight],
        streams: Streams,
        states: States,
        join: Callable[[str, Weight], Weight],
    ) -> None:
        super().__init__(weights)
        self._streams, self._states, self._join = streams, states, join
        self._users: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}
        for unit in streams.units.values():
            inside = (name for name in weights if name == unit.name or name.startswith(f"{unit.name}."))
            self._names[unit.name] = [name for name in inside if name in unit.layouts["weights"].spans]
        self._unit_of = {name: unit for unit, names in self._names.items() for name in names}
        self._state_at_rest = {
            name: {key: tensor for key, tensor in states[name].items() if tensor.is_meta}
            for name in self._unit_of
            if name in states
        }

    @contextmanager
    def borrow(self, *names: str, trains: bool = False, then: str = "") -> Iterator[Borrowed]:
        """See `WeightStore`; the next unit is fetched meanwhile."""
        with ExitStack() as loans:
            for unit in self._units(*names):
                loans.enter_context(self._lent(unit, trains=trains))
            for unit in self._units(then):
                self._streams.prefetch(unit, trains=trains)
            with super().borrow(*names) as borrowed:
                yield borrowed

    def each(self) -> Iterator[tuple[str, Weight]]:
        """See `WeightStore`."""
        for name in list(self._weights):
            with self.borrow(name) as borrowed:
                yield name, borrowed[name]

    def finished(self) -> Sequence[FinishedFile]:
        """See `WeightStore`."""
        return self._streams.finished("weights")

    def _units(self, *names: str) -> list[str]:
        """Return the units that hold some weights, or weights of some modules."""
        prefixes = tuple(f"{name}." for name in names)
        found = (unit for name, unit in self._unit_of.items() if name in names or name.startswith(prefixes))
        return list(dict.fromkeys(found))

    @contextmanager
    def _lent(self, unit: str, *, trains: bool) -> Iterator[None]:
        if not self._streams.units[unit].keys(trains=trains):
            yield  # its weights come by rows, and nothing else is needed
            return
        with self._streams.lend(unit, trains=trains) as tensors:
            self._users[unit] += 1
            self._bind(unit, tensors)
            try:
                yield
            finally:
                self._users[unit] -= 1
                if not self._users[unit]:  # else a loan around this one goes on
                    self._unbind(unit)

    def _bind(self, unit: str, tensors: Mapping[Key, Tensor]) -> None:
        """Let weights and states consist of the tensors in a buffer."""
        for name in self._names[unit]:
            for key in self._state_at_rest.get(name, ()):
                if (lent := tensors.get(Key("state", f"{name}/{key}"))) is not None:
                    self._states[name][key] = lent
            weight = self._weights[name].settled
            if not self._streams.units[unit].by_rows:
                lent_tensors = {ending: tensors[Key("weights", name + ending)] for ending in weight.tensors()}
                weight = weight.with_tensors(lent_tensors)
            self._weights[name] = self._join(name, weight)

    def _unbind(self, unit: str) -> None:
        for name in self._names[unit]:
            self._states.get(name, {}).update(self._state_at_rest.get(name, {}))
            weight = self._weights[name].settled
            if not self._streams.units[unit].by_rows:
                weight = weight.with_tensors({key: tensor.to("meta") for key, tensor in weight.tensors().items()})
            self._weights[name] = self._join(name, weight)
