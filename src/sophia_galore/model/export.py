"""Write a model as an ordinary Hugging Face folder, which other programs and versions of transformers can open."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sophia_galore.errors import ModelError, short
from sophia_galore.model import compatible_json
from sophia_galore.model.skeleton import load_model_config
from sophia_galore.model.source_files import (
    CONFIG,
    GENERATION,
    TEMPLATE,
    TOKENIZER,
    WHOLE_TOKENIZER,
    SourceFiles,
    read_source_files,
)
from sophia_galore.weights.files import convert, read_weights, save_weights
from sophia_galore.weights.folder import HEAD, INVERSE_FREQUENCIES
from sophia_galore.weights.int8 import Int8Format
from sophia_galore.weights.plain import PlainWeight
from sophia_galore.weights.store import WeightStore
from sophia_galore.weights.weight import Weight

_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def read_generation_config(folder: Path) -> Any:
    """Return a model folder's generation settings; None if it has none.

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
            "Mend or remove that file: it only says how answers are generated.",
        ) from error


def write_model(
    folder: Path,
    *,
    store: WeightStore,
    dtype: torch.dtype | None,
    source: SourceFiles,
    chat_template: str | None = None,
    eos_token_ids: Sequence[int] | None = None,
) -> None:
    """Write the weights and the other files of the source model, changed only where training changed something.

    Args:
        folder: An existing folder.
        store: The weights.
        dtype: Precision of the weights in the file; None: exactly as stored, also in eight bits.
        source: Files of the model that was trained.
        chat_template: Text of a new chat template; None: the source's.
        eos_token_ids: Ids of new tokens that end an answer; None: the source's.

    Raises:
        ModelError: A weight is not finite in that precision, or the source's settings can't be read.
    """
    # Moved to the CPU one by one: a second copy of the model would not fit on a small card.
    weights = {name: _exported(name, weight, dtype) for name, weight in store.items()}
    save_weights(folder, weights)
    dtype_name = _DTYPE_NAMES[next(weight.dtype for weight in weights.values() if not weight.is_packed)]
    files = {
        **source.files,
        **_settings(source, dtype_name, untied=HEAD in weights, chat_template=chat_template, stops=eos_token_ids),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _settings(
    source: SourceFiles, dtype: str, *, untied: bool, chat_template: str | None, stops: Sequence[int] | None
) -> dict[str, bytes]:
    """Return the settings files that differ from the source's."""
    config = source.json(CONFIG)
    if config is None:
        raise ModelError("The model has no config.json.", "Give a folder of a Hugging Face causal language model.")
    keeps_code = source.has_code
    written = {CONFIG: compatible_json.model_config(config, dtype=dtype, untied=untied, keeps_code=keeps_code)}
    tokenizer = source.json(TOKENIZER)
    if tokenizer is not None or chat_template is not None:
        whole = WHOLE_TOKENIZER in source.files
        written[TOKENIZER] = compatible_json.tokenizer_config(
            tokenizer or {}, chat_template=chat_template, whole=whole, keeps_code=keeps_code
        )
    if stops is not None:
        written[GENERATION] = compatible_json.generation_config(source.json(GENERATION), config, stops)
    changed = {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in written.items()
        if content != source.json(name)
    }
    if chat_template is not None:
        # Newer programs read this file, older ones the key in tokenizer_config.json.
        changed[TEMPLATE] = chat_template.encode()
    return changed


def _exported(name: str, weight: Weight, dtype: torch.dtype | None) -> Weight:
    if dtype is None:
        return weight if weight.is_packed or weight.device.type == "cpu" else weight.copied_to(torch.device("cpu"))
    exported = PlainWeight(weight.values(dtype).to("cpu"))
    if not exported.is_finite():
        raise ModelError(f"{name} holds values that are not finite in {dtype}.", "Take bf16 or fp32 for the file.")
    return exported


def convert_model(source: Path, folder: Path, target: torch.dtype | Int8Format | None) -> SourceFiles:
    """Write a model folder with its weights in another format.

    Args:
        source: A model folder, a run's folder or a checkpoint.
        folder: An existing, empty folder.
        target: The new format. Eight bits apply to matrices only. None: the format stays, but eight bits become
            float32.

    Returns:
        The source's files other than weights.

    Raises:
        ModelError: The source is not a whole model of a supported architecture, or not finite in that format.
    """
    cpu = torch.device("cpu")
    # This also checks the architecture, and whether the head is really tied.
    tied = bool(load_model_config(source).tie_word_embeddings)
    weights: dict[str, Weight] = {}
    for _, name, weight in read_weights(source):
        if (tied and name == HEAD) or name.endswith(INVERSE_FREQUENCIES):
            continue
        stays = isinstance(target, Int8Format) and len(weight.shape) != 2
        weights[name] = weight if stays else convert(weight, target or weight.dtype, cpu)
        if not weights[name].is_finite():
            raise ModelError(
                f"{name} of {source} holds values that are not finite in the format asked for.",
                "Take bf16 or fp32; if it is that already, the model's weights are broken.",
            )
    files = read_source_files(source)
    write_model(folder, store=WeightStore(weights), dtype=None, source=files)
    return files
