"""Routes: which parameter is trained by what, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sophia_galore.config import RunConfig
from sophia_galore.numerics.rules import AdamWHyper
from sophia_galore.numerics.subspace import Side, projection_side
from sophia_galore.optim.spec import ParamSpec, SubspaceSpec

# Peak rates where the user gives none; README, Measured, has what they reach.
DEFAULT_LEARNING_RATES: dict[str, float] = {"galore": 1.6e-3, "adamw": 2e-4}

_STATE_ELEMENT_BYTES = 4


@dataclass(frozen=True)
class Route:
    """What happens to one parameter.

    Args:
        spec: How it is stepped.
        format: Format in which its weight is stored.
        why: The reason for this route, in words.
    """

    spec: ParamSpec
    format: str
    why: str

    @property
    def rule(self) -> str:
        """Name of the rule: "galore" if the gradient is projected, else "adamw"."""
        return "adamw" if self.spec.subspace is None else "galore"

    @property
    def side(self) -> Side | None:
        """The side on which the gradient is projected, if it is."""
        return projection_side((self.spec.shape[0], self.spec.shape[1])) if self.spec.subspace else None

    @property
    def num_elements(self) -> int:
        """Elements of the parameter."""
        return _product(self.spec.shape)

    @property
    def projection_bytes(self) -> int:
        """Bytes of its basis."""
        return _STATE_ELEMENT_BYTES * sum(
            _product(shape) for name, shape in self.spec.state_shapes().items() if name == "basis"
        )

    @property
    def state_bytes(self) -> int:
        """Bytes of its optimizer state, the basis not included."""
        return _STATE_ELEMENT_BYTES * sum(
            _product(shape) for name, shape in self.spec.state_shapes().items() if name != "basis"
        )


def peak_learning_rate(config: RunConfig) -> float:
    """The peak rate that was asked for, or the optimizer's own default."""
    return config.training.learning_rate or DEFAULT_LEARNING_RATES[config.optimizer.type]


def dense_learning_rate(config: RunConfig) -> float:
    """The peak rate of parameters that are not projected."""
    if config.optimizer.type == "adamw":
        return peak_learning_rate(config)
    galore = config.optimizer.galore
    return galore.dense_learning_rate or peak_learning_rate(config) * galore.scale


def make_routes(config: RunConfig, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Route, ...]:
    """Route every parameter.

    Args:
        config: What was asked.
        shapes: Name and shape of each parameter, in the model's order.

    Returns:
        One route a parameter, in the same order.
    """
    galore = config.optimizer.galore
    projected = [
        name
        for name, shape in shapes.items()
        if config.optimizer.type == "galore" and len(shape) == 2 and min(shape) > galore.rank
    ]
    # The first refreshes are spread evenly over the gap; at step 1 every basis is made.
    offsets = {
        name: index * galore.update_proj_gap // len(projected) if galore.stagger else 0
        for index, name in enumerate(projected)
    }
    hyper = AdamWHyper(*config.optimizer.betas, config.optimizer.eps)
    routes: list[Route] = []
    for name, shape in shapes.items():
        subspace = None
        if name in offsets:
            subspace = SubspaceSpec(galore.rank, galore.update_proj_gap, offsets[name], galore.scale)
        spec = ParamSpec(
            name=name,
            shape=tuple(shape),
            learning_rate=dense_learning_rate(config) if subspace is None else peak_learning_rate(config),
            weight_decay=config.training.weight_decay if len(shape) > 1 else 0.0,
            hyper=hyper,
            subspace=subspace,
        )
        routes.append(Route(spec, config.model.store, _why(config, tuple(shape))))
    return tuple(routes)


def _why(config: RunConfig, shape: tuple[int, ...]) -> str:
    if config.optimizer.type == "adamw":
        return "optimizer.type is adamw"
    rank = config.optimizer.galore.rank
    if len(shape) != 2:
        return "norm or bias"
    if min(shape) <= rank:
        return f"a side <= rank {rank}"
    return f"projected, rank {rank}"


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
