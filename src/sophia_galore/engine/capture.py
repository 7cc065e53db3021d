"""Record the arguments with which the model calls each layer.

Position embeddings, masks and attention types differ by architecture. Instead of rebuilding them, the base model is
run once with every layer replaced by a recorder, and with the embeddings of its tokens given. The engine then calls the
layers with the recorded arguments.

If several examples are packed into one row, position ids restart at each example. A second run over the longest
example alone records its mask, which `segments.py` needs for attention within each example. Layers with a state of
their own (convolutions, recurrences) run for each example apart, with the arguments of one that is alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from sophia_galore.data.batches import MicroBatch
from sophia_galore.engine.segments import Segments, attending_within, own_attention
from sophia_galore.engine.shared import SharedInput, SharedStates
from sophia_galore.errors import ModelError, lacks_memory
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.streams import side_by_side

Lengths = tuple[tuple[int, ...], ...]

# How many values a model may expect of each of its layers, and what was found for the models that live.
_MOST_ANSWERS = (0, 1, 2, 3)
_ANSWERS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@dataclass(frozen=True)
class Entering:
    """What enters the base model for one micro-batch.

    Args:
        input_ids: (B, T) int64.
        embedded: (B, T, d), the embeddings of these tokens.
        lookups: Those of further embeddings, by the names of their weights.
        weights: The other weights that are used before the first layer, by name.
    """

    input_ids: Tensor
    embedded: Tensor
    lookups: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)

    def detached(self, rows: slice = slice(None), tokens: slice = slice(None)) -> Entering:
        """Return some of its rows and some of their tokens, without a graph."""
        return Entering(
            self.input_ids[rows, tokens],
            self.embedded[rows, tokens].detach(),
            {name: each[rows, tokens].detach() for name, each in self.lookups.items()},
            {name: weight.detach() for name, weight in self.weights.items()},
        )


@dataclass(frozen=True)
class LayerCall:
    """The arguments of one layer for one micro-batch, apart from the hidden states.

    Args:
        args: By position.
        kwargs: By name.
        micro_batch: Number of the micro-batch in the effective batch, for dropout.
        inputs: The arguments that have a graph back to the embedding; the layer gets their leaves.
        states: The arguments through which layers hand tensors to later ones.
        lengths: If the layer runs for each packed example apart: for each row, the lengths of its examples in tokens.
        alone: The arguments for an example of each of these lengths.
        real: (B * T,) bool, which tokens are no padding; None: all are, or nothing asks for it.
        block: Number of the block of micro-batches whose gradients are summed apart from others.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    micro_batch: int = 0
    inputs: tuple[SharedInput, ...] = ()
    states: tuple[SharedStates, ...] = ()
    lengths: Lengths = ()
    alone: Mapping[int, LayerCall] = field(default_factory=dict)
    real: Tensor | None = None
    block: int = 0

    @property
    def is_packed(self) -> bool:
        """Whether rows are packed, so that attention must stay within each example."""
        return isinstance(self.kwargs.get("attention_mask"), Segments)


