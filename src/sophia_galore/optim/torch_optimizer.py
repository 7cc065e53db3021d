"""The base of `GaLore`, `Apollo` and `Sophia`: a `torch.optim.Optimizer` for any training loop.

A step checks all gradients before any weight changes, and then calls `ParamOptimizer.step_param` for one parameter
after another. `GroupedOptimizer` knows how each is trained, and `TorchStates` keeps its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from sophia_galore.errors import StepError
from sophia_galore.optim import saved
from sophia_galore.optim.arguments import Group, check_settings
from sophia_galore.optim.gradients import (
    SampledGradients,
    in_vectors,
    refuse_non_finite,
    refuse_untrainable,
    refuse_valueless,
)
from sophia_galore.optim.groups import LIVE, GroupedOptimizer
from sophia_galore.optim.owners import note_owner
from sophia_galore.optim.recipes import CURVATURE_EVERY
from sophia_galore.optim.sharded_step import observe_sharded, step_sharded
from sophia_galore.optim.sharding import is_sharded
from sophia_galore.optim.torch_states import Entry, StateView

_KEPT_BY_COPIES = ("seed", "curvature_every", "_param_optimizer", "_states")


class TorchOptimizer(GroupedOptimizer):
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
        self.sampled = SampledGradients()
        self.end_attached_step: Callable[[], None] | None = None
        super().__init__(params, defaults, seed=seed, curvature_every=curvature_every)

    @property  # type: ignore[override]
    def state(self) -> MutableMapping[Tensor, Entry]:
        """What is kept of each parameter: tensors, which are live, and numbers by name, such as its "step"."""
        return StateView(lambda: ((name, param) for _, name, param in self.members()), self._states)

    @state.setter
    def state(self, state: Mapping[Tensor, Entry]) -> None:
        self._states.entries.clear()
        for param, entry in state.items():
            self.state[param] = entry

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
            sharded = []
            for group, name, param in self.members():
                if name not in grads:
                    continue
                if is_sharded(param):
                    sharded.append((group, name, param, grads[name]))
                else:
                    self.step_one(group, name, param, grads[name])
            self._step_sharded(sharded)
        self._note(num_steps=self.num_steps + 1)
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
            "state" and "param_groups", in torch's layout: tensors (not copies), numbers, strings, lists and dicts,
            which `torch.save` and `torch.load(weights_only=True)` restore exactly, and so does
            `torch.distributed.checkpoint`.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = saved.to_dict(self.param_groups, self._states.existing())
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state exactly. As in torch, this also sets the saved learning rates and weight decays.

        Args:
            state_dict: From `state_dict` of an optimizer with the same names, shapes and settings; also as
                `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` returns it.

        Raises:
            CheckpointError: It does not fit; nothing was changed.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        state = saved.read(state_dict, type(self).__name__, self.param_groups)
        fixed = self.defaults.keys() - LIVE
        saved.check(state, self._identity(), self.param_groups, self._param_optimizer.specs, fixed)
        # They depend on when parameters were added.
        self._states.places |= {name: entry["place"] for name, entry in state.entries.items() if "place" in entry}
        for group, old in zip(self.param_groups, state.groups, strict=True):
            self._route(group)
            group.update(saved.settings_of(old))
        for name, param in self.named_parameters().items():
            self._states.load(name, param, state.entries.get(name, {}))
        self.sampled = SampledGradients()
        self._note(num_steps=int(state.facts["num_steps"]), curvature_seen=bool(state.facts["curvature_seen"]))
        self.follow_settings()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return the attributes for copies and pickles, without hooks and without an attachment."""
        kept = {key: getattr(self, key) for key in _KEPT_BY_COPIES}
        return {"defaults": self.defaults, "param_groups": self.param_groups, **kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the attributes of a copy."""
        super().__setstate__(state)
        self.sampled, self.end_attached_step, self._is_made = SampledGradients(), None, True
        self._settings = [self._settings_of(group) for group in self.param_groups]

    def curvature_is_due(self) -> bool:
        """Return whether the curvature is to be estimated before the next step."""
        return self.num_steps % self.curvature_every == 0

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
            grad: Its gradient, dense and finite. If it is sharded, all processes step the same parameter.
        """
        if is_sharded(param):
            self._step_sharded([(group, name, param, grad)])
            return
        note_owner(name, param, self)
        weight, full = in_vectors(param.detach()), in_vectors(grad.float())
        with self._states.lend(name, param) as entry:
            step = int(entry["step"]) + 1
            self._param_optimizer.step_param(name, weight, full, step=step, factor=float(group["lr"]))
            entry["step"] = step

    def _step_sharded(self, chosen: list[tuple[Group, str, Tensor, Tensor]]) -> None:
        """Update sharded parameters: pairs of group, name, parameter and gradient, the same in all processes."""
        for _, name, param, _ in chosen:
            note_owner(name, param, self)
        items = {name: (param, grad, float(group["lr"])) for group, name, param, grad in chosen}
        step_sharded(self._param_optimizer, self._states, items)

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
        sharded = {name: grad for name, grad in grads.items() if is_sharded(params[name])}
        for name, grad in grads.items():
            if name in sharded:
                continue
            full = in_vectors(grad.float())
            with self._states.lend(name, params[name]) as entry:
                step = int(entry["step"]) + 1
                self._param_optimizer.observe_curvature(name, full, step=step, num_samples=num_samples)
        observe_sharded(
            self._param_optimizer,
            self._states,
            {name: (params[name], grad) for name, grad in sharded.items()},
            num_samples=num_samples,
        )
        self._note(curvature_seen=True)
