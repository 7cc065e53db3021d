"""Writing a model as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sophia_galore.errors import ModelError, short
from sophia_galore.model.skeleton import load_model_config, load_tokenizer
from sophia_galore.model.store import WeightStore, convert, is_finite, read_weights, save_weights
from sophia_galore.numerics.int8 import Int8Format, Stored, materialise

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def read_generation_config(folder: Path) -> Any:
    """A model folder's generation settings; None if it has none.

    Raises:
        ModelError: They can't be read.
    """
    from transformers import GenerationConfig

    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{folder / 'generation_config.json'} can't be read: {short(error)}.",
            "Download the model again, or remove that file: it only says how answers are generated.",
        ) from error


def write_model(
    folder: Path, *, store: WeightStore, dtype: torch.dtype | None, config: Any, generation_config: Any, tokenizer: Any
) -> None:
    """Write the weights, `config.json`, `generation_config.json` and the tokenizer.

    Args:
        folder: An existing folder.
        store: The weights.
        dtype: Precision of the file, an ordinary one then; None: exactly as stored, in eight bits too.
        config: The model's Hugging Face configuration.
        generation_config: Its generation settings, or None.
        tokenizer: Its tokenizer.

    Raises:
        ModelError: A weight is not finite in that precision.
    """
    # One after the other onto the CPU: a second copy of the model would not fit beside the first on a small card.
    weights = {name: _exported(name, weight, dtype) for name, weight in store.items()}
    save_weights(folder, weights)
    saved = type(config).from_dict(config.to_dict())
    saved.use_cache = True
    saved.dtype = _DTYPE_NAMES[next(weight.dtype for weight in weights.values() if isinstance(weight, Tensor))]
    saved.save_pretrained(folder)
    if generation_config is not None:
        generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _exported(name: str, weight: Stored, dtype: torch.dtype | None) -> Stored:
    if dtype is None:
        return weight.to("cpu") if isinstance(weight, Tensor) else weight
    exported = materialise(weight, dtype).to("cpu")
    if not is_finite(name, exported):
        raise ModelError(f"{name} holds values that are not finite in {dtype}.", "Take bf16 or fp32 for the file.")
    return exported


def convert_model(source: Path, folder: Path, target: torch.dtype | Int8Format) -> None:
    """Write a model folder's weights in another format, with everything else that makes it a model.

    Args:
        source: A model folder, a run's folder or a checkpoint.
        folder: An existing, empty folder.
        target: What weights become; matrices only, if it is eight bits: other weights stay as they are.

    Raises:
        ModelError: The source is not a whole model of a supported architecture, or not finite in that format.
    """
    cpu = torch.device("cpu")
    weights: dict[str, Stored] = {}
    for _, name, weight in read_weights(source):
        stays = isinstance(target, Int8Format) and len(weight.shape) != 2
        weights[name] = weight if stays else convert(weight, target, cpu)
        if not is_finite(name, weights[name]):
            raise ModelError(
                f"{name} of {source} holds values that are not finite in the format asked for.",
                "Take bf16 or fp32; if it is that already, the model's weights are broken.",
            )
    write_model(
        folder,
        store=WeightStore(weights),
        dtype=None,
        config=load_model_config(source),
        generation_config=read_generation_config(source),
        tokenizer=load_tokenizer(source),
    )
