"""Check the settings of the `torch.optim` classes, and turn them into specs."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_type_hints

from torch import Tensor

from sophia_galore.errors import ArgumentError
from sophia_galore.numerics.hyper import Hyper
from sophia_galore.optim import recipes
from sophia_galore.optim.build import settled_bits, settled_decay
from sophia_galore.optim.recipes import LARGEST, MOST, SMALLEST_EPS
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec

Group = dict[str, Any]
"""A parameter group of torch: settings by name, and the parameters under "params"."""


def _is_real(value: object) -> bool:
    if isinstance(value, Tensor):
        return value.numel() == 1 and math.isfinite(value.item())
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_betas(value: object) -> bool:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    return all(_is_real(beta) and 0 <= beta < 1 for beta in value)


def _one_of(*values: object) -> tuple[Callable[[Any], bool], str]:
    return (lambda given: given in values and not isinstance(given, bool)), f"one of {', '.join(map(repr, values))}"


_AT_LEAST_0 = (lambda value: _is_real(value) and 0 <= value <= LARGEST, "a number from 0 to 1e9")
_ABOVE_0 = (lambda value: _is_real(value) and 0 < value <= LARGEST, "a number above 0, at most 1e9")
_ABOVE_0_OR_NONE = (lambda value: value is None or _ABOVE_0[0](value), _ABOVE_0[1])
_COUNT = (lambda value: _is_whole(value) and 1 <= value <= MOST, "a whole number from 1 to 1e9")
_BETAS = (_is_betas, "two numbers that are at least 0 and below 1")
_SWITCH = (lambda value: isinstance(value, bool), "True or False")


def _check_of(kind: Any) -> tuple[Callable[[Any], bool], str]:
    """Return the check for a setting's type, and a description of valid values."""
    if values := get_args(kind):
        return _one_of(*values)
    return {bool: _SWITCH, int: _COUNT, float: _ABOVE_0}[kind]


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "lr": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
    "betas": _BETAS,
    "dense_betas": _BETAS,
    "eps": (lambda value: _is_real(value) and SMALLEST_EPS <= value <= LARGEST, "a number from 1e-30 to 1e9"),
    "rho": _ABOVE_0,
    **{name: _check_of(kind) for name, kind in get_type_hints(recipes.GaLoreSettings).items()},
    "scale": _ABOVE_0_OR_NONE,
    "mini": _SWITCH,
    "state_bits": _one_of(*get_args(recipes.StateBits)),
    "dense_lr": _ABOVE_0_OR_NONE,
    "dense_ratio": _ABOVE_0,
    "curvature_every": _COUNT,
    "num_samples": _COUNT,
    "seed": (lambda value: _is_whole(value) and 0 <= value < recipes.NUM_SEEDS, "a whole number in [0, 2**63)"),
    "max_grad_norm": _AT_LEAST_0,
}


def check_settings(owner: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings with invalid values.

    Args:
        owner: Name of the class or function that has the settings, for the message.
        settings: Values by name; unknown names are ignored.

    Raises:
        ArgumentError: A value is invalid; the message names the first one.
    """
    for key, (is_right, wanted) in _CHECKS.items():
        # Only Apollo has a default scale.
        missing = key == "scale" and settings.get(key, 1) is None and owner != "Apollo"
        if missing or (key in settings and not is_right(settings[key])):
            raise ArgumentError(f"{owner} got {key}={settings[key]!r}.", f"Give {key} as {wanted}.")
    if settings.get("adaptive_gap") and settings["subspace"] not in recipes.STORED_BASES:
        raise ArgumentError(
            f"{owner}: adaptive_gap looks at how far a subspace turns, but subspace='random' is drawn anew each time.",
            "Set adaptive_gap=False or subspace='tracked'.",
        )


def plain(value: Any) -> Any:
    """Convert NumPy numbers in a setting to Python numbers, since `torch.load(weights_only=True)` refuses them.

    Args:
        value: A number, a list or tuple of numbers, or anything else, which is returned unchanged.
    """
    if isinstance(value, (tuple, list)):
        return tuple(plain(one) for one in value)
    if isinstance(value, (bool, Tensor)) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def dense_ratio(lr: float, dense_lr: float | None, scale: float, rule: str) -> float:
    """Return the factor on `lr` for parameters that are not projected.

    Args:
        lr: Initial learning rate of the group.
        dense_lr: Initial learning rate of its parameters that are not projected; None: `lr * scale`.
        scale: GaLore's scale.
        rule: GaLore's rule.

    Raises:
        ArgumentError: `lr` is 0 and `dense_lr` is not, so there is no such factor.
    """
    dense_lr = recipes.fixed_dense_rate(rule, dense_lr)
    if dense_lr is None:
        return scale
    if not lr:
        raise ArgumentError(f"dense_lr={dense_lr} can't be kept in proportion to lr=0.", "Give the peak rate as lr.")
    return dense_lr / lr


def spec_of(name: str, shape: tuple[int, ...], group: Group, rule: str, subspace: SubspaceSpec | None) -> ParamSpec:
    """Return the spec of a parameter, from the settings of its group.

    Args:
        name: Its name.
        shape: Its shape.
        group: The group, with checked and completed settings.
        rule: Name of the update rule.
        subspace: How its gradient is projected; None: it is not.
    """
    beta1, beta2 = group["betas" if subspace or "dense_betas" not in group else "dense_betas"]
    return ParamSpec(
        name=name,
        shape=shape,
        learning_rate=1.0 if subspace else group.get("dense_ratio", 1.0),
        weight_decay=settled_decay(shape, group["weight_decay"]),
        hyper=Hyper(beta1, beta2, group["eps"], group.get("rho", Hyper.rho)),
        rule=rule,
        state_bits=settled_bits(shape, group["state_bits"]),
        subspace=subspace,
    )
