"""A model folder or a checkpoint in another format of the weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

import torch

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.model.export import convert_model
from sophia_galore.model.store import DTYPES
from sophia_galore.numerics.int8 import Int8Format

Target = Literal["int8", "bf16", "fp32", "fp16"]


def convert_folder(source: Path, output: Path, to: Target, *, block_size: int) -> str:
    """Write the model of a folder in another format.

    Args:
        source: A whole model folder, a run's folder or a checkpoint.
        output: Where to; appears whole or not at all.
        to: The format.
        block_size: Weights of a row that share a scale in int8; 0: the whole row.

    Returns:
        What was written, in a sentence.

    Raises:
        EnvironmentProblem: The output exists already, or can't be written.
        ModelError: The source is no whole model.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise EnvironmentProblem(f"{output} exists already.", "Name a folder that does not.")
    target: torch.dtype | Int8Format = Int8Format(block_size) if to == "int8" else DTYPES[to]
    beside = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        convert_model(source, beside, target)
        if output.exists():
            output.rmdir()
        beside.rename(output)
    except OSError as error:
        raise EnvironmentProblem(
            f"{output} could not be written: {error.strerror or error}.", "Free some space, or name another folder."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return f"{source} in {to}: {output}"