class _Recorder(nn.Module):
    """Takes a layer's place, and notes how it is called.

    Args:
        layer: The layer.
        shape: The shape of hidden states, as the layer gets them.
        answers: How many values the model expects of a layer; 0: the hidden states alone, not in a tuple.
    """

    def __init__(self, layer: nn.Module, shape: torch.Size, answers: int) -> None:
        super().__init__()
        self.hidden: Tensor | None = None
        self.call: LayerCall | None = None
        self._shape, self._answers = shape, answers
        vars(self)["_layer"] = layer  # not as a submodule, which would change the parameters' names
        self._names = _names_of_arguments(type(layer).forward)

    def __getattr__(self, name: str) -> Any:
        # Some models read attributes of a layer, such as its attention type, while they loop over the layers.
        return getattr(vars(self)["_layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape != self._shape:
            raise ValueError(f"a layer gets {tuple(hidden_states.shape)} for {tuple(self._shape)}")
        # By name, so that a mask is found wherever it is given.
        num_named = min(len(args), len(self._names))
        named = dict(zip(self._names, args, strict=False))
        self.hidden, self.call = hidden_states, LayerCall(args[num_named:], {**named, **kwargs})
        if not self._answers:
            return hidden_states
        return (hidden_states, *[None] * (self._answers - 1))


@cache
def _names_of_arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of what the forward of a layer's class takes behind the hidden states."""
    return tuple(inspect.signature(forward).parameters)[2:]


class _NormBehind(nn.Module):
    """Takes the place of the last norm, and leaves out what comes behind the last layer.

    One without parameters may be in use before the first layer as well.
    """

    def __init__(self, norm: nn.Module, last: _Recorder) -> None:
        super().__init__()
        vars(self)["_norm"], vars(self)["_last"] = norm, last

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if vars(self)["_last"].call is not None:
            return hidden_states
        return vars(self)["_norm"](hidden_states, *args, **kwargs)


class _Looked(nn.Module):
    """Takes the place of an embedding whose rows are known."""

    def __init__(self, embedding: nn.Module, rows: Tensor) -> None:
        super().__init__()
        vars(self)["_embedding"] = embedding
        vars(self)["_rows"] = rows

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_embedding"], name)

    def forward(self, input_ids: Tensor) -> Any:
        return vars(self)["_rows"]


@contextmanager
def _recorders(architecture: Architecture, entering: Entering, answers: int) -> Iterator[list[_Recorder]]:
    """Replace the layers by recorders, what is behind them by identities, and embeddings by what they return."""
    shape, count = entering.embedded.shape, architecture.num_streams
    if architecture.join_place is not None:
        shape = torch.Size((count, *shape))
    recorders = [_Recorder(layer, shape, answers) for layer in architecture.layers]
    with ExitStack() as stack:
        stack.enter_context(architecture.layers_place.holding(nn.ModuleList(recorders)))
        if architecture.norm_place is not None:
            norm = _NormBehind(architecture.norm, recorders[-1])
            stack.enter_context(architecture.norm_place.holding(norm))
        if architecture.join_place is not None:
            passing = nn.ModuleList(nn.Identity() for _ in range(count - 1))
            stack.enter_context(architecture.join_place.holding(passing))
        stack.enter_context(architecture.embed_place.holding(_Looked(architecture.embed, entering.embedded)))
        for name, rows in entering.lookups.items():
            instead = _Looked(architecture.lookups[name], rows)
            stack.enter_context(architecture.lookup_places[name].holding(instead))
        yield recorders


def capture_calls(architecture: Architecture, entering: Entering, batch: MicroBatch) -> tuple[Tensor, list[LayerCall]]:
    """Record the arguments of each layer for one micro-batch.

    Args:
        architecture: The model.
        entering: What enters the base model, on the device of the micro-batch.
        batch: The micro-batch.

    Returns:
        The first layer's input, (B, T, d), part of the autograd graph of what enters; and one call per layer. If
        there are P hidden states of a token, here and in all layers d is P times as wide.
    """
    if batch.lengths is None:
        return _record(architecture, entering, attention_mask=batch.attention_mask)
    hidden, calls = _record_positions(architecture, entering, batch.lengths)
    longest = max(length for row in batch.lengths for length in row)
    _, of_longest = _record(architecture, entering.detached(slice(1), slice(longest)))
    within = own_attention(architecture)
    alone = _record_alone(architecture, entering, batch.lengths) if any(architecture.runs_alone) else {}
    return hidden, [
        replace(call, lengths=batch.lengths, alone={length: calls[index] for length, calls in alone.items()})
        if architecture.runs_alone[index]
        else _with(call, attention_mask=Segments(batch.lengths, example.kwargs.get("attention_mask"), within))
        for index, (call, example) in enumerate(zip(calls, of_longest, strict=True))
    ]


def _record_alone(architecture: Architecture, entering: Entering, lengths: Lengths) -> dict[int, list[LayerCall]]:
    """Record the calls for one example of each length, as if it were alone."""
    found: dict[int, list[LayerCall]] = {}
    for row, of_row in enumerate(lengths):
        start = 0
        for length in of_row:
            if length not in found:
                example = entering.detached(slice(row, row + 1), slice(start, start + length))
                found[length] = _record(architecture, example)[1]
            start += length
    return found


def _record(architecture: Architecture, entering: Entering, **inputs: Tensor | None) -> tuple[Tensor, list[LayerCall]]:
    known = _ANSWERS.get(architecture.model)
    first_error: Exception | None = None
    for answers in _MOST_ANSWERS if known is None else (known,):
        try:
            found = _record_answering(architecture, entering, answers, inputs)
        except (ValueError, TypeError, IndexError, RuntimeError, AttributeError) as error:
            if known is not None or lacks_memory(error):
                raise
            first_error = first_error or error
            continue
        _ANSWERS[architecture.model] = answers
        return found
    assert first_error is not None
    raise first_error  # what the model says if it gets what most models expect of a layer


def _record_answering(
    architecture: Architecture, entering: Entering, answers: int, inputs: Mapping[str, Tensor | None]
) -> tuple[Tensor, list[LayerCall]]:
    prefix = architecture.base_name and f"{architecture.base_name}."
    weights = {name.removeprefix(prefix): weight for name, weight in entering.weights.items()}
    with _recorders(architecture, entering, answers) as recorders:
        functional_call(architecture.base, weights, (), {"input_ids": entering.input_ids, "use_cache": False, **inputs})
    calls = [recorder.call for recorder in recorders if recorder.call is not None]
    hidden = recorders[0].hidden
    if hidden is None or len(calls) != len(recorders):
        raise ModelError("Not every layer of this model runs once for a text.", "Take another model.")
    if architecture.join_place is not None:
        hidden = side_by_side(hidden)
    return hidden, _sharing(calls)


def _sharing(calls: Sequence[LayerCall]) -> list[LayerCall]:
    """Put leaves in the place of arguments that have a graph, and `SharedStates` in that of mappings."""
    inputs: dict[int, SharedInput] = {}
    states: dict[int, SharedStates] = {}
    kept: list[Any] = []  # ids are of living objects
    found: list[LayerCall] = []
    for call in calls:
        own_inputs: dict[int, SharedInput] = {}
        own_states: dict[int, SharedStates] = {}

        def instead(value: Any, own_inputs: Any = own_inputs, own_states: Any = own_states) -> Any:
            if isinstance(value, Tensor) and value.requires_grad:
                kept.append(value)
                own_inputs[id(value)] = inputs.setdefault(id(value), SharedInput.of(value))
                return own_inputs[id(value)].leaf
            if _is_shared_mapping(value):
                kept.append(value)
                own_states[id(value)] = states.setdefault(id(value), SharedStates())
                return own_states[id(value)]
            return value

        args, kwargs = tree_map(instead, (call.args, call.kwargs), is_leaf=_is_shared_mapping)
        found.append(
            replace(call, args=args, kwargs=kwargs, inputs=(*own_inputs.values(),), states=(*own_states.values(),))
        )
    return found


def _is_shared_mapping(value: Any) -> bool:
    return isinstance(value, MutableMapping) and (not isinstance(value, dict) or not value)


def _record_positions(
    architecture: Architecture, entering: Entering, lengths: Lengths
) -> tuple[Tensor, list[LayerCall]]:
    """Record the calls with position ids that restart at each example, without masks.

    Phi-3's longrope changes the rotation of all positions of a micro-batch once one position passes a threshold. Here
    the length of each example decides, as if the example were alone.
    """
    embedded = entering.embedded
    positions = _by_token(lengths, embedded, range)
    with attending_within(architecture):
        hidden, calls = _record(architecture, entering, position_ids=positions)
        most = architecture.most_short_positions
        if most is None or len({length > most for row in lengths for length in row}) == 1:
            return hidden, calls
        is_long = _by_token(lengths, embedded, lambda length: [int(length > most)] * length).bool()
        _, others = _record(architecture, entering.detached(), position_ids=positions.masked_fill(is_long, 0))
    long, short = (each[0].kwargs["position_embeddings"] for each in (calls, others))
    merged = tuple(torch.where(is_long[..., None], far, near) for far, near in zip(long, short, strict=True))
    return hidden, [_with(call, position_embeddings=merged) for call in calls]


def _by_token(lengths: Lengths, embedded: Tensor, of_example: Callable[[int], Sequence[int]]) -> Tensor:
    """Return a number for each token, (B, T), computed from the length of its example; 0 for padding."""
    rows = [[value for length in row for value in of_example(length)] for row in lengths]
    width = embedded.shape[1]
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=embedded.device)


def _with(call: LayerCall, **kwargs: Any) -> LayerCall:
    return replace(call, kwargs={**call.kwargs, **kwargs})
