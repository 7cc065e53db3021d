"""A model folder or a checkpoint in another format of the weights.

Of a checkpoint everything else stays: the optimizer's state does not depend on how weights are stored. So the
result is a checkpoint again, and a run goes on from it if its configuration asks for that format.
"""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any, Literal

import torch

from sophia_galore.errors import CheckpointError, UserError
from sophia_galore.model.card import write_card
from sophia_galore.model.export import convert_model
from sophia_galore.model.headers import read_folder_headers
from sophia_galore.records import files
from sophia_galore.records.schema import read_object
from sophia_galore.train.atomic_folder import refuse_output, write_atomically
from sophia_galore.train.card import folder_card
from sophia_galore.train.checkpoint import Checkpoint, find_checkpoint, is_checkpoint, save_checkpoint
from sophia_galore.weights.folder import weight_files
from sophia_galore.weights.int8 import Int8Format
from sophia_galore.weights.plain import DTYPES

Target = Literal["int8", "bf16", "fp32", "fp16"]
# Formats in which a run can keep its weights; fp16 is one for the final model only.
_STORES = ("int8", "bf16", "fp32")
# State that belongs to updates which are not in the codes yet; a conversion puts them there.
_REMAINDER = ("remainder", "shrink")


def convert_folder(source: Path, output: Path, to: Target, *, block_size: int) -> str:
    """Write what a folder holds with its weights in another format.

    Args:
        source: A whole model folder, a run's folder or a checkpoint.
        output: Where to; appears whole or not at all.
        to: The format.
        block_size: Weights of a row that share a scale in int8; 0: the whole row.

    Returns:
        What was written, in a sentence or two.

    Raises:
        EnvironmentProblem: The output exists already, or can't be written.
        ModelError: The source is no whole model.
        CheckpointError: The source is a damaged checkpoint.
    """
    output = output.absolute()
    refuse_output(output)
    checkpoint = find_checkpoint(source.parent, source) if is_checkpoint(source) else None
    resumable = checkpoint is not None and to in _STORES and "bnb8" not in _formats(checkpoint)
    form = Int8Format(block_size)

    def write(beside: Path) -> Path:
        if checkpoint is not None and resumable:
            return _convert_checkpoint(checkpoint, beside, to, form, output.name)
        _convert_model(source, beside, form if to == "int8" else DTYPES[to], to, output.name)
        return beside

    write_atomically(output, write, needed_bytes=_needed_bytes(source, to))
    if not resumable or checkpoint is None:
        return f"{output}: the model of {source} in {to}."
    settings = _settings(to, form, str(checkpoint.config["model.store"]))
    words = shlex.join(f"{key}={value}".lower() for key, value in settings.items())
    return (
        f"{output}: {source} in {to}, a model folder and a checkpoint.\n"
        f"Go on from it with the run's configuration and: --resume={output} {words}"
    )


def _needed_bytes(source: Path, to: Target) -> int:
    """About what a folder's files will take, of which its weights become others; 0: that can't be told."""
    weights = set(weight_files(source))
    try:
        numbers = sum(math.prod(header.shape) for header in read_folder_headers(source).values())
        others = sum(path.stat().st_size for path in source.iterdir() if path.is_file() and path not in weights)
    except (OSError, ValueError, UserError):
        return 0
    return numbers * (1 if to == "int8" else DTYPES[to].itemsize) + others


def _convert_model(source: Path, folder: Path, target: torch.dtype | Int8Format, to: Target, title: str) -> None:
    files = convert_model(source, folder, target)
    write_card(folder, folder_card(title, source, files.origin, f"The weights are in {to}."))


def _convert_checkpoint(checkpoint: Checkpoint, folder: Path, to: Target, form: Int8Format, title: str) -> Path:
    """Write the checkpoint below a folder; returns where it is."""

    def write_model(beside: Path) -> None:
        _convert_model(checkpoint.folder, beside, form if to == "int8" else DTYPES[to], to, title)

    state = {
        name: tensor
        for name, tensor in checkpoint.optimizer_state().items()
        if name.rpartition("/")[2] not in _REMAINDER
    }
    return save_checkpoint(
        folder,
        checkpoint.step,
        optimizer_state=state,
        write_model=write_model,
        documents={
            files.PLAN: _converted_plan(checkpoint, to, form),
            files.FLAT_CONFIG: checkpoint.config | _settings(to, form, str(checkpoint.config["model.store"])),
            files.TRAINER_STATE: read_object(checkpoint.folder / files.TRAINER_STATE),
        },
        keep_last=1,
    )


def _converted_plan(checkpoint: Checkpoint, to: Target, form: Int8Format) -> dict[str, Any]:
    """The plan, as it would have been had the run been asked for this format."""
    routes: list[dict[str, Any]] = []
    for route in _routes(checkpoint):
        shape = tuple(route["shape"])
        held = to if to != "int8" or len(shape) == 2 else str(checkpoint.config["model.store"])
        size = form.num_bytes((shape[0], shape[1])) if held == "int8" else _plain_bytes(shape, held)
        subspace = route["subspace"] and route["subspace"] | {"folds_late": False}
        late = bool(route["subspace"] and route["subspace"].get("folds_late"))
        kept = route["state_bytes"] - (_remainder_bytes(route) if late else 0)
        routes.append(route | {"format": held, "weight_bytes": size, "subspace": subspace, "state_bytes": kept})
    sizes = {"weights": "weight_bytes", "optimizer state": "state_bytes", "projections": "projection_bytes"}
    totals = {category: sum(route[key] for route in routes) for category, key in sizes.items()}
    return checkpoint.plan | {"routes": routes, "bytes": totals}


def _settings(to: Target, form: Int8Format, store: str) -> dict[str, Any]:
    """The keys of a configuration that ask for a format."""
    if to != "int8":
        return {"model.store": to, "quantization.enabled": False, "quantization.load_in_8bit": False}
    return {
        "model.store": store,
        "quantization.enabled": True,
        "quantization.load_in_8bit": True,
        "quantization.backend": "native",
        "quantization.block_size": form.block,
        "quantization.skip": [],
        "quantization.rounding": "stochastic",
        "quantization.fold": "step",
    }


def _formats(checkpoint: Checkpoint) -> set[str]:
    """Formats that its weights are in."""
    return {route.get("format", "") for route in _routes(checkpoint)}


def _routes(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    routes = checkpoint.plan.get("routes")
    if not isinstance(routes, list) or not all("trained" in route for route in routes):
        raise CheckpointError(
            f"{checkpoint.folder} was made by an earlier version.", "Copy its model files into a folder of their own."
        )
    return routes


def _plain_bytes(shape: tuple[int, ...], held: str) -> int:
    return math.prod(shape) * DTYPES[held].itemsize


def _remainder_bytes(route: dict[str, Any]) -> int:
    """Of the sum of updates in bfloat16, and its float32 factor."""
    long, rank = max(map(int, route["shape"])), int(route["rank"])
    return 2 * long * rank + 4
