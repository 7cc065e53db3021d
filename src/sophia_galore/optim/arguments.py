"""What the `torch.optim` face is called with: named parameters, and settings that make sense."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sophia_galore.errors import ArgumentError
from sophia_galore.optim.spec import ADAMW_LEARNING_RATE

Group = dict[str, Any]
"""A parameter group: settings, and under "params" pairs of name and parameter."""

TRAINABLE_DTYPES = (torch.float32, torch.bfloat16)

_NAMED = "Pass model.named_parameters(), or a list of groups whose 'params' are (name, parameter) pairs."
# What torch's learning rate schedulers write into groups, so that groups may be given with it.
_SCHEDULERS_KEYS = {"initial_lr"}


def _is_real(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and math.isfinite(value.item())
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_betas(value: object) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(_is_real(beta) and 0 <= beta < 1 for beta in value)


def _one_of(*values: object) -> tuple[Callable[[Any], bool], str]:
    return (lambda given: given in values and not isinstance(given, bool)), f"one of {', '.join(map(repr, values))}"


# Beyond these a step leaves float32, or an index its type.
_LARGEST, _MOST, _SMALLEST_EPS = 1e9, 10**9, 1e-30
_AT_LEAST_0 = (lambda value: _is_real(value) and 0 <= value <= _LARGEST, "a number from 0 to 1e9")
_ABOVE_0 = (lambda value: _is_real(value) and 0 < value <= _LARGEST, "a number above 0, at most 1e9")
_COUNT = (lambda value: _is_whole(value) and 1 <= value <= _MOST, "a whole number from 1 to 1e9")
_SWITCH = (lambda value: isinstance(value, bool), "True or False")

_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "betas": (_is_betas, "two numbers that are at least 0 and below 1"),
    "dense_betas": (_is_betas, "two numbers that are at least 0 and below 1"),
    "eps": (lambda value: _is_real(value) and _SMALLEST_EPS <= value <= _LARGEST, "a number from 1e-30 to 1e9"),
    "rho": _ABOVE_0,
    "rank": _COUNT,
    "update_proj_gap": _COUNT,
    "scale": (lambda value: value is None or _ABOVE_0[0](value), _ABOVE_0[1]),
    "rule": _one_of("adamw", "sophia", "adafactor", "sgd", "muon"),
    "subspace": _one_of("tracked", "svd", "randomized", "random"),
    "residual": _one_of("none", "fira"),
    "moment_transport": _SWITCH,
    "stagger": _SWITCH,
    "adaptive_gap": _SWITCH,
    "mini": _SWITCH,
    "projection_bits": _one_of(32, 16, 4),
    "state_bits": _one_of(32, 16, 8),
    "dense_lr": (lambda value: value is None or _ABOVE_0[0](value), _ABOVE_0[1]),
    "dense_ratio": _ABOVE_0,
    "curvature_every": _COUNT,
    "num_samples": _COUNT,
    "seed": (lambda value: _is_whole(value) and 0 <= value < 2**63, "a whole number in [0, 2**63)"),
    "max_grad_norm": _AT_LEAST_0,
}


def check_settings(owner: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings that make no sense.

    Args:
        owner: Whose settings they are, for the message.
        settings: By name; names that are not known are passed over.

    Raises:
        ArgumentError: Naming the first one.
    """
    for key, (is_right, wanted) in _CHECKS.items():
        # Only Apollo has a scale of its own to put in the place of none.
        missing = key == "scale" and settings.get(key, 1) is None and owner != "Apollo"
        if missing or (key in settings and not is_right(settings[key])):
            raise ArgumentError(f"{owner} got {key}={settings[key]!r}.", f"Give {key} as {wanted}.")
    if settings.get("adaptive_gap") and settings.get("subspace") == "random":
        raise ArgumentError(
            f"{owner}: adaptive_gap looks at how far a subspace turns, but subspace='random' is drawn anew each time.",
            "Set adaptive_gap=False, or take subspace='tracked'.",
        )


def read_groups(owner: str, given: Any) -> list[Group]:
    """The parameter groups of what an optimizer was given.

    Args:
        owner: The optimizer's name, for messages.
        given: Pairs of name and parameter, or groups.

    Returns:
        Groups, whose parameters are not looked at yet.

    Raises:
        ArgumentError: Nothing, or nothing of that kind, was given.
    """
    if isinstance(given, (Tensor, torch.nn.Module, Mapping, str)) or not isinstance(given, Iterable):
        raise ArgumentError(f"{owner} was given a {type(given).__name__} in place of named parameters.", _NAMED)
    items = list(given)
    refuse_nothing(owner, items)
    if all(isinstance(item, dict) for item in items):
        return items
    return [{"params": items}]


