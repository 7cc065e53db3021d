"""`RunPlan`: what will be done. After it, nothing decides.

`check` prints it, `train` carries it out, a checkpoint keeps it, and resuming compares it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sophia_galore.config import RunConfig
from sophia_galore.config.check import keeps_projected_gradients
from sophia_galore.data.batches import windows
from sophia_galore.data.dataset import Dataset
from sophia_galore.errors import ConfigError
from sophia_galore.model.source import ResolvedModel
from sophia_galore.plan.route import Route
from sophia_galore.plan.routes import dense_learning_rate, make_routes, peak_learning_rate, settled_optimizer

# Clipping by the model keeps what steps need of the gradients; beyond this share it would be the gradients themselves.
_LARGEST_KEPT_SHARE = 0.5


@dataclass(frozen=True)
class RunPlan:
    """What will be done.

    Args:
        model_name: The model that is trained.
        model_folder: Where its files are.
        model_source: Where they came from.
        device: Where the arithmetic runs.
        compute_dtype: Precision of the arithmetic.
        optimizer: The optimizer's name.
        learning_rate: Peak rate of projected parameters (of all, without projection).
        dense_learning_rate: Peak rate of the others.
        clip_by: What gradients are clipped by: the norm over the model, over each layer, or nothing.
        curvature_every: Steps between two estimates of the curvature; 0: no rule needs it.
        num_train_examples: Examples that are learned from.
        num_eval_examples: Examples that are measured on.
        data_fingerprint: SHA-256 over all token ids and masks.
        steps_per_epoch: Optimizer steps in a pass over the data.
        num_steps: Optimizer steps of the run.
        routes: One a parameter.
        notes: What the user should know, in sentences.
    """

    model_name: str
    model_folder: str
    model_source: str
    device: str
    compute_dtype: str
    optimizer: str
    learning_rate: float
    dense_learning_rate: float
    clip_by: Literal["nothing", "model", "layer"]
    curvature_every: int
    num_train_examples: int
    num_eval_examples: int
    data_fingerprint: str
    steps_per_epoch: int
    num_steps: int
    routes: tuple[Route, ...]
    notes: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters; a tied head counts once."""
        return sum(route.num_elements for route in self.routes)

    @property
    def num_trained_parameters(self) -> int:
        """Elements of those that are trained."""
        return sum(route.num_elements for route in self.routes if route.trained)

    @property
    def trained_fraction(self) -> float:
        """Share of the elements that are trained, from 0 to 1."""
        return self.num_trained_parameters / self.num_parameters

    @property
    def ledger(self) -> dict[str, int]:
        """Bytes that stay for the whole run, by category."""
        return {
            "weights": sum(route.weight_bytes for route in self.routes),
            "optimizer state": sum(route.state_bytes for route in self.routes),
            "projections": sum(route.projection_bytes for route in self.routes),
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data, for `plan.json`."""
        plain = {key: value for key, value in vars(self).items() if key not in ("routes", "notes")}
        return {
            **plain,
            "num_parameters": self.num_parameters,
            "num_trained_parameters": self.num_trained_parameters,
            "trained_fraction": self.trained_fraction,
            "bytes": self.ledger,
            "notes": list(self.notes),
            "routes": [route.to_json() for route in self.routes],
        }


def make_plan(
    config: RunConfig,
    *,
    model: ResolvedModel,
    model_config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    head_name: str,
    linears: Collection[str] = (),
    dataset: Dataset,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> RunPlan:
    """Decide everything that is left to decide.

    Args:
        config: What was asked.
        model: Where the model is.
        model_config: Its Hugging Face configuration.
        shapes: Name and shape of each parameter.
        head_name: Which of them is the head's weight.
        linears: Which of them are the weights of the layers' linear maps.
        dataset: The tokenised data.
        device: Where the arithmetic runs.
        compute_dtype: Its precision.

    Returns:
        The plan.

    Raises:
        ConfigError: Model, data and configuration do not fit together.
    """
    training = config.training
    _refuse_misfits(config, model_config, dataset.largest_token)
    steps_per_epoch = windows(len(dataset.train), training.batch_size, training.gradient_accumulation_steps)
    num_steps = training.max_steps or math.ceil(round(training.epochs * steps_per_epoch, 6))
    if training.warmup_steps >= num_steps:
        raise ConfigError(
            f"training.warmup_steps is {training.warmup_steps}, but the run has only {num_steps} steps.",
            "Lower training.warmup_steps, or train for longer.",
        )
    routes = make_routes(config, shapes, head_name, linears)
    clip_by = _clip_by(config, routes)
    return RunPlan(
        model_name=model.name,
        model_folder=str(model.folder),
        model_source=model.source,
        device=str(device),
        compute_dtype=str(compute_dtype).removeprefix("torch."),
        optimizer=settled_optimizer(config),
        learning_rate=peak_learning_rate(config),
        dense_learning_rate=dense_learning_rate(config),
        clip_by=clip_by,
        curvature_every=(
            config.optimizer.sophia.curvature_every
            if any(route.spec and route.spec.rule == "sophia" for route in routes)
            else 0
        ),
        num_train_examples=len(dataset.train),
        num_eval_examples=len(dataset.eval),
        data_fingerprint=dataset.fingerprint,
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
        routes=routes,
        notes=tuple(_notes(config, model, device, compute_dtype, clip_by, routes)),
    )


def _refuse_misfits(config: RunConfig, model_config: Any, largest_token: int) -> None:
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and config.training.max_length > positions:
        raise ConfigError(
            f"training.max_length is {config.training.max_length}, but the model knows {positions} positions.",
            f"Use training.max_length={positions} or less.",
        )
    # Not the size of the tokenizer: Gemma 3's has a token for images that its text models lack.
    if largest_token >= model_config.vocab_size:
        raise ConfigError(
            f"The data hold token {largest_token}, but the model's embedding only {model_config.vocab_size} rows.",
            "Use the tokenizer that belongs to the model.",
        )


def _clip_by(config: RunConfig, routes: tuple[Route, ...]) -> Literal["nothing", "model", "layer"]:
    """What to clip by; by the model where what has to be kept until its norm is known is small."""
    if not config.training.max_grad_norm:
        return "nothing"
    if config.training.clip_by == "layer" or not keeps_projected_gradients(config):
        return "layer"
    # Frozen parameters have no gradient.
    specs = [route.spec for route in routes if route.spec]
    kept = sum(math.prod(spec.held_shape) for spec in specs)
    total = sum(math.prod(spec.shape) for spec in specs)
    if kept <= _LARGEST_KEPT_SHARE * total:
        return "model"
    if config.training.clip_by == "auto":
        return "layer"
    raise ConfigError(
        f"training.clip_by: model would keep {kept / total:.0%} of all gradients until their norm is known: at rank "
        f"{config.optimizer.galore.rank} too few of them are projected.",
        "Lower optimizer.galore.rank, or use training.clip_by=layer.",
    )


def _notes(
    config: RunConfig,
    model: ResolvedModel,
    device: torch.device,
    compute_dtype: torch.dtype,
    clip_by: str,
    routes: tuple[Route, ...],
) -> list[str]:
    notes: list[str] = []
    if model.used_fallback:
        notes.append(f"No source could be reached for {config.model.name}: {model.name} is trained instead.")
    if clip_by == "model":
        notes.append(
            f"The gradient over the whole model is clipped to {config.training.max_grad_norm:g}: projected gradients "
            "are kept until its norm is known, and full gradients are formed to know it exactly."
        )
    if clip_by == "layer":
        notes.append(
            f"Each layer's gradient is clipped to {config.training.max_grad_norm:g} by itself: "
            "the layers step before the norm over all of them is known."
        )
    if config.optimizer.galore.fast_path == "always" and not any(
        route.spec and route.spec.subspace and route.spec.subspace.fast for route in routes
    ):
        notes.append("No matrix is large enough for optimizer.galore.fast_path at this rank: gradients are formed.")
    if device.type == "cpu" and compute_dtype != torch.float32:
        notes.append(f"{compute_dtype} arithmetic is slow on a CPU; training.compute_dtype=fp32 is faster.")
    return notes
