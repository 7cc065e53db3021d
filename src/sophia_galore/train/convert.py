"""Convert the weights of a model folder or a checkpoint to another format.

The optimizer's state does not depend on how weights are stored, so a converted checkpoint is a checkpoint again. A run
resumes from it if its configuration asks for the new format.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

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
# State of updates that are not in the int8 codes yet; a conversion adds them to the weights.
_REMAINDER = ("remainder", "shrink")


def convert_folder(source: Path, output: Path, to: Target, *, block_size: int) -> str:
    """Write a model or a checkpoint with its weights in another format.

    Args:
        source: A whole model folder, a run's folder or a checkpoint.
        output: The folder to write; it is complete or not there.
        to: The new format.
        block_size: Number of weights of a row that share a scale in int8; 0: the whole row.

    Returns:
        A message about what was written.

    Raises:
        EnvironmentProblem: The output exists already, or can't be written.
        ModelError: The source is no whole model.
        CheckpointError: The source is a damaged checkpoint.
    """
    output = output.absolute()
    refuse_output(output)
    checkpoint = find_checkpoint(source.parent, source) if is_checkpoint(source) else None
    resumable = (
        checkpoint is not None and to in _STORES and all(route.get("format") != "bnb8" for route in _routes(checkpoint))
    )
    form = Int8Format(block_size)
    origin = checkpoint.folder if checkpoint is not None and resumable else source

    def write_model(folder: Path) -> None:
        converted = convert_model(origin, folder, form if to == "int8" else DTYPES[to])
        write_card(folder, folder_card(output.name, origin, converted.origin, f"The weights are in {to}."))

    def write(beside: Path) -> Path:
        if checkpoint is not None and resumable:
            return _convert_checkpoint(checkpoint, beside, to, form, write_model)
        write_model(beside)
        return beside

    write_atomically(output, write, needed_bytes=_needed_bytes(source, to))
    if not resumable or checkpoint is None:
        return f"{output}: the model of {source} in {to}."
    settings = _settings(to, form, str(checkpoint.config["model.store"]))
    words = shlex.join([f"--resume={output}", *(f"{key}={value}".lower() for key, value in settings.items())])
    return (
        f"{output}: {source} in {to}, a model folder and a checkpoint.\n"
        f"Go on from it with the run's configuration and: {words}"
    )


def _needed_bytes(source: Path, to: Target) -> int:
    """Return about how many bytes the converted folder takes; 0: unknown."""
    weights = set(weight_files(source))
    try:
        numbers = sum(math.prod(header.shape) for header in read_folder_headers(source).values())
        others = sum(path.stat().st_size for path in source.iterdir() if path.is_file() and path not in weights)
    except (OSError, ValueError, UserError):
        return 0
    return numbers * (1 if to == "int8" else DTYPES[to].itemsize) + others


def _convert_checkpoint(
    checkpoint: Checkpoint, folder: Path, to: Target, form: Int8Format, write_model: Callable[[Path], None]
) -> Path:
    """Write the converted checkpoint into a folder and return its path."""
    state = checkpoint.optimizer_state().only(lambda name: name.rpartition("/")[2] not in _REMAINDER)
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
    """Return the plan that the run would have had with this format."""
    routes: list[dict[str, Any]] = []
    for route in _routes(checkpoint):
        shape = tuple(route["shape"])
        held = to if to != "int8" or len(shape) == 2 else str(checkpoint.config["model.store"])
        size = form.num_bytes((shape[0], shape[1])) if held == "int8" else math.prod(shape) * DTYPES[held].itemsize
        subspace = route["subspace"] and route["subspace"] | {"folds_late": False}
        late = bool(route["subspace"] and route["subspace"].get("folds_late"))
        # The updates kept for later: their sum in bfloat16 (2 bytes each) and its float32 factor (4 bytes).
        kept = route["state_bytes"] - (2 * max(shape) * route["rank"] + 4 if late else 0)
        routes.append(route | {"format": held, "weight_bytes": size, "subspace": subspace, "state_bytes": kept})
    sizes = {"weights": "weight_bytes", "optimizer state": "state_bytes", "projections": "projection_bytes"}
    totals = {category: sum(route[key] for route in routes) for category, key in sizes.items()}
    return checkpoint.plan | {"routes": routes, "bytes": totals}


def _settings(to: Target, form: Int8Format, store: str) -> dict[str, Any]:
    """Return the configuration keys that ask for a format."""
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


def _routes(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    routes = checkpoint.plan.get("routes")
    if not isinstance(routes, list) or not all("trained" in route for route in routes):
        raise CheckpointError(
            f"{checkpoint.folder} was made by an earlier version.", "Copy its model files into a folder of their own."
        )
    return routes
