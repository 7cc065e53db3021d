"""The language model inside a model that also sees or hears.

Its configuration has one for the text. The language model alone is trained, and everything else stays in the folder.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from sophia_galore.errors import ModelError, short
from sophia_galore.model.headed import give_causal_class


def language_config(config: Any) -> Any:
    """Return the configuration of the language model inside a model; its own if it is nothing else.

    Args:
        config: A Hugging Face configuration.
    """
    if getattr(config, "is_encoder_decoder", False):
        return config
    try:
        text = config.get_text_config(decoder=True)
    except ValueError:  # there are several
        return config
    if text is config or not _answers(config):
        return config
    text = copy.deepcopy(text)
    if (tied := getattr(config, "tie_word_embeddings", None)) is not None:
        text.tie_word_embeddings = tied
    give_causal_class(text)
    return text


def _answers(config: Any) -> bool:
    """Return whether a model answers in words, as CLIP, which also has a text part, does not."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def make_reader(config: Any, architecture_names: list[str] | None, skeleton: nn.Module) -> Any:
    """Return the model that transformers makes of a folder, on the meta device.

    Args:
        config: The folder's Hugging Face configuration.
        architecture_names: The classes that it names.
        skeleton: The model that is trained.

    Raises:
        ModelError: transformers does not have the class that the folder names.
    """
    import transformers
    from accelerate import init_empty_weights

    if language_config(config) is config:
        kind: Any = type(skeleton)
    else:
        kind = next((found for name in architecture_names or () if (found := getattr(transformers, name, None))), None)
        if kind is None:
            raise ModelError(
                f"config.json names no class of transformers for this {config.model_type} model "
                f"({', '.join(architecture_names or ()) or 'architectures is missing'}).",
                "Take the model's original config.json.",
            )
    try:
        with init_empty_weights(include_buffers=True):
            model = kind(copy.deepcopy(config))
    except ImportError as error:
        raise ModelError(
            f"transformers needs another package to read this {config.model_type} model: {short(error)}",
            "Install the package.",
        ) from error
    model.tie_weights()
    return model


def language_names(reader: Any, base_name: str, base: nn.Module, head_names: Mapping[str, str]) -> dict[str, str]:
    """Return the names of the language model's tensors, by their names in the whole model.

    Args:
        reader: The whole model.
        base_name: Name of the language model below the head in the model that is trained, without the final dot.
        base: That module.
        head_names: Name of the head in the model that is trained, by its name in the whole model.

    Raises:
        ModelError: The whole model has no such part.
    """
    inside = next((name for name, module in reader.named_modules() if name and type(module) is type(base)), None)
    if inside is None:
        raise ModelError(
            f"{type(reader).__name__} has no {type(base).__name__} inside.", "Give a decoder-only language model."
        )
    names = {name: name for name in reader.state_dict() if name.startswith(f"{inside}.")}
    own = {name: f"{base_name}.{name.removeprefix(f'{inside}.')}" for name in names}
    for name in reader.state_dict():
        for there, here in head_names.items():
            if name.startswith(f"{there}."):
                own[name] = f"{here}.{name.removeprefix(f'{there}.')}"
    return own
