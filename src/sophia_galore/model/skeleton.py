"""Build a Hugging Face model without weights: parameters on the meta device, real buffers."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sophia_galore.errors import ModelError, short
from sophia_galore.model.architecture import Architecture
from sophia_galore.model.cache import Say
from sophia_galore.model.experts import run_one_by_one, separate_experts
from sophia_galore.model.find_parts import find_architecture
from sophia_galore.model.quantised import refuse_quantised
from sophia_galore.model.tied_head import head_differs
from sophia_galore.model.whole_model import language_config
from sophia_galore.weights.folder import HEAD


def load_model_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read the `config.json` of a causal language model.

    Args:
        folder: The model's folder.
        trust_remote_code: Whether to run Python code of the folder.

    Returns:
        The Hugging Face configuration.

    Raises:
        ModelError: It can't be read, or describes no causal language model.
    """
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    check_causal(config)
    return config


def read_model_config(folder: Path, *, trust_remote_code: bool = False, say: Say = lambda line: None) -> Any:
    """Read a model folder's `config.json`, of any architecture that transformers knows.

    It is corrected if the weights in the folder contradict it: if it declares a quantisation and they have full
    precision, or if it ties the head to an embedding from which the head differs.

    Args:
        folder: The model's folder.
        trust_remote_code: Whether to run Python code of the folder.
        say: Called with a line for the user about each correction.

    Returns:
        The Hugging Face configuration; of a model that does more than language, that of its language model.

    Raises:
        ModelError: It can't be read, or the weights are quantised.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    stale = refuse_quantised(folder)
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise _no_config(f"{folder / 'config.json'}", error) from error
    if stale is not None:
        say(
            f"{folder / 'config.json'} declares a quantisation ({stale}), but the weights beside it are in full "
            "precision: the declaration is ignored, and left out of what is written."
        )
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    text = language_config(config)
    if text is not config:
        say(f"{config.model_type} does more than language: its language model is trained, all else stays as it is.")
    config = text
    if getattr(config, "tie_word_embeddings", False) and any(folder.glob("*.safetensors")) and head_differs(folder):
        say(
            f"{folder / 'config.json'} ties the head to the embedding, but {HEAD} in the weights differs from it: the "
            "head is trained separately, and tie_word_embeddings is false in what is written."
        )
        config.tie_word_embeddings = False
    return config


def check_causal(config: Any) -> None:
    """Refuse a model that is no causal language model that transformers can build.

    Args:
        config: The model's Hugging Face configuration.

    Raises:
        ModelError: It is another kind of model.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in _remote_classes(config):
        raise ModelError(
            f"The architecture {config.model_type!r} is not one of transformers' causal language models.",
            "Give a decoder-only language model.",
        )


def _remote_classes(config: Any) -> Mapping[str, str]:
    return getattr(config, "auto_map", None) or {}


def make_model_config(values: Mapping[str, Any], origin: str) -> Any:
    """Make a configuration from the values of a config.json.

    Args:
        values: The keys and values.
        origin: Where they come from, for error messages.

    Returns:
        The Hugging Face configuration; it shares nothing with `values`. Of a model that does more than language, that
        of its language model.

    Raises:
        ModelError: They do not describe an architecture that transformers knows.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    try:
        return language_config(CONFIG_MAPPING[values["model_type"]].from_dict(copy.deepcopy(dict(values))))
    except KeyError as error:
        kind = values.get("model_type")
        reason = f"transformers does not know its model_type {kind!r}" if kind else "it has no model_type"
        raise _no_config(origin, ValueError(reason)) from error
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise _no_config(origin, error) from error


def _no_config(origin: str, error: Exception) -> ModelError:
    # For a field of the wrong type, the last line of the message has the reason.
    lines = str(error).splitlines()
    reason = lines[-1].strip() if type(error).__name__.startswith("StrictDataclass") and lines else short(error)
    return ModelError(
        f"{origin} can't be read as a model configuration: {reason}",
        "Give a folder of a Hugging Face causal language model.",
    )


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Read a model folder's tokenizer.

    Args:
        folder: The model's folder.
        trust_remote_code: Whether to run Python code of the folder.

    Returns:
        The Hugging Face tokenizer.

    Raises:
        ModelError: It is missing or broken.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except Exception as error:  # the tokenizers library raises bare Exceptions for broken files
        raise ModelError(
            f"The tokenizer in {folder} can't be read: {short(error)}",
            "Put tokenizer.json and tokenizer_config.json of the model beside its config.json.",
        ) from error


def config_digest(config: Any, *others: Any) -> str:
    """Return a SHA-256 of a Hugging Face configuration and other plain values, 64 hex digits.

    Args:
        config: The configuration; what transformers keeps in it for itself does not count.
        others: What else a result depends on, such as versions.
    """
    values = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return hashlib.sha256(json.dumps([values, *others], sort_keys=True, default=str).encode()).hexdigest()


def count_parameters(config: Any) -> int:
    """Return the number of parameters of a configuration's model; a tied head counts once.

    Args:
        config: The Hugging Face configuration, of a supported architecture; it is not changed.
    """
    architecture = build_skeleton(copy.deepcopy(config), torch.device("cpu"))
    return sum(shape.numel() for shape in architecture.parameter_shapes().values())


def build_skeleton(config: Any, device: torch.device, *, trust_remote_code: bool = False) -> Architecture:
    """Build the model's modules without memory for weights.

    Args:
        config: The Hugging Face configuration.
        device: Device of the buffers, such as rotary frequencies.
        trust_remote_code: Whether to run Python code of the model's folder.

    Returns:
        The model's modules, in training mode.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    run_one_by_one(config)
    with init_empty_weights(include_buffers=False):
        # float32, or buffers such as Gemma's embedding scale would be rounded to the checkpoint's dtype.
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    model.tie_weights()
    separate_experts(model)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.config.use_cache = False
    model.train()
    return find_architecture(model)
