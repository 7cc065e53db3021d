"""The optimizer states of all parameters: where they are, and how they are saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from sophia_galore.errors import CheckpointError
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.optim.state import ParamState
from sophia_galore.weights.tensor_stream import TensorStream, blocks_of


class ParamStates:
    """The states of some parameters, by the parameters' names.

    Args:
        specs: The parameters, by name.
        device: Device of the states; None: each is created at its first use, on its parameter's device.
        elsewhere: Names of the parameters whose states live elsewhere: on the meta device unless they are lent.

    Attributes:
        lend: Lends the state of a parameter inside a context; by default, all are there.
    """

    def __init__(
        self, specs: Mapping[str, ParamSpec], *, device: torch.device | None = None, elsewhere: Collection[str] = ()
    ) -> None:
        self.lend: Callable[[str], AbstractContextManager[object]] = _is_there
        self._specs = specs
        self._states: dict[str, ParamState] = {}
        if device is not None:
            places = {name: torch.device("meta") if name in elsewhere else device for name in specs}
            self._states = {name: ParamState(spec, places[name]) for name, spec in specs.items()}

    def get(self, name: str) -> ParamState | None:
        """Return the state of a parameter; None: it was not created yet."""
        return self._states.get(name)

    def of(self, name: str, device: torch.device) -> ParamState:
        """Return the state of a parameter; it is created on a device if there is none yet."""
        if name not in self._states:
            self._states[name] = ParamState(self._specs[name], device)
        return self._states[name]

    @contextmanager
    def using(self, name: str, device: torch.device, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Use existing tensors as the state of a parameter inside a context.

        Args:
            name: The parameter's name.
            device: Their device.
            tensors: The state tensors by name, which steps change in place.
        """
        self._states[name] = ParamState(self._specs[name], device, tensors)
        try:
            yield
        finally:
            del self._states[name]

    def begin(self, names: Iterable[str]) -> None:
        """Write the states of parameters that live elsewhere as they are before the first step: not all are zero.

        Args:
            names: The parameters; those without a state are left out.
        """
        for name in names:
            if name in self._states and self._states[name].begins_above_zero:
                with self.lend(name):
                    self._states[name].begin()

    def each(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        """Yield each parameter's name and state tensors; those that live elsewhere are lent until the next one."""
        for name, state in self._states.items():
            with self.lend(name):
                yield name, state.tensors

    def tensors(self) -> dict[str, MutableMapping[str, Tensor]]:
        """Return the live state tensors of each parameter by their names; to replace one changes the state."""
        return {name: state.tensors for name, state in self._states.items()}

    def named(self) -> dict[str, Tensor]:
        """Return all state tensors by their "parameter/state" names; they are not copies.

        Those that live elsewhere are on the meta device, unless they are lent.
        """
        return {
            f"{name}/{key}": tensor for name, state in self._states.items() for key, tensor in state.tensors.items()
        }

    def stream(self) -> TensorStream:
        """Return all state tensors as `named` names them, parameter by parameter, to be written into files."""
        return TensorStream(
            [
                {f"{name}/{key}": (tensor.dtype, tuple(tensor.shape)) for key, tensor in state.tensors.items()}
                for name, state in self._states.items()
            ],
            lambda: (
                block
                for name, tensors in self.each()
                for key, tensor in tensors.items()
                for block in blocks_of(f"{name}/{key}", tensor)
            ),
        )

    def load(self, saved: TensorStream) -> None:
        """Load saved states exactly, one tensor after the other.

        Args:
            saved: From `stream`, in any order.

        Raises:
            CheckpointError: A tensor is missing, unexpected, or of another shape or dtype; nothing was changed.
        """
        own, kinds = self.named(), saved.kinds
        odd = sorted(own.keys() ^ kinds.keys()) or sorted(
            key for key in own if (own[key].dtype, tuple(own[key].shape)) != kinds[key]
        )
        if odd:
            raise CheckpointError(
                f"The saved optimizer state does not fit this run: {odd[0]} (and {len(odd) - 1} more) differs.",
                "Resume with the configuration that the checkpoint was made with.",
            )
        for name, rows, first in saved.blocks():
            parameter, _, key = name.rpartition("/")
            with self.lend(parameter):
                tensor = self._states[parameter].tensors[key]
                (tensor[first : first + len(rows)] if rows.ndim else tensor).copy_(rows)


def _is_there(name: str) -> AbstractContextManager[object]:
    """Lend a state that is in its place already."""
    return nullcontext()
