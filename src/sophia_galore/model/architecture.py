"""The modules of a decoder-only model: embedding, layers, norm, head.

The engine runs these modules one at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sophia_galore.model.experts import ExpertWeights
from sophia_galore.model.logit_form import LogitForm

# model_type -> names of the models. The tests compare their gradients with autograd's; all others have to prove
# themselves (engine/proof.py).
SUPPORTED: dict[str, str] = {
    "llama": "Llama, SmolLM2",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "phi3": "Phi-3",
    "smollm3": "SmolLM3",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "ministral3": "Ministral 3",
    "exaone4": "EXAONE 4",
    "ernie4_5": "ERNIE 4.5",
    "glm4": "GLM-4",
    "arcee": "Arcee (AFM)",
    "hunyuan_v1_dense": "Hunyuan (dense)",
    "gemma": "Gemma",
    "granite": "Granite",
    "granite_swa": "Granite with sliding windows",
    "helium": "Helium",
    "starcoder2": "StarCoder2",
    "stablelm": "StableLM",
    "cohere2": "Cohere Command (R7B, A)",
    "nanochat": "nanochat",
    "apertus": "Apertus",
    "seed_oss": "Seed-OSS",
    "gpt2": "GPT-2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "phi": "Phi-1.5, Phi-2",
    "lfm2": "LFM2",
    "qwen3_5_text": "Qwen3.5 (text)",
    "mamba2": "Mamba 2",
    "bamba": "Bamba",
    "falcon_h1": "Falcon-H1",
    "jamba": "Jamba",
    "granitemoehybrid": "Granite 4 (hybrid)",
    "qwen3_next": "Qwen3-Next",
    "qwen3_5_moe_text": "Qwen3.5 (text, mixture of experts)",
    "qwen3_moe": "Qwen3 (mixture of experts)",
    "olmoe": "OLMoE",
    "mixtral": "Mixtral",
    "gpt_oss": "gpt-oss",
    "granitemoe": "Granite 3 (mixture of experts)",
    "lfm2_moe": "LFM2 (mixture of experts)",
    "ernie4_5_moe": "ERNIE 4.5 (mixture of experts)",
    "gemma4_text": "Gemma 4 (text)",
    "gemma3n_text": "Gemma 3n (text)",
}


@dataclass(frozen=True)
class Place:
    """Where a module is in a model.

    Args:
        owner: The module that has it as an attribute.
        attribute: The attribute's name.
    """

    owner: nn.Module
    attribute: str

    @property
    def module(self) -> Any:
        """The module that is there."""
        return getattr(self.owner, self.attribute)

    @contextmanager
    def holding(self, module: nn.Module) -> Iterator[None]:
        """Put another module there inside the context."""
        own = self.module
        setattr(self.owner, self.attribute, module)
        try:
            yield
        finally:
            setattr(self.owner, self.attribute, own)


@dataclass(frozen=True)
class Router:
    """The module that chooses the experts of each token in a layer.

    Args:
        module: The module.
        place: Where the logits are among what it returns.
        num_experts: Experts of the layer.
        num_chosen: How many it chooses for each token.
    """

    module: nn.Module
    place: int
    num_experts: int
    num_chosen: int

    def logits(self, out: Any) -> torch.Tensor:
        """Return the logits, (..., E), of what the module returned."""
        found: torch.Tensor = out[self.place] if isinstance(out, tuple) else out
        return found

    def choices(self, out: Any) -> torch.Tensor | None:
        """Return the chosen experts, (..., k), of what the module returned; None: they are not there."""
        values = out if isinstance(out, tuple) else (out,)
        integers = (each for each in values if isinstance(each, torch.Tensor) and not each.is_floating_point())
        return next((each for each in integers if each.shape[-1:] == (self.num_chosen,)), None)


@dataclass(frozen=True)
class Architecture:
    """The modules of a model.

    Args:
        model: The whole model. Its parameters are on the meta device, except frozen weights that its modules hold.
        base: The model below the head.
        base_name: Its name, the prefix of its parameter names without the final dot; empty: it is the whole model.
        embed: The token embedding.
        layers: The decoder layers, first to last.
        norm: What is between the last layer and the head, in most models a norm; the identity if there is nothing.
        head: The linear layer to the vocabulary.
        embed_place: Where the embedding is.
        layers_place: Where the list of layers is.
        norm_place: Where the norm is; None: there is none.
        join_place: Where the projections are that join several hidden states of a token behind the last layer; None:
            there is one hidden state.
        embed_name: Parameter name of the embedding's weight.
        layer_names: Name of each layer, which is the prefix of its parameter names without the final dot.
        norm_names: The parameters of `norm`, by their names in the model: their names inside of it.
        head_name: Parameter name of the head's weight; equals `embed_name` if they are tied.
        head_bias_name: Parameter name of the head's bias; None: it has none.
        entry_names: Names of the parameters between the embedding and the first layer, and of those that are used for
            other arguments of the layers: positions, norms, projections.
        lookups: Further embeddings of tokens, by the names of their weights.
        lookup_places: Where these are.
        expert_tensors: The weights of experts, by the name that transformers has for all of them together.
        routers: For each layer, what chooses its experts; None: it has none, or they are not known.
        balance: Coefficient of the loss that spreads tokens evenly over experts; 0: the configuration asks for none.
        tied: Whether the head's weight is the embedding's.
        padding_idx: For each embedding, by the name of its weight, the token that gets no gradient from look-ups, as
            declared by the module; None: every token gets one.
        logit_form: What becomes of the logits behind the head.
        runs_alone: For each layer, whether packed examples must run through it one by one: it carries a state from
            token to token.
        has_dropout: Whether the layers draw random numbers in training.
        most_short_positions: Maximum length up to which longrope (Phi-3) uses the factors for short texts; None: the
            position embeddings do not depend on the length.
    """

    model: nn.Module
    base: nn.Module
    base_name: str
    embed: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Linear
    embed_place: Place
    layers_place: Place
    norm_place: Place | None
    join_place: Place | None
    embed_name: str
    layer_names: tuple[str, ...]
    norm_names: Mapping[str, str]
    head_name: str
    head_bias_name: str | None
    entry_names: tuple[str, ...]
    lookups: Mapping[str, nn.Embedding]
    lookup_places: Mapping[str, Place]
    expert_tensors: Mapping[str, ExpertWeights]
    routers: tuple[Router | None, ...]
    balance: float
    tied: bool
    padding_idx: Mapping[str, int | None]
    logit_form: LogitForm
    runs_alone: tuple[bool, ...]
    has_dropout: bool
    most_short_positions: int | None

    @property
    def config(self) -> Any:
        """The Hugging Face configuration that the layers read."""
        return self.layers_place.owner.config

    @property
    def exit_names(self) -> tuple[str, ...]:
        """The names of the parameters behind the last layer: of the norm, the head's weight and its bias."""
        return tuple(name for name in (*self.norm_names, self.head_name, self.head_bias_name) if name)

    @property
    def num_streams(self) -> int:
        """How many hidden states layers get for each token, side by side (`streams.py`)."""
        return 1 if self.join_place is None else 1 + len(self.join_place.module)

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """Return the name and shape of each parameter; a tied head is not listed."""
        return {name: parameter.shape for name, parameter in self.model.named_parameters()}

    def is_expert(self, name: str) -> bool:
        """Return whether a parameter belongs to one expert of a mixture."""
        return name.rpartition(".")[0] in self.expert_tensors

    def of_all_experts(self, name: str) -> str:
        """Return the name that transformers has for a parameter: that of an expert is part of a larger tensor."""
        return name.rpartition(".")[0] if self.is_expert(name) else name

    def inner_name(self, name: str) -> str:
        """Return a parameter's name inside its layer; outside of the layers, its name."""
        return next(
            (name.removeprefix(f"{layer}.") for layer in self.layer_names if name.startswith(f"{layer}.")), name
        )

    def router_names(self) -> frozenset[str]:
        """Return the names of the matrices that choose experts: one row for each expert, beside the experts."""
        blocks = {name.rsplit(".", 2)[0]: len(weights) for name, weights in self.expert_tensors.items()}
        return frozenset(
            name
            for name, shape in self.parameter_shapes().items()
            if len(shape) == 2
            and shape[0] == next((n for block, n in blocks.items() if name.startswith(f"{block}.")), 0)
        )

    def linear_names(self) -> list[str]:
        """Return the names of the weights of linear modules in the layers, in the model's order."""
        return [
            f"{prefix}.{name}.weight"
            for prefix, layer in zip(self.layer_names, self.layers, strict=True)
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear)
        ]


def count_idle_layers(layer_names: Sequence[str], entry_names: Collection[str], trained: Collection[str]) -> int:
    """Return how many of the first layers need no backward: nothing is trained in them or before them.

    Args:
        layer_names: The layers, as prefixes of their parameter names without the final dot.
        entry_names: The weights before the first layer.
        trained: Names of the weights that are trained.
    """
    if any(name in trained for name in entry_names):
        return 0
    active = (index for index, name in enumerate(layer_names) if any(each.startswith(f"{name}.") for each in trained))
    return next(active, len(layer_names))
