"""The base of `GaLore`, `Apollo` and `Sophia`: a `torch.optim.Optimizer` for any training loop.

It updates the `ParamSpec` of each parameter when its parameter group changes. A step checks all gradients before any
weight changes, and then calls `ParamOptimizer.step_param` for one parameter after the other. States are kept by name.
Subclasses define how each parameter is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sophia_galore.errors import StepError
from sophia_galore.numerics.rules import RULES
from sophia_galore.optim import saved
from sophia_galore.optim.arguments import Group, check_settings, plain, spec_of
from sophia_galore.optim.gradients import (
    SampledGradients,
    in_vectors,
    refuse_non_finite,
    refuse_untrainable,
    refuse_valueless,
)
from sophia_galore.optim.members import check_keys, param_shape, read_groups, read_pairs, refuse_doubles, refuse_nothing
from sophia_galore.optim.optimizer import ParamOptimizer
from sophia_galore.optim.owners import note_owner
from sophia_galore.optim.recipes import CURVATURE_EVERY
from sophia_galore.optim.spec import SubspaceSpec

Betas = tuple[float, float]

# Group settings that are computed from other settings.
_DERIVED = ("dense_ratio", "dense_betas")
# Settings that may change between steps; all others determine the format of existing states.
_LIVE = {"lr", "weight_decay", "betas", "eps", "rho", *_DERIVED}
_KEPT_BY_COPIES = ("seed", "curvature_every", "num_steps", "curvature_seen", "_param_optimizer", "_steps", "places")


class TorchOptimizer(torch.optim.Optimizer):
    """The base class of the `torch.optim` classes of this package.

    Args:
        params: Pairs of name and parameter, or parameters alone, or groups of either.
        defaults: Default settings of the groups.
        seed: Seed of random bases, stochastic rounding and sampled labels.
        curvature_every: Steps between two estimates of the curvature, for the rule "sophia".

    Raises:
        ArgumentError: The parameters or a setting can't be used.
    """

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], *, seed: int, curvature_every: int = CURVATURE_EVERY
    ) -> None:
        owner = type(self).__name__
        check_settings(owner, {"seed": seed, "curvature_every": curvature_every})
        self.seed = int(seed)
        self.curvature_every = int(curvature_every)
        self.num_steps = 0
        self.curvature_seen = False
        self.sampled = SampledGradients()
        self.end_attached_step: Callable[[], None] | None = None
        self._settings: list[dict[str, Any]] = []
        self._steps: dict[str, int] = {}
        self.places: dict[str, float] = {}
        super().__init__([dict(group) for group in read_groups(owner, params)], defaults)
        refuse_nothing(owner, self.named_parameters())
        self._param_optimizer = ParamOptimizer([], seed=seed)
        self._join(self.param_groups)

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters, such as those of a layer that was frozen until now.

        Args:
            param_group: "params" (named if the existing ones are) and settings that differ from the defaults.

        Raises:
            ArgumentError: A parameter or a setting can't be used.
        """
        owner = type(self).__name__
        # The group may come from an existing GaLore, whose groups also hold derived settings.
        check_keys(owner, param_group, {*self.defaults, *(_DERIVED if "dense_lr" in self.defaults else ())})
        group = {**self.defaults, **param_group}
        group["params"] = pairs = read_pairs(owner, group, list(self.named_parameters()))
        group["param_names"] = []  # torch sets them, except in an empty group
        # betas=None, the rule's defaults, is valid only here.
        check_settings(owner, {key: value for key, value in group.items() if key != "betas" or value is not None})
        group |= {key: plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        self._complete(group)
        refuse_doubles(owner, [*self.named_parameters().items(), *pairs])
        super().add_param_group(group)
        if "_param_optimizer" in self.__dict__:  # if not, torch's constructor is still adding groups
            self._join(self.param_groups[-1:])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; the others and their states do not change.

        All gradients are checked before any weight changes. If the updates are done in backward (`attach`), this only
        ends the step.

        Args:
            closure: Computes the loss and its gradients.

        Returns:
            The closure's result, or None.

        Raises:
            NonFiniteError: A gradient holds a NaN or an infinity; no weight and no state was changed.
            StepError: A parameter or its gradient is unsuitable; no weight and no state was changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.follow_settings()
        if self.end_attached_step is not None:
            self.end_attached_step()
        else:
            grads = self._gradients()
            refuse_non_finite(grads.items(), self.num_steps + 1)
            self._take_curvature(grads)
            for group, name, param in self.members():
                if name in grads:
                    self.step_one(group, name, param, grads[name])
        self.num_steps += 1
        return loss

    def observe_curvature(self, num_samples: int) -> None:
        """Estimate the curvature from the gradients in `.grad`, and clear them; no weight changes.

        The manual form of `watch`: draw labels from the model's softmax, call backward on the mean cross-entropy with
        these labels, call this method, and then train as usual.

        Args:
            num_samples: Number of labels in that mean.

        Raises:
            ArgumentError: `num_samples` is not a positive whole number.
            NonFiniteError: A gradient holds a NaN or an infinity; no state was changed.
            StepError: There is no gradient, or one that can't be used.
        """
        check_settings("observe_curvature", {"num_samples": num_samples})
        self.follow_settings()
        wanted = self.curved_parameters()
        grads = {name: grad for name, grad in self._gradients().items() if name in wanted}
        if not grads:
            raise StepError(
                "No parameter with the rule 'sophia' has a gradient to take the curvature from.",
                "Call backward on the loss with sampled labels first.",
            )
        refuse_non_finite(grads.items(), self.num_steps + 1)
        self._observe(grads, num_samples)
        self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return everything that later steps depend on.

        Returns:
            Tensors (not copies), numbers, strings, lists and dicts, which `torch.save` and
            `torch.load(weights_only=True)` restore exactly.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        progress = {"curvature_seen": self.curvature_seen, "num_steps": self.num_steps, "places": dict(self.places)}
        state = saved.to_dict({**self._identity(), **progress}, self.param_groups, self._param_optimizer, self._steps)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state exactly. As in torch, this also sets the saved learning rates and weight decays.

        Args:
            state_dict: From `state_dict` of an optimizer with the same names, shapes and settings.

        Raises:
            CheckpointError: It does not fit; nothing was changed.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        fixed = self.defaults.keys() - _LIVE
        saved.check(state_dict, self._identity(), self.param_groups, self._param_optimizer.specs, fixed)
        self.places = dict(state_dict["places"])  # they depend on when parameters were added
        for group in self.param_groups:
            self._route(group)
        self._param_optimizer, self._steps = saved.restore(
            state_dict, self._param_optimizer.specs, self.named_parameters(), self.seed
        )
        self.sampled = SampledGradients()
        for group, old in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved.settings_of(old))
        self.num_steps = int(state_dict["num_steps"])
        self.curvature_seen = bool(state_dict["curvature_seen"])
        self.follow_settings()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles, without hooks and without an attachment."""
        return {**super().__getstate__(), **{key: getattr(self, key) for key in _KEPT_BY_COPIES}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the attributes of a copy."""
        super().__setstate__(state)
        self.sampled, self.end_attached_step = SampledGradients(), None
        self._settings = [self._settings_of(group) for group in self.param_groups]

    def curvature_is_due(self) -> bool:
        """Return whether the curvature is to be estimated before the next step."""
        return self.num_steps % self.curvature_every == 0

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
            fixed = sorted(key for key in settings if settings[key] != old[key] and key not in _LIVE)
            if fixed:
                raise StepError(
                    f"{fixed[0]} of a parameter group was changed from {old[fixed[0]]!r} to {settings[fixed[0]]!r}.",
                    f"Only {', '.join(sorted(_LIVE))} may change; make a new optimizer for anything else.",
                )
            self._route(group)
            self._settings[index] = settings

    def check(self, name: str, param: Tensor) -> None:
        """Raise `StepError` if the dtype, shape or gradient of a parameter is unsuitable."""
        refuse_untrainable(name, param, self._param_optimizer.specs[name].shape)

    @torch.no_grad()
    def step_one(self, group: Group, name: str, param: Tensor, grad: Tensor) -> None:
        """Update one parameter.

        Args:
            group: Its group.
            name: Its name.
            param: The parameter.
            grad: Its gradient, dense and finite.
        """
        note_owner(name, param, self)
        self._param_optimizer.states.place(name, param.device)
        step = self._steps.get(name, 0) + 1
        weight, full = in_vectors(param.detach()), in_vectors(grad.float())
        self._param_optimizer.step_param(name, weight, full, step=step, factor=float(group["lr"]))
        self._steps[name] = step

    def _identity(self) -> dict[str, Any]:
        """Return the settings that must be equal in a saved state."""
        return {"optimizer": type(self).__name__, "seed": self.seed, "curvature_every": self.curvature_every}

    def _gradients(self) -> dict[str, Tensor]:
        """Return the existing gradients by name, without those of empty parameters."""
        grads = {}
        for name, param in self.named_parameters().items():
            refuse_valueless(name, param)
            if param.grad is not None and param.numel():
                self.check(name, param)
                grads[name] = param.grad
        return grads

    def _take_curvature(self, grads: Mapping[str, Tensor]) -> None:
        """Update the curvature from new gradients for sampled labels; refuse a first step without a curvature."""
        if self.sampled.count:
            sampled, count = self.sampled.take()
            refuse_non_finite(sampled.items(), self.num_steps + 1)
            self._observe(sampled, count)
        if not self.curvature_seen and any(self._param_optimizer.specs[name].rule == "sophia" for name in grads):
            raise StepError(
                "Sophia divides by a curvature, but none was observed before this first step.",
                "Call sophia_galore.watch(optimizer, model) before training, or optimizer.observe_curvature(...) after "
                "a backward on labels that were sampled from the model.",
            )

    @torch.no_grad()
    def _observe(self, grads: Mapping[str, Tensor], num_samples: int) -> None:
        params = self.named_parameters()
        for name, grad in grads.items():
            self._param_optimizer.states.place(name, params[name].device)
            step = self._steps.get(name, 0) + 1
            self._param_optimizer.observe_curvature(name, in_vectors(grad.float()), step=step, num_samples=num_samples)
        self.curvature_seen = True

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
        self.places |= {name: index / len(matrices) for index, name in enumerate(matrices)}
        for group in groups:
            self._route(group)
            self._settings.append(self._settings_of(group))

    def _route(self, group: Group) -> None:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            shape = param_shape(param)
            place = self.places.get(name)
            subspace = None if place is None else self._subspace(shape, group, place)
            rule = self._rule(group, is_projected=subspace is not None)
            self._param_optimizer.specs[name] = spec_of(name, shape, group, rule, subspace)

    def _settings_of(self, group: Group) -> dict[str, Any]:
        """Return the settings of a group on which its specs depend."""
        return {key: group[key] for key in (*self.defaults, *_DERIVED) if key in group and key != "lr"}
