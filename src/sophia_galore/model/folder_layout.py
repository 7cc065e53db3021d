"""What the tensors of a model's folder are in its skeleton, and how they are to be written again.

A checkpoint has the names and shapes of the skeleton. If those of the model that it began with were others, it has a
list of them beside it, so that what is made of it at the end is as if it had never been stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sophia_galore.errors import ModelError, short
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.conversions import Names, plan_layout
from sophia_galore.model.source_files import CONFIG, SOURCE_TENSORS
from sophia_galore.model.whole_model import language_config, language_names, make_reader
from sophia_galore.weights.folder import INVERSE_FREQUENCIES
from sophia_galore.weights.layout import Layout, Renamed, Shape, Shapes
from sophia_galore.weights.manifest import repair_hint
from sophia_galore.weights.saved import FolderWeights, saved_kinds, saved_weights


@dataclass(frozen=True)
class FolderLayout:
    """The tensors of a model's folder.

    Args:
        reading: What they are in the model.
        writing: The same for the folder that the model came from first, as which it is exported.
        tensors: Shapes of the tensors in that folder, by name; empty if they are those of the model.
    """

    reading: Layout
    writing: Layout
    tensors: Shapes

    @property
    def is_own(self) -> bool:
        """Whether the folder that the model came from has the model's weights under its names and nothing else."""
        return self.writing.is_own

    def record(self) -> bytes | None:
        """Return the content of the list that a folder with the model's names needs; None: it needs none."""
        if self.is_own:
            return None
        return (json.dumps({name: list(shape) for name, shape in sorted(self.tensors.items())}) + "\n").encode()

    def carried(self, folder: Path) -> FolderWeights | None:
        """Return what is written as it is, from a folder that has it; None: there is nothing."""
        return FolderWeights(folder, self.reading.carried) if self.reading.carried else None

    def remark(self) -> str:
        """Return what to tell the user, as a sentence; empty: nothing."""
        untrained = self.writing.untrained
        if not untrained:
            return ""
        return (
            f"{len(untrained)} tensors of the model's folder are not trained, such as {untrained[0]}: what is written "
            "has them as they are."
        )


def find_layout(folder: Path, architecture: Architecture) -> FolderLayout:
    """Find out what the tensors of a folder are; only headers are read.

    Args:
        folder: A model's folder or a checkpoint.
        architecture: The skeleton of the model that is trained.

    Raises:
        ModelError: A file is missing or damaged, or tensors that belong together do not fit together.
    """
    found: dict[str, Shape] = {name: tuple(weight.shape) for name, weight in saved_kinds(folder).items()}
    recorded = _recorded(folder)
    if recorded is None:
        layout = _own_layout(found, architecture) or _converted_layout(found, folder, architecture)
        return FolderLayout(layout, layout, {} if layout.is_own else found)
    writing = _converted_layout(recorded, folder, architecture)
    reading = _own_layout(found, architecture, carried=writing)
    if reading is not None:
        return FolderLayout(reading, writing, recorded)
    layout = _converted_layout(found, folder, architecture)
    return FolderLayout(layout, layout, found)


def load_buffers(folder: Path, layout: FolderLayout, architecture: Architecture) -> None:
    """Read saved buffers of a folder into a skeleton.

    Args:
        folder: The folder.
        layout: What its tensors are.
        architecture: The skeleton, whose buffers are changed.

    Raises:
        ModelError: A buffer has another shape, or a file is damaged.
    """
    wanted = layout.reading.buffers
    if not wanted:
        return
    buffers = dict(architecture.model.named_buffers())
    for saved in saved_weights(folder, wanted):
        name = wanted[saved.name]
        if saved.kind.shape != buffers[name].shape:
            raise ModelError(
                f"{saved.path}: {saved.name} has shape {tuple(saved.kind.shape)}, config.json says "
                f"{tuple(buffers[name].shape)}.",
                "config.json and the weights must belong to the same model.",
            )
        with torch.no_grad():
            buffers[name].copy_(saved.opened().first)


def names_of(architecture: Architecture) -> Names:
    """Return the names of a skeleton's tensors."""
    model = architecture.model
    parameters = {name: tuple(shape) for name, shape in architecture.parameter_shapes().items()}
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return Names(
        parameters,
        {
            name: tuple(f"{name}.{number}" for number in range(len(weights)))
            for name, weights in architecture.expert_tensors.items()
        },
        frozenset(model.state_dict().keys() - every),
        frozenset(every - parameters.keys()),
    )


def _own_layout(found: Shapes, architecture: Architecture, carried: Layout | None = None) -> Layout | None:
    """Return the layout of a folder that has the skeleton's names; None: it has others."""
    names = names_of(architecture)
    if not names.parameters.keys() <= found.keys():
        return None
    others = [name for name in found if name not in names.parameters]
    ignored = frozenset(name for name in others if name in names.copies or name.endswith(INVERSE_FREQUENCIES))
    kept = [name for name in others if name not in ignored]
    buffers = dict(carried.buffers) if carried else {name: name for name in kept if name in names.buffers}
    if any(name not in (carried.carried if carried else buffers) for name in kept):
        return None
    return Layout(tuple(Renamed(name, name) for name in names.parameters), tuple(kept), buffers, ignored)


def _converted_layout(found: Shapes, folder: Path, architecture: Architecture) -> Layout:
    config = _read_config(folder)
    return layout_of(found, config, architecture)


def layout_of(found: Shapes, config: Mapping[str, Any], architecture: Architecture) -> Layout:
    """Return what tensors are in a skeleton, as transformers would read them.

    Args:
        found: Shapes of the tensors by name.
        config: The content of the `config.json` beside them.
        architecture: The skeleton.

    Raises:
        ModelError: Tensors that belong together do not fit together.
    """
    from transformers import CONFIG_MAPPING

    model: Any = architecture.model
    kind = config.get("model_type")
    whole = None
    if kind != model.config.model_type and kind in CONFIG_MAPPING:
        whole = CONFIG_MAPPING[kind].from_dict(dict(config))
    if whole is None or language_config(whole) is whole:
        return plan_layout(found, make_reader(model.config, None, model), names_of(architecture))
    reader = make_reader(whole, config.get("architectures"), model)
    modules = {id(module): name for name, module in model.named_modules()}
    heads = {id(module): name for name, module in reader.named_modules()}
    base = architecture.layers_place.owner
    own = language_names(
        reader,
        modules[id(base)],
        base,
        {heads[id(reader.get_output_embeddings())]: modules[id(architecture.head)]},
    )
    return plan_layout(found, reader, names_of(architecture), own)


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        read = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(read, dict):
            raise ValueError("it is no table of keys and values")
        return read
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG} can't be read: {short(error)}.", repair_hint(folder)) from error


def _recorded(folder: Path) -> dict[str, Shape] | None:
    path = folder / SOURCE_TENSORS
    if not path.is_file():
        return None
    try:
        return {str(name): tuple(map(int, shape)) for name, shape in json.loads(path.read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} can't be read: {short(error)}.", repair_hint(folder)) from error
