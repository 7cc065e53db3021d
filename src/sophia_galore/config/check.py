"""Options that are valid alone but contradict each other.

An option that has no effect is refused, never ignored. Each case is a row of this table: condition, cause and remedy.
Text in braces is filled in from the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sophia_galore.config.paths import PLACEHOLDERS, unknown_placeholders
from sophia_galore.config.problems import Problem, raise_problems
from sophia_galore.config.schema import QuantizationConfig, RunConfig
from sophia_galore.config.size import bytes_in_words
from sophia_galore.optim.recipes import STORED_BASES


@dataclass(frozen=True)
class Rule:
    """One combination that is refused.

    Args:
        applies: Returns whether a configuration has this combination.
        keys: Its dotted keys; the message names the place of the first one that was given.
        cause: What is wrong.
        remedy: What to do.
    """

    applies: Callable[[RunConfig], bool]
    keys: tuple[str, ...]
    cause: str
    remedy: str


_KNOWN_PLACEHOLDERS = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
# Options that only native int8 weights have.
_NATIVE_KEYS = ("block_size", "skip", "rounding", "fold")


def _both_eval_sources(config: RunConfig) -> bool:
    # Only a fraction that the user wrote contradicts data.eval.
    given = config.data.model_fields_set
    return config.data.eval is not None and "eval_fraction" in given and config.data.eval_fraction > 0


def _measures_nothing(config: RunConfig) -> bool:
    return config.data.eval is None and config.data.eval_fraction == 0


def _is_galore(config: RunConfig) -> bool:
    # Other types ignore the galore section, so that `--optimizer adamw` works on the same file.
    return config.optimizer.type == "galore"


def _folds_late(config: RunConfig) -> bool:
    quantization = config.quantization
    return quantization.int8 and quantization.backend == "native" and quantization.fold == "refresh"


def _stores_bases(config: RunConfig) -> bool:
    return config.optimizer.galore.subspace in STORED_BASES


def _native_options(config: RunConfig) -> str:
    """Return the options of native int8 weights that differ from their defaults, as text."""
    given = {key: getattr(config.quantization, key) for key in _NATIVE_KEYS}
    default = QuantizationConfig()
    return ", ".join(f"quantization.{key}" for key, value in given.items() if value != getattr(default, key))


def _keeps_more_than_stay(config: RunConfig) -> bool:
    stay = config.memory.resident_layers
    if config.memory.placement not in ("host", "disk"):
        return False
    if not config.training.gradient_checkpointing:
        return True
    kept = config.engine.keep_layers
    return isinstance(kept, int) and isinstance(stay, int) and kept > stay


def keeps_projected_gradients(config: RunConfig) -> bool:
    """Return whether a step needs only the projected gradients, which are small enough to keep for all layers."""
    return config.optimizer.type == "galore" and config.optimizer.galore.residual == "none"


RULES: dict[str, Rule] = {
    "unknown_placeholder": Rule(
        lambda c: bool(unknown_placeholders(c.training.output_dir)),
        ("training.output_dir",),
        "training.output_dir: nothing is known to stand for {placeholders}",
        f"Known are {_KNOWN_PLACEHOLDERS}; a brace itself is written twice.",
    ),
    "all_layers_or_some": Rule(
        # Only a value that the user wrote contradicts.
        lambda c: not c.training.gradient_checkpointing and "keep_layers" in c.engine.model_fields_set,
        ("engine.keep_layers", "training.gradient_checkpointing"),
        "training.gradient_checkpointing: false keeps the graphs of all layers, but engine.keep_layers: "
        "{c.engine.keep_layers} says how many are kept",
        "Leave out training.gradient_checkpointing and let engine.keep_layers say it, or the other way round.",
    ),
    "int8_on_and_off": Rule(
        # The reverse is no contradiction: `enabled: false` switches int8 off.
        lambda c: c.quantization.int8 and c.quantization.load_in_8bit is False,
        ("quantization.enabled", "quantization.load_in_8bit"),
        "quantization.enabled: true asks for eight-bit weights, but quantization.load_in_8bit: false rules out the "
        "only kind there is",
        "For weights in eight bits leave out load_in_8bit; for none set enabled to false.",
    ),
    "shard_state_deferred": Rule(
        lambda c: c.distributed.shard_state and _folds_late(c),
        ("distributed.shard_state", "quantization.fold"),
        "distributed.shard_state: true leaves a state to its owner, but with quantization.fold: refresh every process "
        "needs the updates that are in it.",
        "Use quantization.fold: step, or distributed.shard_state: false.",
    ),
    "shard_state_streamed": Rule(
        lambda c: c.distributed.shard_state and c.memory.placement in ("host", "disk"),
        ("distributed.shard_state", "memory.placement"),
        "distributed.shard_state: true leaves a state to its owner, but with memory.placement: {c.memory.placement} "
        "every process has its own copy elsewhere.",
        "Use memory.placement: auto or device, or distributed.shard_state: false.",
    ),
    "fold_refresh": Rule(
        lambda c: _folds_late(c) and not (keeps_projected_gradients(c) and _stores_bases(c)),
        ("quantization.fold", "optimizer.type", "optimizer.galore.residual", "optimizer.galore.subspace"),
        "quantization.fold: refresh keeps updates in a stored subspace until the next refresh, which optimizer.type: "
        "{c.optimizer.type} (residual: {c.optimizer.galore.residual}, subspace: {c.optimizer.galore.subspace}) has not",
        "Use quantization.fold: step, or optimizer.type: galore with residual: none and subspace: tracked.",
    ),
    "native_only": Rule(
        lambda c: c.quantization.int8 and c.quantization.backend != "native" and _native_options(c) != "",
        ("quantization.backend", *(f"quantization.{key}" for key in _NATIVE_KEYS)),
        "quantization.backend: bitsandbytes holds its weights in a format of its own, frozen, so {native_options} "
        "would do nothing",
        "Leave that out, or use quantization.backend: native.",
    ),
    "betas": Rule(
        lambda c: not all(0 <= beta < 1 for beta in c.optimizer.betas or ()),
        ("optimizer.betas",),
        "optimizer.betas {c.optimizer.betas} must both be at least 0 and below 1: at 1 a moment never learns",
        "Use values such as [0.9, 0.999].",
    ),
    "adaptive_random": Rule(
        lambda c: _is_galore(c) and c.optimizer.galore.adaptive_gap and not _stores_bases(c),
        ("optimizer.galore.adaptive_gap", "optimizer.galore.subspace"),
        "optimizer.galore.adaptive_gap looks at how far a subspace turns, but subspace: random is drawn anew each time",
        "Set adaptive_gap to false, or take subspace: tracked.",
    ),
    "fast_residual": Rule(
        lambda c: _is_galore(c) and c.optimizer.galore.fast_path == "always" and c.optimizer.galore.residual != "none",
        ("optimizer.galore.fast_path", "optimizer.galore.residual"),
        "optimizer.galore.fast_path: always never forms the full gradient, but residual: {c.optimizer.galore.residual} "
        "is made of it",
        "Set fast_path to auto, or residual to none.",
    ),
    "fast_clipping": Rule(
        lambda c: _is_galore(c) and c.optimizer.galore.fast_path == "always" and c.training.max_grad_norm > 0,
        ("optimizer.galore.fast_path", "training.max_grad_norm"),
        "optimizer.galore.fast_path: always knows the gradient's norm only by an estimate, but training.max_grad_norm: "
        "{c.training.max_grad_norm:g} clips by the exact one",
        "Set fast_path to auto (which forms full gradients where clipping asks for it), or max_grad_norm to 0.",
    ),
    "clip_by_nothing": Rule(
        lambda c: c.training.clip_by != "auto" and not c.training.max_grad_norm,
        ("training.clip_by", "training.max_grad_norm"),
        "training.clip_by: {c.training.clip_by} says what training.max_grad_norm limits, but that is 0, which is off",
        "Set training.max_grad_norm, such as 1.0, or leave out training.clip_by.",
    ),
    "clip_by_model": Rule(
        lambda c: c.training.clip_by == "model" and c.training.max_grad_norm > 0 and not keeps_projected_gradients(c),
        ("training.clip_by", "optimizer.type", "optimizer.galore.residual"),
        "training.clip_by: model keeps all gradients until the norm over them is known, which this optimizer would do "
        "in full size (optimizer.type: {c.optimizer.type}, residual: {c.optimizer.galore.residual})",
        "Use training.clip_by: layer, or optimizer.type: galore with residual: none: projected gradients are small.",
    ),
    "warmup_fills_the_run": Rule(
        lambda c: 0 < c.training.max_steps <= c.training.warmup_steps,
        ("training.warmup_steps", "training.max_steps"),
        "training.warmup_steps ({c.training.warmup_steps}) is not below training.max_steps "
        "({c.training.max_steps}), so the learning rate would never get past its warm-up",
        "Lower training.warmup_steps or raise training.max_steps.",
    ),
    "constant_with_warmup": Rule(
        lambda c: c.training.lr_scheduler_type == "constant" and c.training.warmup_steps > 0,
        ("training.warmup_steps", "training.lr_scheduler_type"),
        "training.lr_scheduler_type: constant has no warm-up, but training.warmup_steps is {c.training.warmup_steps}",
        "Use lr_scheduler_type: constant_with_warmup, or set warmup_steps to 0.",
    ),
    "two_eval_sources": Rule(
        _both_eval_sources,
        ("data.eval_fraction", "data.eval"),
        "data.eval and data.eval_fraction ({c.data.eval_fraction}) are both given, but only one can supply the "
        "evaluation examples",
        "Remove data.eval_fraction to evaluate on data.eval, or data.eval to hold out a share of the training data.",
    ),
    "nothing_to_evaluate": Rule(
        lambda c: c.training.eval_every_steps > 0 and _measures_nothing(c),
        ("training.eval_every_steps", "data.eval_fraction"),
        "training.eval_every_steps is {c.training.eval_every_steps}, but there is nothing to evaluate on: data.eval is "
        "null and data.eval_fraction is 0",
        "Set data.eval or data.eval_fraction, or set training.eval_every_steps to 0.",
    ),
    "nothing_to_stop_by": Rule(
        lambda c: c.training.early_stopping_patience is not None and _measures_nothing(c),
        ("training.early_stopping_patience", "data.eval_fraction"),
        "training.early_stopping_patience looks at eval losses, but there is nothing to evaluate on: data.eval is null "
        "and data.eval_fraction is 0",
        "Set data.eval or data.eval_fraction, or leave out training.early_stopping_patience.",
    ),
    "threshold_alone": Rule(
        lambda c: c.training.early_stopping_threshold > 0 and c.training.early_stopping_patience is None,
        ("training.early_stopping_threshold", "training.early_stopping_patience"),
        "training.early_stopping_threshold ({c.training.early_stopping_threshold:g}) says what counts as an "
        "improvement, but without training.early_stopping_patience nothing looks at that",
        "Set training.early_stopping_patience, such as 3, or leave the threshold out.",
    ),
    "nothing_to_choose_by": Rule(
        lambda c: c.training.load_best_model and _measures_nothing(c),
        ("training.load_best_model", "data.eval_fraction"),
        "training.load_best_model takes the model with the lowest eval loss, but there is nothing to evaluate on: "
        "data.eval is null and data.eval_fraction is 0",
        "Set data.eval or data.eval_fraction, or leave out training.load_best_model.",
    ),
    "trains_nothing": Rule(
        lambda c: c.training.trainable == (),
        ("training.trainable",),
        "training.trainable is empty, so that no weight would be trained",
        'Name weights, such as ["model.layers.2*", "lm_head.weight"], or leave it out to train all.',
    ),
    "packed_and_grouped": Rule(
        lambda c: c.data.packing and c.data.group_by_length,
        ("data.group_by_length", "data.packing"),
        "data.packing fills rows with examples of all lengths, data.group_by_length puts those of one length together",
        "Leave out data.group_by_length: packed rows have next to no padding.",
    ),
    "resident_without_streaming": Rule(
        lambda c: c.memory.resident_layers != "auto" and c.memory.placement not in ("host", "disk"),
        ("memory.resident_layers", "memory.placement"),
        "memory.resident_layers: {c.memory.resident_layers} says which layers do not stream, but memory.placement is "
        "{c.memory.placement}",
        "Set memory.placement to host or disk, or leave out memory.resident_layers.",
    ),
    "keeps_what_streams": Rule(
        lambda c: _keeps_more_than_stay(c),
        ("memory.resident_layers", "engine.keep_layers", "training.gradient_checkpointing"),
        "memory.resident_layers: {c.memory.resident_layers} lets layers stream whose graphs are to be kept: a graph "
        "needs its layer's weights until backward",
        "Lower engine.keep_layers to that number at most (0: no graph is kept), or raise memory.resident_layers.",
    ),
    "adapts_what_waits": Rule(
        lambda c: c.memory.activations != "device" and c.memory.on_oom == "adapt",
        ("memory.activations", "memory.on_oom"),
        "memory.on_oom: adapt splits micro-batches again, but memory.activations: {c.memory.activations} has moved "
        "their layers' inputs elsewhere",
        "Use memory.on_oom: stop, or memory.activations: device.",
    ),
    "bitsandbytes_streams": Rule(
        lambda c: (
            c.memory.placement in ("host", "disk") and c.quantization.int8 and c.quantization.backend == "bitsandbytes"
        ),
        ("memory.placement", "quantization.backend"),
        "memory.placement: {c.memory.placement} moves layers, but bitsandbytes holds their weights in "
        "modules of its own",
        "Use quantization.backend: native, or memory.placement: device.",
    ),
    "reserve_takes_all": Rule(
        lambda c: c.memory.limit is not None and (c.memory.reserve or 0) >= c.memory.limit,
        ("memory.reserve", "memory.limit"),
        "memory.reserve ({reserve}) leaves nothing of memory.limit ({limit})",
        "Lower memory.reserve, or leave it out.",
    ),
}


def contradictions(config: RunConfig, where: Mapping[str, str] | None = None) -> list[Problem]:
    """Return every rule that a configuration breaks.

    Args:
        config: A configuration whose single values are valid.
        where: The place of each given key, by dotted key.
    """
    places = where or {}
    return [
        Problem(next((places[key] for key in rule.keys if key in places), ""), _filled(rule.cause, config), rule.remedy)
        for rule in RULES.values()
        if rule.applies(config)
    ]


def check(config: RunConfig) -> None:
    """Refuse a configuration built in Python for the same reasons as one from a file.

    Raises:
        ConfigError: Naming every contradiction.
    """
    raise_problems(contradictions(config))


def _filled(text: str, config: RunConfig) -> str:
    filled = text.format(
        c=config,
        placeholders=", ".join(f"{{{word}}}" for word in unknown_placeholders(config.training.output_dir)),
        native_options=_native_options(config),
        limit=bytes_in_words(config.memory.limit or 0),
        reserve=bytes_in_words(config.memory.reserve or 0),
    )
    # Truth values appear as YAML spells them.
    return filled.replace("True", "true").replace("False", "false")
