"""Convert a GGUF file to an ordinary model folder.

GGUF files are quantised; transformers dequantises them. The result is saved as float32, which represents every
dequantised value exactly.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sophia_galore.errors import EnvironmentProblem, ModelError, short
from sophia_galore.model.cache import disk_problems

_MAGIC = b"GGUF"


def convert(gguf_file: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as config.json, safetensors and tokenizer files.

    Args:
        gguf_file: The file.
        target: An existing folder.

    Raises:
        ModelError: Not a GGUF file, or one of a kind that transformers can't read.
        EnvironmentProblem: The package `gguf` is missing, or the disk is full.
    """
    _require_readable(gguf_file)
    with disk_problems(target), _quiet_transformers():
        _load_and_save(gguf_file, target)


def read_config(gguf_file: Path) -> Any:
    """Read the model's configuration from the metadata of a GGUF file; no weight is converted.

    Args:
        gguf_file: The file.

    Returns:
        The Hugging Face configuration.

    Raises:
        ModelError: Not a GGUF file, or one of a kind that transformers can't read.
        EnvironmentProblem: The package `gguf` is missing.
    """
    from transformers import AutoConfig

    _require_readable(gguf_file)
    try:
        with _quiet_transformers():
            return AutoConfig.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    except Exception as error:
        raise ModelError(
            f"The metadata of {gguf_file} can't be read: {short(error)}.",
            f"Convert it first: sophia-galore download {gguf_file}.",
        ) from error


def _require_readable(gguf_file: Path) -> None:
    with gguf_file.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise ModelError(f"{gguf_file} is not a GGUF file.", "Download the file again, or give another model.")
    if importlib.util.find_spec("gguf") is None:
        raise EnvironmentProblem(f"Reading {gguf_file.name} needs the package gguf.", "Install it: pip install gguf.")


def _load_and_save(gguf_file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(gguf_file.parent), gguf_file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        # Without dequantize=True the model keeps packed weights that can neither be trained nor saved.
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    except OSError:
        raise
    except Exception as error:
        raise ModelError(
            f"{gguf_file} can't be converted: {short(error)}.",
            "transformers reads GGUF files of common architectures only; give a safetensors model instead.",
        ) from error
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide progress bars and warnings of transformers that do not help the user."""
    from transformers.utils import logging

    had_bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        # The dequantisation ignores that switch and writes its progress bar directly to stderr.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
