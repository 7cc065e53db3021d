"""The `state_dict` of the `torch.optim` classes: states by name, exact, from plain values and tensors only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor

from sophia_galore.errors import CheckpointError
from sophia_galore.optim.arguments import Group
from sophia_galore.optim.arguments import plain as to_plain
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import ParamSpec

_FORMAT = 1
_KEYS = {
    *("format", "optimizer", "seed", "curvature_every", "curvature_seen", "num_steps", "places"),
    *("state", "shapes", "param_groups"),
}
# The members of a group are compared, but not loaded.
_MEMBERS = {"params", "param_names"}
_ALIKE = "Make the optimizer with the model and the settings that the state was saved with."
_NAMES = (
    "Make the optimizer as the saved one was made: with names or without, in the same order. torch.compile and DDP "
    "put '_orig_mod.' and 'module.' before names: give the parameters of the model inside."
)


def to_dict(
    facts: Mapping[str, Any], groups: Iterable[Group], param_optimizer: ParamOptimizer, steps: Mapping[str, int]
) -> dict[str, Any]:
    """Return an optimizer's `state_dict`.

    Args:
        facts: Its settings and its progress, as plain values.
        groups: Its parameter groups.
        param_optimizer: Its states.
        steps: Number of steps of each parameter so far.

    Returns:
        Tensors, numbers, strings, lists and dicts; the tensors are not copies.
    """
    state: dict[str, dict[str, Any]] = {}
    for full_name, tensor in param_optimizer.states.named().items():
        name, _, key = full_name.rpartition("/")
        entry = state.setdefault(name, {"step": steps.get(name, 0), "tensors": {}})
        entry["tensors"][key] = tensor
    return {
        "format": _FORMAT,
        **facts,
        "state": state,
        "shapes": {name: list(spec.shape) for name, spec in param_optimizer.specs.items()},
        "param_groups": [_plain(group) for group in groups],
    }


def settings_of(saved_group: Mapping[str, Any]) -> Group:
    """Return the settings of a saved group, with tuples instead of lists."""
    settings = {key: value for key, value in saved_group.items() if key not in _MEMBERS}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def check(
    state_dict: Mapping[str, Any],
    identity: Mapping[str, Any],
    groups: Sequence[Group],
    specs: Mapping[str, ParamSpec],
    fixed_settings: Iterable[str],
) -> None:
    """Refuse a saved state that does not fit an optimizer.

    Args:
        state_dict: From `to_dict`.
        identity: The facts that must be equal, among them "optimizer".
        groups: Parameter groups of the optimizer that loads the state.
        specs: Its parameters.
        fixed_settings: Names of the group settings that must be equal.

    Raises:
        CheckpointError: They differ; the message names the first difference.
    """
    if not isinstance(state_dict, Mapping) or state_dict.get("format") != _FORMAT or not state_dict.keys() >= _KEYS:
        raise CheckpointError(
            f"This is no state_dict of a {identity['optimizer']} of sophia_galore.",
            "Load what state_dict() of the same optimizer gave; other optimizers' moments can't be taken over.",
        )
    for key, own in identity.items():
        _refuse_difference(key, state_dict[key], own)
    _refuse_difference("number of groups", len(state_dict["param_groups"]), len(groups))
    for group, saved_group in zip(groups, state_dict["param_groups"], strict=True):
        # The order of parameters must be equal too: it spreads the refreshes over the gap.
        for saved_name, name in zip_longest(saved_group.get("param_names", []), group["param_names"]):
            _refuse_difference("the name of a parameter", saved_name, name, _NAMES)
        for key in sorted(fixed_settings):
            _refuse_difference(key, saved_group.get(key), group[key])
    for name, spec in specs.items():
        _refuse_difference(f"the shape of {name}", list(state_dict["shapes"].get(name, [])), list(spec.shape))
    for name, entry in state_dict["state"].items():
        wanted = specs[name].state_tensors() if name in specs else {}
        found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in entry["tensors"].items()}
        odd = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
        if odd:
            _refuse_difference(f"the state {odd[0]} of {name}", found.get(odd[0]), wanted.get(odd[0]))


def restore(
    state_dict: Mapping[str, Any], specs: Mapping[str, ParamSpec], params: Mapping[str, Tensor], seed: int
) -> tuple[ParamOptimizer, dict[str, int]]:
    """Restore saved states on the current devices of the parameters.

    Args:
        state_dict: A state that passed `check`.
        specs: The specs, by name.
        params: The parameters, by name.
        seed: The optimizer's seed.

    Returns:
        The states, which share no memory with the saved ones, and the number of steps of each parameter so far.
    """
    param_optimizer = ParamOptimizer(specs.values(), seed=seed)
    for name, entry in state_dict["state"].items():
        own = param_optimizer.states.place(name, params[name].device)
        for key, tensor in entry["tensors"].items():
            own[key].copy_(tensor)
    return param_optimizer, {name: int(entry["step"]) for name, entry in state_dict["state"].items()}


def _refuse_difference(what: str, saved: object, own: object, remedy: str = _ALIKE) -> None:
    if saved != own:
        raise CheckpointError(
            f"The saved optimizer state does not fit: {what} was {saved!r} and is {own!r}.",
            remedy,
        )


def _plain(group: Group) -> dict[str, Any]:
    """Return a group with indices instead of parameters, lists instead of tuples, numbers instead of tensors."""
    plain: dict[str, Any] = {"params": list(range(len(group["params"])))}
    for key, value in group.items():
        if key == "params":
            continue
        value = to_plain(value.item() if isinstance(value, Tensor) else value)  # schedulers write into groups
        plain[key] = list(value) if isinstance(value, tuple) else value
    return plain
