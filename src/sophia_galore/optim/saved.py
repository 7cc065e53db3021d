"""The `state_dict` of the `torch.optim` classes: exact, in torch's own layout, from plain values and tensors only.

Its two parts are `state`, by the number of the parameter, and `param_groups`. Distributed checkpoints keep nothing
else, so what concerns the whole optimizer, such as its seed, is in each group. In a checkpoint that was made by
`torch.distributed.checkpoint.state_dict`, a parameter's number is replaced by its name in the model.

Up to version 0.5, a state was by the optimizer's own names, with other parts beside it; such files are still read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from torch import Tensor

from sophia_galore.errors import CheckpointError
from sophia_galore.optim.arguments import Group
from sophia_galore.optim.arguments import plain as to_plain
from sophia_galore.optim.groups import IDENTITY, PROGRESS
from sophia_galore.optim.spec import ParamSpec
from sophia_galore.optim.torch_states import Entry, from_entry, to_entry

_OLD_FORMAT = 1
_OLD_KEYS = {"format", *IDENTITY, *PROGRESS, "places", "state", "shapes", "param_groups"}
# The members of a group are compared, but not loaded.
_MEMBERS = {"params", "param_names"}
_ALIKE = "Make the optimizer with the model and the settings that the state was saved with."
_NAMES = (
    "Make the optimizer as the saved one was made: with names or without, in the same order. torch.compile and DDP "
    "put '_orig_mod.' and 'module.' before names: give the parameters of the model inside."
)


@dataclass(frozen=True)
class Saved:
    """A saved state, whatever its layout.

    Args:
        facts: What concerns the whole optimizer, by the keys of `IDENTITY` and `PROGRESS`.
        groups: The saved groups.
        entries: What was kept of each parameter, by the optimizer's names.
        shapes: Shapes of the parameters by name, if they were saved.
    """

    facts: Mapping[str, Any]
    groups: Sequence[Group]
    entries: Mapping[str, Entry]
    shapes: Mapping[str, Sequence[int]]


def to_dict(groups: Iterable[Group], entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return an optimizer's `state_dict`.

    Args:
        groups: Its parameter groups.
        entries: What it keeps of each parameter, by name.

    Returns:
        Tensors, numbers, strings, lists and dicts; the tensors are not copies.
    """
    state: dict[int, Entry] = {}
    plain_groups = []
    position = 0
    for group in groups:
        names = group["param_names"]
        plain_groups.append({**_plain(group), "params": list(range(position, position + len(names)))})
        state |= {position + index: dict(entries[name]) for index, name in enumerate(names) if entries.get(name)}
        position += len(names)
    return {"state": state, "param_groups": plain_groups}


def read(state_dict: Any, optimizer: str, groups: Sequence[Group]) -> Saved:
    """Read a saved state.

    Args:
        state_dict: From `to_dict`, also by way of a distributed checkpoint; or from an older version.
        optimizer: Name of the optimizer that loads it.
        groups: Its groups: as in torch, saved parameters are matched with its own by position.

    Raises:
        CheckpointError: This is something else.
    """
    given = state_dict if isinstance(state_dict, Mapping) else {}
    if given.get("format") == _OLD_FORMAT and given.keys() >= _OLD_KEYS:
        return _read_old(given)
    saved_groups = given.get("param_groups") or [{}]
    if "state" not in given or not saved_groups[0].keys() >= {*IDENTITY, *PROGRESS}:
        raise CheckpointError(
            f"This is no state_dict of a {optimizer} of sophia_galore.",
            "Load what state_dict() of the same optimizer gave; other optimizers' moments can't be taken over.",
        )
    names: dict[Any, str] = {}
    for group, saved_group in zip(groups, saved_groups, strict=False):
        names |= zip(saved_group.get("params", []), group["param_names"], strict=False)
    # What belongs to no parameter of the optimizer keeps a name that tells so.
    entries = {names.get(key, f"parameter {key!r}"): entry for key, entry in given["state"].items()}
    facts = {key: saved_groups[0][key] for key in (*IDENTITY, *PROGRESS)}
    return Saved(facts, saved_groups, entries, {})


def _read_old(state_dict: Mapping[str, Any]) -> Saved:
    entries: dict[str, Entry] = {name: {"place": place} for name, place in state_dict["places"].items()}
    for name, entry in state_dict["state"].items():
        entries.setdefault(name, {}).update({"step": entry["step"], **to_entry(entry["tensors"])})
    facts = {key: state_dict[key] for key in (*IDENTITY, *PROGRESS)}
    return Saved(facts, state_dict["param_groups"], entries, state_dict["shapes"])


def settings_of(saved_group: Mapping[str, Any]) -> Group:
    """Return the settings of a saved group, with tuples instead of lists."""
    settings = {key: value for key, value in saved_group.items() if key not in _MEMBERS}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def check(
    saved: Saved,
    identity: Mapping[str, Any],
    groups: Sequence[Group],
    specs: Mapping[str, ParamSpec],
    fixed_settings: Iterable[str],
) -> None:
    """Refuse a saved state that does not fit an optimizer.

    Args:
        saved: The saved state.
        identity: The facts that must be equal.
        groups: Parameter groups of the optimizer that loads the state.
        specs: Its parameters.
        fixed_settings: Names of the group settings that must be equal.

    Raises:
        CheckpointError: They differ; the message names the first difference.
    """
    for key, own in identity.items():
        _refuse_difference(key, saved.facts[key], own)
    _refuse_difference("number of groups", len(saved.groups), len(groups))
    for group, saved_group in zip(groups, saved.groups, strict=True):
        # The order of parameters must be equal too: it spreads the refreshes over the gap.
        for saved_name, name in zip_longest(saved_group.get("param_names", []), group["param_names"]):
            _refuse_difference("the name of a parameter", saved_name, name, _NAMES)
        for key in sorted(fixed_settings):
            _refuse_difference(key, saved_group.get(key), group[key])
    for name, spec in specs.items() if saved.shapes else ():
        _refuse_difference(f"the shape of {name}", list(saved.shapes.get(name, [])), list(spec.shape))
    for name, entry in saved.entries.items():
        for odd, found, wanted in _differences(specs.get(name), entry):
            _refuse_difference(f"the state {odd} of {name}", found, wanted)


def _differences(spec: ParamSpec | None, entry: Entry) -> Iterator[tuple[str, Any, Any]]:
    """Yield what differs between a saved entry and a parameter's state: key, saved and own shape and dtype."""
    wanted = spec.state_tensors() if spec is not None and "step" in entry else {}
    found = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in from_entry(entry).items()}
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            yield key, found.get(key), wanted.get(key)


def _refuse_difference(what: str, saved: object, own: object, remedy: str = _ALIKE) -> None:
    if saved != own:
        raise CheckpointError(
            f"The saved optimizer state does not fit: {what} was {saved!r} and is {own!r}.",
            remedy,
        )


def _plain(group: Group) -> dict[str, Any]:
    """Return a group without its parameters, with lists instead of tuples, numbers instead of tensors."""
    plain: dict[str, Any] = {}
    for key, value in group.items():
        if key == "params":
            continue
        value = to_plain(value.item() if isinstance(value, Tensor) else value)  # schedulers write into groups
        plain[key] = list(value) if isinstance(value, (tuple, list)) else value
    return plain
