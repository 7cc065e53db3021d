"""The modules of a decoder-only model: embedding, layers, norm, head.

The engine runs these modules one at a time. An architecture that is not in the table is refused, because its forward
may do more than to apply these modules.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sophia_galore.errors import ModelError

# model_type -> names of the models. All of them have their modules under the same attribute names.
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
    """The modules of a model.

    Args:
        model: The whole model. Its parameters are on the meta device, except frozen weights that its modules hold.
        base: The model below the head.
        embed: The token embedding.
        layers: The decoder layers, first to last.
        norm: The norm between the last layer and the head.
        head: The linear layer to the vocabulary.
        embed_name: Parameter name of the embedding's weight.
        layer_names: Name of each layer, which is the prefix of its parameter names without the final dot.
        norm_name: Name of the norm.
        head_name: Parameter name of the head's weight; equals `embed_name` if they are tied.
        tied: Whether the head's weight is the embedding's.
        padding_idx: Token whose embedding gets no gradient from look-ups, as declared by the module.
        logit_softcap: Cap c of logits c * tanh(z / c); None: uncapped.
        has_dropout: Whether the layers use dropout in training.
        most_short_positions: Maximum length up to which longrope (Phi-3) uses the factors for short texts; None: the
            position embeddings do not depend on the length.
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
        """Return the name and shape of each parameter; a tied head is not listed."""
        return {name: parameter.shape for name, parameter in self.model.named_parameters()}

    def linear_names(self) -> list[str]:
        """Return the names of the weights of linear modules in the layers, in the model's order."""
        return [
            f"{prefix}.{name}.weight"
            for prefix, layer in zip(self.layer_names, self.layers, strict=True)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]


def count_idle_layers(layer_names: Sequence[str], embed_name: str, trained: Collection[str]) -> int:
    """Return how many of the first layers need no backward: neither they nor the embedding have trained weights.

    Args:
        layer_names: The layers, as prefixes of their parameter names without the final dot.
        embed_name: The embedding's weight.
        trained: Names of the weights that are trained.
    """
    if embed_name in trained:
        return 0
    active = (index for index, name in enumerate(layer_names) if any(each.startswith(f"{name}.") for each in trained))
    return next(active, len(layer_names))


def check_supported(config: Any) -> None:
    """Refuse a model whose architecture is not supported.

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
    """Find the modules of a Hugging Face causal language model.

    Args:
        model: An `AutoModelForCausalLM`, on any device.

    Returns:
        Its modules.

    Raises:
        ModelError: The architecture is not supported, or its head has a bias.
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
    # The engine looks up rows in a smaller embedding of the batch's tokens only, in which this row number would mean
    # another token. So the engine applies `padding_idx` itself.
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
