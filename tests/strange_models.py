"""Architectures that transformers does not know: copies of Llama, each with something of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tiny import tiny_config

STRANGE: dict[str, type[LlamaConfig]] = {}
"""Their configurations, by name; all are registered with transformers."""


def _register(name: str, change: Callable[[LlamaForCausalLM], None]) -> None:
    """Let transformers know a copy of Llama that is changed after it is built."""

    class Config(LlamaConfig):
        model_type = f"strange_{name}"

    class ForCausalLM(LlamaForCausalLM):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            change(self)

    AutoConfig.register(Config.model_type, Config)
    AutoModelForCausalLM.register(Config, ForCausalLM)
    STRANGE[name] = Config


def strange_config(name: str) -> Any:
    """The configuration of three small layers."""
    values = {key: value for key, value in tiny_config().to_dict().items() if key != "model_type"}
    return STRANGE[name](**values)


def _same(model: LlamaForCausalLM) -> None:
    pass


def _scaled(model: LlamaForCausalLM) -> None:
    """The base model multiplies behind its norm."""
    own = model.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.last_hidden_state = 1.5 * out.last_hidden_state
        return out

    model.model.forward = forward  # type: ignore[method-assign]


class _Keys(nn.Linear):
    """Keeps its keys in a dict that no layer gets as an argument, or adds those that are there."""

    def __init__(self, own: nn.Linear, kept: dict[str, Tensor], *, adds: bool) -> None:
        super().__init__(own.in_features, own.out_features, bias=False)
        self.kept, self.adds = kept, adds

    def forward(self, hidden: Tensor) -> Tensor:
        keys = super().forward(hidden)
        if self.adds:
            return keys + self.kept["keys"][:, : keys.shape[1]]
        self.kept["keys"] = keys
        return keys


def _keys_of_another_layer(model: LlamaForCausalLM) -> None:
    kept: dict[str, Tensor] = {}
    for adds, layer in enumerate(model.model.layers[:2]):
        layer.self_attn.k_proj = _Keys(layer.self_attn.k_proj, kept, adds=bool(adds))


class _Borrows(nn.Module):
    """Multiplies by the weight of another layer, which is no submodule."""

    def __init__(self, own: nn.Linear, other: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(own.weight.detach().clone())
        vars(self)["other"] = other

    def forward(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, self.weight + vars(self)["other"].weight)


def _weight_of_another_layer(model: LlamaForCausalLM) -> None:
    first, second = model.model.layers[:2]
    second.self_attn.k_proj = _Borrows(second.self_attn.k_proj, first.self_attn.k_proj)


def _idle(model: LlamaForCausalLM) -> None:
    """Parameters that nothing depends on, in every layer and beside them."""
    for layer in model.model.layers:
        layer.mlp.idle = nn.Linear(24, 40, bias=False)
    model.model.nowhere = nn.Parameter(torch.ones(7))


def _sees_later_tokens(model: LlamaForCausalLM) -> None:
    own = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda hidden: own(hidden + hidden.roll(-1, 1))  # type: ignore[method-assign]


def _uneven(model: LlamaForCausalLM) -> None:
    """A parameter that has a gradient in one layer only."""
    own = model.model.layers[0].mlp.forward
    for layer in model.model.layers:
        layer.mlp.gain = nn.Parameter(torch.ones(1))
    gain = model.model.layers[0].mlp
    gain.forward = lambda hidden: own(hidden) * gain.gain  # type: ignore[method-assign]


def _broken(model: LlamaForCausalLM) -> None:
    raise ValueError("this size is odd")


for _name, _change in {
    "same": _same,
    "scaled": _scaled,
    "keys_of_another_layer": _keys_of_another_layer,
    "weight_of_another_layer": _weight_of_another_layer,
    "idle": _idle,
    "sees_later_tokens": _sees_later_tokens,
    "uneven": _uneven,
    "broken": _broken,
}.items():
    _register(_name, _change)
