"""The parameters that the `torch.optim` classes are given: in groups or not, with names or without.

States and everything random are kept by name. Parameters that come without names, as trainers hand them over, are
named by their position over all groups, as torch's own state dicts do.
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
# What torch's learning rate schedulers write into groups, so that groups may be given with it.
_SCHEDULERS_KEYS = {"initial_lr"}


def position_name(position: int) -> str:
    """The name of a parameter that came without one.

    Args:
        position: How many parameters came before it, over all groups.
    """
    return f"parameter {position}"


def read_groups(owner: str, given: Any) -> list[Group]:
    """The parameter groups of what an optimizer was given.

    Args:
        owner: The optimizer's name, for messages.
        given: Parameters, pairs of name and parameter, or groups.

    Returns:
        Groups, whose parameters are not looked at yet.

    Raises:
        ArgumentError: Nothing, or nothing of that kind, was given.
    """
    items = _in_order(owner, given)
    refuse_nothing(owner, items)
    if all(isinstance(item, dict) for item in items):
        return items
    return [{"params": items}]


def refuse_nothing(owner: str, params: Collection[object]) -> None:
    """Raise `ArgumentError` where there is nothing to train."""
    if not params:
        raise ArgumentError(f"{owner} was given no parameters.", _GIVE)


def read_pairs(owner: str, group: Group, known: Sequence[str]) -> list[tuple[str, Tensor]]:
    """The pairs of name and parameter of one group.

    Args:
        owner: The optimizer's name, for messages.
        group: As the user gave it. Its "params" are parameters or pairs; "param_names", which groups of a finished
            optimizer have beside plain parameters, are honoured.
        known: Names of the parameters before it, in all groups.

    Returns:
        The pairs; what has no name is named by its position.

    Raises:
        ArgumentError: Some have names and others have none; or one is no parameter, or can't be trained.
    """
    given = group["params"]
    items: list[Any] = [given] if isinstance(given, Tensor) else _in_order(owner, given)
    names = group.get("param_names")
    if names and all(isinstance(item, Tensor) for item in items):
        if len(names) != len(items):
            raise ArgumentError(f"{owner} was given {len(names)} names for {len(items)} parameters.", _GIVE)
        items = list(zip(names, items, strict=True))
    # An optimizer whose names are positions was given none.
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
    """What was given, as a list."""
    is_list = isinstance(given, torch.nn.ParameterList)  # the one module that torch's optimizers take
    if isinstance(given, (Tensor, Mapping, str, set, frozenset)) or (
        not is_list and (isinstance(given, torch.nn.Module) or not isinstance(given, Iterable))
    ):
        raise ArgumentError(f"{owner} was given a {type(given).__name__} in place of parameters.", _GIVE)
    return list(given)


def _refuse_odd(owner: str, item: Any) -> None:
    """Raise `ArgumentError` for what is no pair of a name and a parameter that can be trained."""
    if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
        raise ArgumentError(f"{owner} was given a {type(item).__name__} in place of a parameter.", _GIVE)
    name, param = item
    # Only a leaf gets a gradient; and what retains one for a user was computed as well.
    if not isinstance(param, Tensor) or not param.is_leaf:
        raise ArgumentError(f"{owner}: {name} is not a parameter, but a computed tensor or no tensor at all.", _GIVE)
    if param.requires_grad and param.dtype not in TRAINABLE_DTYPES:
        raise ArgumentError(*untrainable(name, param))


def check_keys(owner: str, group: Group, known: Iterable[str]) -> None:
    """Refuse a group with settings that nobody would read.

    Args:
        owner: The optimizer's name, for the message.
        group: As the user gave it.
        known: Settings that it reads.

    Raises:
        ArgumentError: A setting is not known, or "params" is missing.
    """
    if not isinstance(group, dict):
        raise ArgumentError(f"{owner} was given a {type(group).__name__} as a parameter group.", _GIVE)
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


def untrainable(name: str, param: Tensor) -> tuple[str, str]:
    """Cause and remedy where a parameter's dtype can't be trained."""
    kind = str(param.dtype).removeprefix("torch.")
    why = ", whose steps would be lost below its smallest numbers" if param.dtype == torch.float16 else ""
    return (
        f"{name} is stored in {kind}{why}; only float32, bfloat16 and float64 weights can be trained.",
        "Load the model in bfloat16 (updates are rounded stochastically) or float32, or freeze the parameter.",
    )
