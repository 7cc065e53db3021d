"""Parameter groups of the `torch.optim` classes, and the `ParamSpec` that each parameter gets from its group.

What concerns the whole optimizer, such as its seed, is in each group, since distributed checkpoints keep nothing but
groups and states. Subclasses define how each parameter is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from sophia_galore.errors import StepError
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim.arguments import Group, check_settings, plain, spec_of
from sophia_galore.optim.members import check_keys, param_shape, read_groups, read_pairs, refuse_doubles, refuse_nothing
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.spec import SubspaceSpec
from sophia_galore.optim.torch_states import TorchStates

Betas = tuple[float, float]

# Group settings that are computed from other settings.
_DERIVED = ("dense_ratio", "dense_betas")
LIVE = {"lr", "weight_decay", "betas", "eps", "rho", *_DERIVED}
"""Settings that may change between steps; all others determine the format of existing states."""
IDENTITY = ("optimizer", "seed", "curvature_every")
"""Keys of a group that describe the optimizer, and must be equal in a saved state."""
PROGRESS = ("num_steps", "curvature_seen")
"""Keys of a group that say how far the optimizer is."""


class GroupedOptimizer(torch.optim.Optimizer):
    """An optimizer that knows how each of its parameters is trained.

    Args:
        params: Pairs of name and parameter, or parameters alone, or groups of either.
        defaults: Default settings of the groups.
        seed: Seed of random bases, stochastic rounding and sampled labels.
        curvature_every: Steps between two estimates of the curvature, for the rule "sophia".

    Raises:
        ArgumentError: The parameters or a setting can't be used.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], *, seed: int, curvature_every: int) -> None:
        owner = type(self).__name__
        check_settings(owner, {"seed": seed, "curvature_every": curvature_every})
        self.seed = int(seed)
        self.curvature_every = int(curvature_every)
        self._settings: list[dict[str, Any]] = []
        self._param_optimizer = ParamOptimizer([], seed=seed)
        self._states = TorchStates(self._param_optimizer.specs, self._param_optimizer.states)
        self._is_made = False
        super().__init__([dict(group) for group in read_groups(owner, params)], defaults)
        refuse_nothing(owner, self.named_parameters())
        self._is_made = True
        self._join(self.param_groups)

    @property
    def num_steps(self) -> int:
        """Number of steps so far."""
        return int(self.param_groups[0]["num_steps"])

    @property
    def curvature_seen(self) -> bool:
        """Whether a curvature was observed."""
        return bool(self.param_groups[0]["curvature_seen"])

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, such as those of a layer that was frozen until now.

        Args:
            param_group: "params" (named if the existing ones are) and settings that differ from the defaults.

        Raises:
            ArgumentError: A parameter or a setting can't be used.
        """
        owner = type(self).__name__
        # The group may come from an existing GaLore, whose groups also hold derived settings.
        derived = (*IDENTITY, *PROGRESS, *(_DERIVED if "dense_lr" in self.defaults else ()))
        check_keys(owner, param_group, self.defaults, derived)
        group = {**self.defaults, **param_group}
        group["params"] = pairs = read_pairs(owner, group, list(self.named_parameters()))
        group["param_names"] = []  # torch sets them, except in an empty group
        # betas=None, the rule's defaults, is valid only here.
        check_settings(owner, {key: value for key, value in group.items() if key != "betas" or value is not None})
        group |= {key: plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        self._complete(group)
        refuse_doubles(owner, [*self.named_parameters().items(), *pairs])
        begun = self.param_groups[0] if self.param_groups else {"num_steps": 0, "curvature_seen": False}
        group |= {**self._identity(), **{key: begun[key] for key in PROGRESS}}
        super().add_param_group(group)
        if self._is_made:  # if not, torch's constructor is still adding groups
            self._join(self.param_groups[-1:])

    def curved_parameters(self) -> dict[str, Tensor]:
        """Return the parameters whose rule has a curvature, by name."""
        specs = self._param_optimizer.specs
        return {name: param for _, name, param in self.members() if specs[name].rule == "sophia"}

    def named_parameters(self) -> dict[str, Tensor]:
        """Return the parameters by name."""
        return {name: param for _, name, param in self.members()}

    def members(self) -> Iterator[tuple[Group, str, Tensor]]:
        """Yield each parameter, as its group, its name and itself."""
        for group in self.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                yield group, name, param

    def follow_settings(self) -> None:
        """Update the specs with settings that schedulers or users changed in the parameter groups.

        Raises:
            ArgumentError: A new value is invalid.
            StepError: A setting was changed on which existing states depend.
        """
        for index, group in enumerate(self.param_groups):
            settings, old = self._settings_of(group), self._settings[index]
            if settings == old:
                continue
            check_settings(type(self).__name__, settings)
            fixed = sorted(key for key in settings if settings[key] != old[key] and key not in LIVE)
            if fixed:
                raise StepError(
                    f"{fixed[0]} of a parameter group was changed from {old[fixed[0]]!r} to {settings[fixed[0]]!r}.",
                    f"Only {', '.join(sorted(LIVE))} may change; make a new optimizer for anything else.",
                )
            self._route(group)
            self._settings[index] = settings

    def _identity(self) -> dict[str, Any]:
        """Return the settings that must be equal in a saved state."""
        return {"optimizer": type(self).__name__, "seed": self.seed, "curvature_every": self.curvature_every}

    def _note(self, **progress: int | bool) -> None:
        """Write how far the optimizer is into its groups."""
        for group in self.param_groups:
            group.update(progress)

    def _complete(self, group: Group) -> None:
        """Set the derived settings of a group."""
        group["betas"] = group["betas"] or RULES[self._rule(group, is_projected=True)].betas

    def _is_projected(self, shape: tuple[int, ...], group: Group) -> bool:
        """Return whether the gradients of a parameter are projected."""
        return False

    def _subspace(self, shape: tuple[int, ...], group: Group, place: float) -> SubspaceSpec:
        """Return how a parameter's gradients are projected; `place` in [0, 1) spreads the refreshes over the gap."""
        raise NotImplementedError

    def _rule(self, group: Group, is_projected: bool) -> str:
        """Return the name of a parameter's update rule."""
        return "adamw"

    def _join(self, groups: list[Group]) -> None:
        """Make specs for the parameters of new groups; spread their refreshes over the gap."""
        matrices = [
            name
            for group in groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
            if self._is_projected(param_shape(param), group)
        ]
        self._states.places |= {name: index / len(matrices) for index, name in enumerate(matrices)}
        for group in groups:
            self._route(group)
            self._settings.append(self._settings_of(group))

    def _route(self, group: Group) -> None:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            shape = param_shape(param)
            place = self._states.places.get(name)
            subspace = None if place is None else self._subspace(shape, group, place)
            rule = self._rule(group, is_projected=subspace is not None)
            self._param_optimizer.specs[name] = spec_of(name, shape, group, rule, subspace)

    def _settings_of(self, group: Group) -> dict[str, Any]:
        """Return the settings of a group on which its specs depend."""
        return {key: group[key] for key in (*self.defaults, *_DERIVED) if key in group and key != "lr"}
