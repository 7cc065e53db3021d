"""Where weights and optimizer states are between uses: which layers stream, and from where.

A unit is a layer, the embedding's weight or the head's. What belongs to none (the last norm) stays on the device. An
embedding that is not tied streams first, since few of its rows are needed; then the first layers; then the head. So
the last layers stay, which forward and backward meet one right after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from sophia_galore.config.size import bytes_in_words
from sophia_galore.engine.cross_entropy import block_entries
from sophia_galore.engine.logits import comes_whole
from sophia_galore.engine.observe import Category
from sophia_galore.numerics.row_blocks import row_blocks
from sophia_galore.optim.spec import state_bytes
from sophia_galore.optim.state import COUNTER
from sophia_galore.plan.decisions import Decisions, logits_chunk_bytes, standing_bytes
from sophia_galore.plan.facts import Param
from sophia_galore.plan.route import Route, by_layer
from sophia_galore.plan.routes import empty_weight, int8_format
from sophia_galore.streaming.open import buffers_bytes
from sophia_galore.streaming.units import Part, Placement, Unit
from sophia_galore.weights.files import file_metadata
from sophia_galore.weights.int8 import Int8Format
from sophia_galore.weights.safetensors_layout import FileLayout, TensorKind

# State without which a weight with a deferred update can't be read.
_UPDATE = ("remainder", "shrink", "basis")


@dataclass(frozen=True)
class Parts:
    """The parts of a model that can be placed.

    Args:
        layers: Names of the layers, as prefixes of their parameters' names without the final dot.
        embed: Name of the embedding's weight.
        head: Name of the head's weight; the embedding's if they are tied.
    """

    layers: tuple[str, ...]
    embed: str
    head: str

    @property
    def ends(self) -> tuple[str, ...]:
        """The weights that are no layers: one if they are tied, else two."""
        return tuple(dict.fromkeys((self.embed, self.head)))

    @property
    def order(self) -> tuple[str, ...]:
        """All units, in the order in which they begin to stream."""
        first = () if self.embed == self.head else (self.embed,)
        return (*first, *self.layers, self.head)


@dataclass(frozen=True)
class Streamed:
    """What streams in a run.

    Args:
        parts: The parts of the model.
        units: The units that stream; none: everything stays on the device.
        inside: For each unit of the model that may stream, the names of its parameters.
        most_rows: Rows of the largest block of a weight that comes by rows.
    """

    parts: Parts
    units: tuple[Unit, ...] = ()
    inside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    most_rows: int = 1

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of the parameters that stream."""
        return frozenset(name for unit in self.units for name in self.inside[unit.name])

    def bytes_in(self, placement: Placement) -> int:
        """Return the bytes of the units that live in host memory, or on disk."""
        return sum(unit.host_bytes for unit in self.units if unit.placement == placement)

    def only(self, placements: Mapping[str, Placement]) -> Streamed:
        """Return what is left if only some units stream, and where they live."""
        units = tuple(replace(unit, placement=placements[unit.name]) for unit in self.units if unit.name in placements)
        return replace(self, units=units)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers on the device."""
        return buffers_bytes(self.units, self.parts.ends, self.most_rows)

    @property
    def placements(self) -> dict[str, Placement]:
        """Where each unit lives that streams, by its name."""
        return {unit.name: unit.placement for unit in self.units}

    def sentence(self) -> str:
        """Return what streams, as text without a full stop; empty: nothing does."""
        if not self.units:
            return ""
        number = len(self.parts.layers) - self.num_resident_layers
        placed = self.placements
        ends = ["the embedding"] * (self.parts.embed in placed) + ["the head"] * (
            self.parts.head in placed and self.parts.head != self.parts.embed
        )
        what = " and ".join([f"{number} of {len(self.parts.layers)} layers"] * (number > 0) + ends)
        places = {"host memory": self.bytes_in("host"), "files": self.bytes_in("disk")}
        where = " and ".join(f"{name} ({bytes_in_words(size)})" for name, size in places.items() if size)
        buffers = bytes_in_words(self.buffer_bytes)
        return f"With their optimizer states, {what} live in {where} and visit {buffers} of buffers on the device"

    @property
    def num_resident_layers(self) -> int:
        """Number of layers that stay on the device."""
        return len(self.parts.layers) - sum(unit.name in self.parts.layers for unit in self.units)


def parts_of(params: Iterable[Param], layers: Sequence[str]) -> Parts:
    """Return the parts of a model.

    Args:
        params: Its parameters.
        layers: Its layers, as prefixes of their parameters' names without the final dot.
    """
    params = tuple(params)
    embed = next(param.name for param in params if param.part == "embed")
    head = next(param.name for param in params if param.is_head)
    return Parts(tuple(layers), embed, head)


def lay_out(decided: Decisions, parts: Parts, placements: Mapping[str, Placement]) -> Streamed:
    """Lay out the units that stream in a run.

    Args:
        decided: The decisions about its step.
        parts: The parts of the model.
        placements: By unit, where it lives; units that are left out stay on the device.
    """
    config = decided.facts.config
    return units_of(
        parts,
        decided.routes,
        placements,
        form=int8_format(config.quantization),
        compute_dtype=decided.compute_dtype,
        chunk_bytes=logits_chunk_bytes(decided.facts),
    )


def choose(
    decided: Decisions,
    parts: Parts,
    *,
    fits: Callable[[Streamed], bool] | None,
    host_bytes: int | None,
    num_kept: int = 0,
) -> Streamed:
    """Choose what streams, as little as possible.

    Args:
        decided: The decisions about the step.
        parts: The parts of the model.
        fits: Whether a choice fits on the device; None: there is no limit.
        host_bytes: What units may take of the host's memory; None: as much as they need.
        num_kept: Number of last layers that must stay, because their graphs are kept.

    Returns:
        The choice; if none fits, that with the least memory on the device.
    """
    memory = decided.facts.config.memory
    nothing = Streamed(parts)
    if memory.placement == "device" or (memory.placement == "auto" and (fits is None or fits(nothing))):
        return nothing
    # Each layer takes as much as the others of its kind, so the layout of all units serves for any number of them.
    everything = lay_out(decided, parts, dict.fromkeys(parts.order, "host"))
    size = {unit.name: unit.host_bytes for unit in everything.units}

    def streaming(names: Sequence[str]) -> Streamed:
        placements: dict[str, Placement] = {}
        left = host_bytes if memory.placement == "auto" else None
        for name in names:
            on_disk = memory.placement == "disk" or (left is not None and size[name] > left)
            placements[name] = "disk" if on_disk else "host"
            left = left if on_disk or left is None else left - size[name]
        return everything.only(placements)

    stay = memory.resident_layers
    if stay != "auto" or fits is None:
        num_last = max(num_kept, 0 if stay == "auto" else stay)
        last = parts.layers[max(0, len(parts.layers) - num_last) :]
        return streaming([name for name in parts.order if name not in last])
    kept = parts.layers[len(parts.layers) - num_kept :]
    order = [name for name in parts.order if name not in kept]
    for count in range(1, len(order)):
        if fits(found := streaming(order[:count])):
            return found
    return streaming(order)


def units_of(
    parts: Parts,
    routes: Sequence[Route],
    placements: Mapping[str, Placement],
    *,
    form: Int8Format,
    compute_dtype: torch.dtype,
    chunk_bytes: int,
) -> Streamed:
    """Lay out the units that stream.

    Args:
        parts: The parts of the model.
        routes: One for each parameter.
        placements: By unit, where it lives; units that are left out stay on the device.
        form: The format of eight-bit weights.
        compute_dtype: Precision of the arithmetic.
        chunk_bytes: Size of the float32 logits that are computed at once, in bytes.
    """
    by_name = {route.name: route for route in routes}
    of_layer, _ = by_layer(routes, parts.layers)
    routes_of = {**of_layer, **{name: [by_name[name]] for name in parts.ends}}
    # A head in compute precision that is not too large is used as a whole, wherever it lives: with the same tiles of
    # logits, a run has the same bits.
    whole = comes_whole(empty_weight(by_name[parts.head], form), compute_dtype)
    units: list[Unit] = []
    inside: dict[str, tuple[str, ...]] = {}
    most_rows = 1
    for name in parts.order:
        placement = placements.get(name, "device")
        if placement == "device":
            continue
        by_rows = name in parts.ends and not (name == parts.head and whole)
        inside[name] = tuple(route.name for route in routes_of[name])
        units.append(_unit(name, placement, routes_of[name], form, by_rows=by_rows))
        if by_rows:
            shape = by_name[name].shape
            slices = block_entries(shape[0], shape[1] * compute_dtype.itemsize, chunk_bytes)
            most_rows = max(most_rows, next(row_blocks(shape)).stop, slices)
    return Streamed(parts, tuple(units), inside, most_rows)


def device_bytes(routes: Sequence[Route], streamed: Streamed) -> dict[Category, int]:
    """Return the bytes that stay on the device for the whole run, by category.

    Args:
        routes: One for each parameter.
        streamed: What streams; its buffers count as weights.
    """
    found = standing_bytes(route for route in routes if route.name not in streamed.names)
    found["weights"] += streamed.buffer_bytes
    for route in routes:
        if route.name in streamed.names and route.spec and route.spec.subspace and route.spec.subspace.adaptive:
            counters = {key: kind for key, kind in route.spec.state_tensors().items() if kind[1] == COUNTER}
            found["optimizer state"] += state_bytes(counters)
    return found


def _unit(name: str, placement: Placement, routes: Sequence[Route], form: Int8Format, *, by_rows: bool) -> Unit:
    weights: dict[str, TensorKind] = {}
    state: dict[str, TensorKind] = {}
    early: set[str] = set()
    for route in routes:
        for ending, tensor in empty_weight(route, form).tensors().items():
            weights[route.name + ending] = (tensor.dtype, tuple(tensor.shape))
        if route.spec is None:
            continue
        for key, (shape, dtype) in route.spec.state_tensors().items():
            if dtype == COUNTER:
                continue  # only the processor reads it
            state[f"{route.name}/{key}"] = (dtype, shape)
            if route.spec.subspace is not None and route.spec.subspace.folds_late and key.startswith(_UPDATE):
                early.add(f"{route.name}/{key}")
    has_blocks = any(route.format == "int8" for route in routes)
    layouts: dict[Part, FileLayout] = {
        "weights": FileLayout.of(weights, file_metadata(form.block if has_blocks else None)),
        "state": FileLayout.of(state),
    }
    return Unit(name, placement, layouts, frozenset(early), by_rows)