def refuse_nothing(owner: str, params: Collection[object]) -> None:
    """Raise `ArgumentError` where there is nothing to train."""
    if not params:
        raise ArgumentError(f"{owner} was given no parameters.", _NAMED)


def read_pairs(owner: str, given: Any) -> list[tuple[str, Tensor]]:
    """The pairs of name and parameter of one group.

    Args:
        owner: The optimizer's name, for messages.
        given: What was given as "params".

    Raises:
        ArgumentError: A parameter has no name, is no parameter, or has a dtype that can't be trained.
    """
    pairs: list[Any] = [given] if isinstance(given, Tensor) else list(given)
    for item in pairs:
        if isinstance(item, Tensor):
            raise ArgumentError(f"{owner} was given parameters without names, which its state is kept by.", _NAMED)
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise ArgumentError(f"{owner} was given a {type(item).__name__} in place of a named parameter.", _NAMED)
        name, param = item
        if not isinstance(param, Tensor) or not param.is_leaf:
            raise ArgumentError(
                f"{owner}: {name} is not a parameter, but a computed tensor or no tensor at all.", _NAMED
            )
        if param.requires_grad and param.dtype not in TRAINABLE_DTYPES:
            raise ArgumentError(*untrainable(name, param))
    return pairs


def check_keys(owner: str, group: Group, known: Iterable[str]) -> None:
    """Refuse a group with settings that nobody would read.

    Args:
        owner: The optimizer's name, for the message.
        group: As the user gave it.
        known: Settings of the optimizer.

    Raises:
        ArgumentError: A setting is not known, or "params" is missing.
    """
    if not isinstance(group, dict):
        raise ArgumentError(f"{owner} was given a {type(group).__name__} as a parameter group.", _NAMED)
    settings = sorted(set(known))
    unknown = sorted(map(str, group.keys() - {"params", "param_names"} - set(settings) - _SCHEDULERS_KEYS))
    if unknown or "params" not in group:
        wrong = f"the unknown setting {unknown[0]!r}" if unknown else "no 'params'"
        raise ArgumentError(f"{owner}: a parameter group has {wrong}.", f"Known are: params, {', '.join(settings)}.")


def param_shape(param: Tensor) -> tuple[int, ...]:
    """A parameter's shape as a `ParamSpec` has it; a scalar is a vector of one element."""
    return tuple(param.shape) or (1,)


def refuse_doubles(owner: str, pairs: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse a name or a parameter that comes twice.

    Args:
        owner: The optimizer's name, for messages.
        pairs: All names and parameters.

    Raises:
        ArgumentError: Naming the first one.
    """
    names: dict[int, str] = {}
    seen: set[str] = set()
    for name, param in pairs:
        if name in seen:
            raise ArgumentError(f"{owner} was given two parameters named {name}.", "Give each a name of its own.")
        if id(param) in names:
            cause = f"{owner} was given the same parameter twice, as {names[id(param)]} and as {name}."
            raise ArgumentError(cause, "Give tied parameters once, as model.named_parameters() does.")
        seen.add(name)
        names[id(param)] = name


def dense_ratio(lr: float, dense_lr: float | None, scale: float, rule: str) -> float:
    """What `lr` is multiplied with for parameters that are not projected.

    Args:
        lr: Rate of the group at its start.
        dense_lr: Rate of its dense parameters at its start; None: by `scale`, so that both move alike.
        scale: GaLore's factor.
        rule: GaLore's rule.

    Raises:
        ArgumentError: There is no such factor, since `lr` is 0.
    """
    if dense_lr is None and rule == "sgd":
        # The length of SGD's step is the gradient's own: its rate says nothing about AdamW's.
        dense_lr = ADAMW_LEARNING_RATE
    if dense_lr is None:
        return scale
    if not lr:
        raise ArgumentError(f"dense_lr={dense_lr} can't be kept in proportion to lr=0.", "Give the peak rate as lr.")
    return dense_lr / lr


def untrainable(name: str, param: Tensor) -> tuple[str, str]:
    """Cause and remedy where a parameter's dtype can't be trained."""
    kind = str(param.dtype).removeprefix("torch.")
    why = ", whose steps would be lost below its smallest numbers" if param.dtype == torch.float16 else ""
    return (
        f"{name} is stored in {kind}{why}; only float32 and bfloat16 weights can be trained.",
        "Load the model in bfloat16 (updates are rounded stochastically) or float32, or freeze the parameter.",
    )
