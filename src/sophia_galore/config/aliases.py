"""Argument names of Hugging Face's Trainer as aliases of our keys.

They may stand at the top level or inside `training:`. A name without a counterpart here is refused as unknown, never
ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sophia_galore.config.keys import keys
from sophia_galore.config.problems import Given, Problem, show


@dataclass(frozen=True)
class Alias:
    """Another name for a key.

    Args:
        target: Our dotted key.
        values: Our value for each of theirs; other values pass unchanged.
        closed: Refuse a value that is not in `values`.
    """

    target: str
    values: Mapping[object, object] = field(default_factory=dict)
    closed: bool = False


@dataclass(frozen=True)
class Denied:
    """The value of a flag such as `bf16: false`: it only rules one value out."""

    value: object


def _flag(value: str) -> Alias:
    return Alias("training.compute_dtype", {True: value, False: Denied(value)}, closed=True)


_OPTIMIZERS: dict[object, object] = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "galore": "galore",
    "galore_adamw": "galore",
    "galore_adamw_layerwise": "galore",
    "sophia": "sophia",
    "apollo": "apollo",
    "apollo_adamw": "apollo",
    "apollo_adamw_layerwise": "apollo",
    "apollo_mini": "apollo_mini",
    "scale": "scale",
}

ALIASES: dict[str, Alias] = {
    "model_name_or_path": Alias("model.name"),
    "trust_remote_code": Alias("model.trust_remote_code"),
    "train_file": Alias("data.train"),
    "validation_file": Alias("data.eval"),
    "max_train_samples": Alias("data.max_train_examples"),
    "max_eval_samples": Alias("data.max_eval_examples"),
    "packing": Alias("data.packing"),
    "group_by_length": Alias("data.group_by_length"),
    "train_sampling_strategy": Alias("data.group_by_length", {"random": False, "group_by_length": True}, closed=True),
    "output_dir": Alias("training.output_dir"),
    "seed": Alias("training.seed"),
    "num_train_epochs": Alias("training.epochs"),
    "max_steps": Alias("training.max_steps", {-1: 0}),  # -1 is their "off", and their default
    "per_device_train_batch_size": Alias("training.batch_size"),
    "gradient_accumulation_steps": Alias("training.gradient_accumulation_steps"),
    "learning_rate": Alias("training.learning_rate"),
    "lr_scheduler_type": Alias("training.lr_scheduler_type"),
    "warmup_steps": Alias("training.warmup_steps"),
    "weight_decay": Alias("training.weight_decay"),
    "max_grad_norm": Alias("training.max_grad_norm"),
    "gradient_checkpointing": Alias("training.gradient_checkpointing"),
    "max_seq_length": Alias("training.max_length"),
    "max_length": Alias("training.max_length"),
    "cutoff_len": Alias("training.max_length"),
    "bf16": _flag("bf16"),
    "fp16": _flag("fp16"),
    "fp32": _flag("fp32"),
    "logging_steps": Alias("training.logging_steps"),
    "report_to": Alias("training.report_to"),
    "eval_steps": Alias("training.eval_every_steps"),
    "save_steps": Alias("checkpoint.save_every_steps"),
    "save_total_limit": Alias("checkpoint.keep_last"),
    "optim": Alias("optimizer.type", _OPTIMIZERS, closed=True),
    "adam_epsilon": Alias("optimizer.eps"),
    "load_in_8bit": Alias("quantization.load_in_8bit"),
    "early_stopping_patience": Alias("training.early_stopping_patience"),
    "early_stopping_threshold": Alias("training.early_stopping_threshold"),
    "load_best_model_at_end": Alias("training.load_best_model"),
    "neftune_noise_alpha": Alias("training.neftune_alpha"),
    "unfrozen_parameters": Alias("training.trainable"),
}

# Arguments of which only one value is supported, which is what a run does anyway; others are refused.
_FIXED: dict[str, tuple[tuple[object, ...], str]] = {
    "metric_for_best_model": (("eval_loss", "loss"), "Evaluations measure the loss, and nothing else."),
    "greater_is_better": ((False,), "The best eval loss is the lowest one."),
}


def alias_of(name: str) -> Alias | None:
    """Return the alias of a written name; None for our own keys and for unknown names."""
    if name in keys():
        return None
    return ALIASES.get(name.removeprefix("training."))


def translate(given: Given) -> Given | Problem | None:
    """Translate a given value to our own key and value.

    Args:
        given: As written; our own keys and unknown names come back unchanged.

    Returns:
        The value for the target key (`Denied` for a flag that is false), or the problem with it; None: a run always
        does that.
    """
    if (word := given.key.removeprefix("training.")) in _FIXED:
        values, why = _FIXED[word]
        if any(_is(given.value, value) for value in values):
            return None
        accepted = " or ".join(show(value) for value in values)
        return Problem(given.where, f"{given.written} takes {accepted} only; got {show(given.value)}", why)
    alias = alias_of(given.key)
    if alias is None:
        return given
    for theirs, ours in alias.values.items():
        if _is(given.value, theirs):
            return replace(given, key=alias.target, value=ours)
    if alias.closed:
        accepted = ", ".join(show(value).strip('"') for value in alias.values)
        cause = f"{given.written} takes one of {accepted}; got {show(given.value)}"
        return Problem(given.where, cause, f"Write one of these, or set {alias.target} itself.")
    return replace(given, key=alias.target)


def _is(given: object, value: object) -> bool:
    """Return whether two values are equal; as in a configuration, `1` is not `true`."""
    return type(given) is type(value) and given == value
