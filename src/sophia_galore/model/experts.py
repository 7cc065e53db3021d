"""Experts that transformers keeps in one tensor, as a matrix for each.

A layer of many models keeps the matrices of all of its experts in one tensor, (experts, rows, columns). Here every
expert gets parameters of its own, `NAME.0`, `NAME.1` and so on, so that each has its own projection, its own state and
its own blocks of eight bits, and so that an expert without tokens can be left alone. The model's own loop over experts
still finds them: it only ever takes one by its number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class ExpertWeights(nn.Module):
    """One tensor of each expert, in place of the tensor of all of them.

    Args:
        whole: (experts, ...), on any device; its slices become the parameters `0`, `1` and so on.
    """

    def __init__(self, whole: Tensor) -> None:
        super().__init__()
        self.decode: Callable[[int], Tensor] | None = None
        """Returns an expert's weight in place of the parameter, while one is set."""
        for number, weight in enumerate(whole.detach().unbind()):
            self.register_parameter(str(number), nn.Parameter(weight, requires_grad=whole.requires_grad))

    def __getitem__(self, number: int | Tensor) -> Tensor:
        """Return the weight of an expert.

        Args:
            number: Its number; a tensor without dimensions will do.
        """
        place = int(number)
        if self.decode is not None:
            return self.decode(place)
        weight: Tensor = self._parameters[str(place)]  # type: ignore[assignment]
        return weight

    def __len__(self) -> int:
        """Return the number of experts."""
        return len(self._parameters)


def separate_experts(model: nn.Module) -> None:
    """Give each expert of a model parameters of its own, in place.

    Args:
        model: A Hugging Face model; it must run its experts one after the other (`eager`).
    """
    for module in list(model.modules()):
        if _holds_experts(module):
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                setattr(module, name, ExpertWeights(parameter))


def expert_tensors(model: nn.Module) -> dict[str, ExpertWeights]:
    """Return the tensors of experts of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertWeights)}


def _holds_experts(module: nn.Module) -> bool:
    """Return whether a module has a slice of each parameter for each expert, and takes one slice at a time."""
    count: Any = getattr(module, "num_experts", None)
    own = list(module.parameters(recurse=False))
    # What transformers' decorator for experts sets: these run one after the other if the configuration asks for it.
    goes_by_number = hasattr(module, "is_transposed")
    return goes_by_number and bool(own) and all(len(parameter) == count for parameter in own)


def run_one_by_one(config: Any) -> None:
    """Let a model run its experts one after the other: other ways take the tensor of all of them.

    Args:
        config: The model's Hugging Face configuration, before the model is built; changed in place.
    """
    config._experts_implementation = "eager"
