"""Read and check the parameters of the `torch.optim` classes: with or without groups, with or without names.

States and random numbers are kept by name. Parameters without names, such as those from trainers, are named by their
position over all groups, as in torch's state dicts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sophia_galore.errors import ArgumentError
from sophia_galore.optim.arguments import Group

TRAINABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)

_GIVE = "Pass model.named_parameters() or model.parameters(), or a list of groups whose 'params' are either."
# Keys that torch's learning rate schedulers write into groups; groups may contain them.
_SCHEDULERS_KEYS = {"initial_lr"}


def position_name(position: int) -> str:
    """Return the name of a parameter that was passed without one.

    Args:
        position: Its position over all groups, counted from 0.
    """
    return f"parameter {position}"


def read_groups(owner: str, given: Any) -> list[Group]:
    """Return an optimizer's argument as parameter groups.

    Args:
        owner: The optimizer's name, for messages.
        given: Parameters, pairs of name and parameter, or groups.

    Returns:
        The groups; their parameters are not checked yet.

    Raises:
        ArgumentError: The argument is empty or of another kind.
    """
    items = _in_order(owner, given)
    refuse_nothing(owner, items)
    if all(isinstance(item, dict) for item in items):
        return items
    return [{"params": items}]


def refuse_nothing(owner: str, params: Collection[object]) -> None:
    """Raise `ArgumentError` if there are no parameters."""
    if not params:
        raise ArgumentError(f"{owner} was given no parameters.", _GIVE)


def read_pairs(owner: str, group: Group, known: Sequence[str]) -> list[tuple[str, Tensor]]:
    """Return the pairs of name and parameter of one group.

    Args:
        owner: The optimizer's name, for messages.
        group: The user's group. Its "params" are parameters or pairs. If they are parameters, "param_names" may hold
            their names, as in the groups of an existing optimizer.
        known: Names of the parameters in earlier groups.

    Returns:
        The pairs; parameters without names are named by their position.

    Raises:
        ArgumentError: Only some have names, one is not a parameter, or one can't be trained.
    """
    given = group["params"]
    items: list[Any] = [given] if isinstance(given, Tensor) else _in_order(owner, given)
    names = group.get("param_names")
    if names and all(isinstance(item, Tensor) for item in items):
        if len(names) != len(items):
            raise ArgumentError(f"{owner} was given {len(names)} names for {len(items)} parameters.", _GIVE)
        items = list(zip(names, items, strict=True))
    # If the known names are positions, the earlier parameters had no names.
    nameless = [name == position_name(place) for place, name in enumerate(known)]
    nameless += [isinstance(item, Tensor) for item in items]
    if any(nameless) and not all(nameless):
        raise ArgumentError(f"{owner} was given parameters with names and others without.", _GIVE)
    if nameless and all(nameless):
        items = [(position_name(len(known) + place), param) for place, param in enumerate(items)]
    for item in items:
        _refuse_odd(owner, item)
    return items


def _in_order(owner: str, given: Any) -> list[Any]:
    """Return parameters, pairs or groups as a list; refuse what has no order or is of another kind."""
    is_list = isinstance(given, torch.nn.ParameterList)  # the only module that torch's optimizers accept
    if isinstance(given, (Tensor, Mapping, str, set, frozenset)) or (
        not is_list and (isinstance(given, torch.nn.Module) or not isinstance(given, Iterable))
    ):
        raise ArgumentError(f"{owner} was given a {type(given).__name__} in place of parameters.", _GIVE)
    return list(given)


def _refuse_odd(owner: str, item: Any) -> None:
    """Raise `ArgumentError` unless an item is a pair of a name and a parameter that can be trained."""
    if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
        raise ArgumentError(f"{owner} was given a {type(item).__name__} in place of a parameter.", _GIVE)
    name, param = item
    # Only leaves accumulate gradients; a computed tensor with retain_grad() is not a parameter either.
    if not isinstance(param, Tensor) or not param.is_leaf:
        raise ArgumentError(f"{owner}: {name} is not a parameter, but a computed tensor or no tensor at all.", _GIVE)
    if param.requires_grad and param.dtype not in TRAINABLE_DTYPES:
        raise ArgumentError(*untrainable(name, param))


def check_keys(owner: str, group: Group, known: Iterable[str], derived: Iterable[str]) -> None:
    """Refuse a group with unknown settings.

    Args:
        owner: The optimizer's name, for the message.
        group: The user's group.
        known: Names of the known settings.
        derived: Other keys that the groups of an existing optimizer have.

    Raises:
        ArgumentError: A setting is unknown, or "params" is missing.
    """
    if not isinstance(group, dict):
        raise ArgumentError(f"{owner} was given a {type(group).__name__} as a parameter group.", _GIVE)
    settings = sorted(set(known))
    allowed = {"params", "param_names", *settings, *derived, *_SCHEDULERS_KEYS}
    unknown = sorted(map(str, group.keys() - allowed))
    if unknown or "params" not in group:
        wrong = f"the unknown setting {unknown[0]!r}" if unknown else "no 'params'"
        raise ArgumentError(f"{owner}: a parameter group has {wrong}.", f"Known are: params, {', '.join(settings)}.")


def param_shape(param: Tensor) -> tuple[int, ...]:
    """Return a parameter's shape for a `ParamSpec`, in which a scalar is a vector of one element."""
    return tuple(param.shape) or (1,)


def refuse_doubles(owner: str, pairs: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse a name or a parameter that occurs twice.

    Args:
        owner: The optimizer's name, for messages.
        pairs: All pairs of name and parameter.

    Raises:
        ArgumentError: One occurs twice; the message names the first one.
    """
    names: dict[int, str] = {}
    seen: set[str] = set()
    for name, param in pairs:
        if name in seen:
            raise ArgumentError(
                f"{owner} was given two parameters named {name}.", "Give each parameter a different name."
            )
        if id(param) in names:
            cause = f"{owner} was given the same parameter twice, as {names[id(param)]} and as {name}."
            raise ArgumentError(cause, "Give tied parameters once, as model.named_parameters() does.")
        seen.add(name)
        names[id(param)] = name


def untrainable(name: str, param: Tensor) -> tuple[str, str]:
    """Return the cause and the remedy for a parameter whose dtype can't be trained."""
    kind = str(param.dtype).removeprefix("torch.")
    why = ", whose steps would be lost below its smallest numbers" if param.dtype == torch.float16 else ""
    return (
        f"{name} is stored in {kind}{why}; only float32, bfloat16 and float64 weights can be trained.",
        "Load the model in bfloat16 (updates are rounded stochastically) or float32, or freeze the parameter.",
    )
