"""Where the parts of a decoder-only model are: embedding, layers, norm, head.

The engine runs these parts one at a time. What it needs to know of an architecture is in one table;
an architecture that is not in it is refused by name, because running it on a guess could train
something else than the model computes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sophia_galore.errors import ModelError

# model_type -> what it is called in words. All keep their parts under the same attribute names.
SUPPORTED: dict[str, str] = {
    "llama": "Llama, SmolLM2",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "phi3": "Phi-3",
}

_DROPOUT_KEYS = ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout")


@dataclass(frozen=True)
class Architecture:
    """The parts of a model.

    Args:
        model: The whole model, parameters on the meta device but for weights that its modules hold frozen.
        base: The model below the head.
        embed: The token embedding.
        layers: The decoder layers, first to last.
        norm: The norm between the last layer and the head.
        head: The linear map to the vocabulary.
        embed_name: Parameter name of the embedding's weight.
        layer_names: Name of each layer, the prefix of its parameters' names without the final dot.
        norm_name: Name of the norm.
        head_name: Parameter name of the head's weight; equals `embed_name` if they are tied.
        tied: Whether the head's weight is the embedding's.
        padding_idx: Token whose embedding gets no gradient from look-ups, as the module declares it.
        logit_softcap: Cap c of logits c * tanh(z / c); None: uncapped.
        has_dropout: Whether a layer draws random numbers in training.
        most_short_positions: Most positions of a text that is not treated as a long one, by longrope (Phi-3); None:
            positions mean the same in a text of any length.
    """

    model: nn.Module
    base: nn.Module
    embed: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Linear
    embed_name: str
    layer_names: tuple[str, ...]
    norm_name: str
    head_name: str
    tied: bool
    padding_idx: int | None
    logit_softcap: float | None
    has_dropout: bool
    most_short_positions: int | None

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """Name and shape of each parameter once; a tied head is not listed beside the embedding."""
        return {name: parameter.shape for name, parameter in self.model.named_parameters()}

    def linear_names(self) -> list[str]:
        """Return the names of the weights of the layers' linear maps, in the model's order."""
        return [
            f"{prefix}.{name}.weight"
            for prefix, layer in zip(self.layer_names, self.layers, strict=True)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]


def count_idle_layers(layer_names: Sequence[str], embed_name: str, trained: Collection[str]) -> int:
    """How many of the first layers no gradient has to go through: none of their weights is trained, nor is anything
    before them.

    Args:
        layer_names: The layers, as prefixes of their parameters' names without the final dot.
        embed_name: The embedding's weight.
        trained: Names of the weights that are trained.
    """
    if embed_name in trained:
        return 0
    active = (index for index, name in enumerate(layer_names) if any(each.startswith(f"{name}.") for each in trained))
    return next(active, len(layer_names))


def check_supported(config: Any) -> None:
    """Refuse a model whose architecture is not known.

    Args:
        config: The model's Hugging Face configuration.

    Raises:
        ModelError: Its `model_type` is not in the table.
    """
    if config.model_type not in SUPPORTED:
        known = ", ".join(SUPPORTED.values())
        raise ModelError(
            f"The architecture {config.model_type!r} is not supported.", f"Supported decoder-only models: {known}."
        )


def find_architecture(model: Any) -> Architecture:
    """Find the parts of a Hugging Face causal language model.

    Args:
        model: An `AutoModelForCausalLM`, on any device.

    Returns:
        Its parts.

    Raises:
        ModelError: The architecture is not supported, or is built in an unexpected way.
    """
    config = model.config
    check_supported(config)
    base = model.model
    names = {id(module): name for name, module in model.named_modules()}
    if model.lm_head.bias is not None:
        raise ModelError(f"The head of this {config.model_type} model has a bias, which is not supported.")
    embed_name = f"{names[id(base.embed_tokens)]}.weight"
    tied = model.lm_head.weight is base.embed_tokens.weight
    padding_idx = base.embed_tokens.padding_idx
    # The engine looks up a compacted embedding, in which this row number would mean another token;
    # it applies the rule itself.
    base.embed_tokens.padding_idx = None
    return Architecture(
        model=model,
        base=base,
        embed=base.embed_tokens,
        layers=base.layers,
        norm=base.norm,
        head=model.lm_head,
        embed_name=embed_name,
        layer_names=tuple(names[id(layer)] for layer in base.layers),
        norm_name=names[id(base.norm)],
        head_name=embed_name if tied else f"{names[id(model.lm_head)]}.weight",
        tied=tied,
        padding_idx=padding_idx,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        has_dropout=any(getattr(config, key, 0.0) for key in _DROPOUT_KEYS),
        most_short_positions=_most_short_positions(config),
    )


def _most_short_positions(config: Any) -> int | None:
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
