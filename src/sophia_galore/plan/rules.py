"""The table of verdicts on a run: what is used with a word of caution, what falls back to something else, and what is
refused.

Every such decision that takes more than the configuration is a row here, or a row in `parameters.py` if it is about
one parameter. Options that contradict each other whatever the model, the data and the machine are, have a table of
their own, in `config/check.py`, which speaks before anything is looked for. Whether a checkpoint may go on is for
`train/resume.py`, which compares two plans.
"""

from __future__ import annotations

import torch

from sophia_galore.errors import EnvironmentProblem, ModelError
from sophia_galore.optim.recipes import PROJECTING, OptimizerName
from sophia_galore.plan.facts import Facts
from sophia_galore.plan.verdicts import FallBack, Refuse, Rule, Use, settled
from sophia_galore.weights.plain import DTYPES


def compute_dtype(facts: Facts) -> torch.dtype:
    """The precision of the arithmetic: as asked, or the one that the device is good at.

    float32 on a CPU; bfloat16 on GPUs that have it in hardware; float16, with scaled gradients, on the others.
    """
    asked = facts.config.training.compute_dtype
    if asked == "auto":
        return DTYPES[settled(RULES, "compute_dtype", facts) or ("fp32" if facts.device.is_cpu else "bf16")]
    return DTYPES[asked]


def optimizer(facts: Facts) -> OptimizerName:
    """The optimizer that was asked for, or the one that can be had."""
    return "adamw" if settled(RULES, "optimizer", facts) == "adamw" else facts.config.optimizer.type


def _asks_for_outsized_clipping(facts: Facts) -> bool:
    asked = facts.clips and facts.config.training.clip_by == "model"
    return asked and facts.routes is not None and not facts.may_clip_by_model


def _exceeds_vocabulary(token: int, facts: Facts) -> bool:
    return facts.model.vocab_size is not None and token >= facts.model.vocab_size


def _exceeds_evaluations(facts: Facts) -> bool:
    patience, found = facts.config.training.early_stopping_patience, facts.data.num_evaluations
    # The last evaluation is at the end of the run, which can't come earlier by that.
    return patience is not None and found is not None and 0 < found <= patience


def _never_projects(facts: Facts) -> bool:
    return facts.routes is not None and not facts.routes.num_projected and optimizer(facts) in PROJECTING


def _never_fast(facts: Facts) -> bool:
    return (
        facts.config.optimizer.galore.fast_path == "always"
        and optimizer(facts) == "galore"
        and facts.routes is not None
        and facts.routes.num_projected > 0
        and not facts.routes.num_fast
    )


_MACHINE: tuple[Rule, ...] = (
    Rule(
        "bf16_emulated",
        lambda f: f.config.training.compute_dtype == "auto" and f.emulates_bf16,
        FallBack("compute_dtype", "fp16"),
        "{f.device.name}{f.capability} has no bfloat16 arithmetic, PyTorch would only emulate it: fp16 is used.",
    ),
    Rule(
        "bf16_refused",
        lambda f: f.config.training.compute_dtype == "bf16" and f.emulates_bf16,
        Refuse(EnvironmentProblem),
        "{f.device.name} has no bfloat16 arithmetic{f.capability}.",
        "Use training.compute_dtype=auto.",
    ),
    Rule(
        "fp16_scaled",
        lambda f: compute_dtype(f) == torch.float16,
        Use(),
        "In fp16 arithmetic small gradients would be lost and large ones overflow: what flows back is scaled, each "
        "layer by a factor of its own, and nothing is stored in fp16.",
    ),
    Rule(
        "slow_on_cpu",
        lambda f: f.device.is_cpu and compute_dtype(f) != torch.float32,
        Use(),
        "{f.config.training.compute_dtype} arithmetic is slower than fp32 on a CPU.",
        "Use training.compute_dtype=fp32.",
    ),
    Rule(
        "bitsandbytes_missing",
        lambda f: f.freezes_layers and f.bitsandbytes is not None and f.bitsandbytes.version is None,
        Refuse(EnvironmentProblem),
        "quantization.backend is bitsandbytes, which is not installed.",
        'Install it with: pip install "sophia-galore[bitsandbytes]", or use quantization.backend=native, which trains '
        "all weights and needs no package.",
    ),
    Rule(
        "bitsandbytes_broken",
        lambda f: f.freezes_layers and f.bitsandbytes is not None and bool(f.bitsandbytes.problem),
        Refuse(EnvironmentProblem),
        "bitsandbytes {f.bitsandbytes.version} does not work on {f.device.name}: {f.bitsandbytes.problem}.",
        'Install one that does (pip install -U "sophia-galore[bitsandbytes]"; python -m bitsandbytes says what it '
        "lacks), or use quantization.backend=native.",
    ),
    Rule(
        "tracker_missing",
        lambda f: bool(f.missing_trackers),
        Refuse(EnvironmentProblem),
        "training.report_to asks for what is not installed: {f.missing_extras}.",
        'Install it with: pip install "sophia-galore[{f.missing_extras}]", or leave it out of training.report_to.',
    ),
)

_MODEL: tuple[Rule, ...] = (
    Rule(
        "another_model",
        lambda f: f.model.instead_of != "",
        FallBack("model", "{f.model.name}"),
        "No source could be reached for {f.model.instead_of}: {f.model.name} is trained instead.",
    ),
    Rule(
        "positions",
        lambda f: f.model.positions is not None and f.config.training.max_length > f.model.positions,
        Refuse(),
        "training.max_length is {f.config.training.max_length}, but the model knows {f.model.positions} positions.",
        "Use training.max_length={f.model.positions} or less.",
    ),
    Rule(
        "not_proven",
        lambda f: f.proof is not None and f.proof.problem != "",
        Refuse(ModelError),
        "{f.proof.problem}",
        "Take a model of another architecture, or report this one.",
    ),
    Rule(
        "packing_not_proven",
        lambda f: f.proof is not None and f.config.data.packing and f.proof.packing_problem != "",
        Refuse(),
        "data.packing is not possible with this {f.model.model_type} model: {f.proof.packing_problem}",
        "Use data.packing=false.",
    ),
    Rule(
        "proven",
        lambda f: f.proof is not None and f.proof.problem == "",
        Use(),
        "The architecture {f.model.model_type} was compared with autograd on a small twin of {f.proof.num_layers} "
        "layers: the gradient that differs most is that of {f.proof.parameter}, by {f.proof.difference:.1e} of its "
        "size.",
    ),
    Rule(
        "skip_unmatched",
        lambda f: f.unmatched_skip is not None,
        Refuse(),
        "quantization.skip: '{f.unmatched_skip}' matches no weight of this model.",
        "Weights have names such as {f.parameters[0].name}; * stands for anything.",
    ),
    Rule(
        "trainable_unmatched",
        lambda f: f.unmatched_trainable is not None,
        Refuse(),
        "training.trainable: '{f.unmatched_trainable}' matches no weight of this model.",
        "{f.nearest_trainable}Weights have names such as {f.parameters[0].name}; * stands for anything, as in "
        "model.layers.0.*.",
    ),
    Rule(
        "trainable_held",
        lambda f: f.held_trainable is not None,
        Refuse(),
        "training.trainable: '{f.held_trainable}' matches only weights that bitsandbytes holds in eight bits, which "
        "can't be trained.",
        "Leave it out, or use quantization.backend=native.",
    ),
)

_DATA: tuple[Rule, ...] = (
    Rule(
        "token_outside_the_vocabulary",
        lambda f: _exceeds_vocabulary(f.data.largest_token, f),
        Refuse(),
        "The data hold token {f.data.largest_token}, but the model's embedding only {f.model.vocab_size} rows.",
        "Use the tokenizer that belongs to the model.",
    ),
    # Gemma 3's tokenizer, for one, has a token for images that its text models lack.
    Rule(
        "tokenizer_outside_the_vocabulary",
        lambda f: _exceeds_vocabulary(f.data.largest_known, f) and not _exceeds_vocabulary(f.data.largest_token, f),
        Use(),
        "The tokenizer knows tokens up to {f.data.largest_known}, the model's embedding has {f.model.vocab_size} rows: "
        "the data use none of the others.",
    ),
    Rule(
        "nothing_to_group",
        lambda f: f.config.data.group_by_length and f.config.training.batch_size == 1,
        Use(),
        "training.batch_size is 1, so nothing is padded, and data.group_by_length only changes the order of examples.",
        "Raise training.batch_size, or use data.packing=true, which computes short examples together.",
    ),
    Rule(
        "warm_up",
        lambda f: 0 < f.data.num_steps <= f.config.training.warmup_steps,
        Refuse(),
        "training.warmup_steps is {f.config.training.warmup_steps}, but the run has only {f.data.num_steps} steps.",
        "Lower training.warmup_steps, or train for longer.",
    ),
    Rule(
        "nothing_measured",
        lambda f: f.data.num_evaluations == 0 and f.looks_at_eval_losses,
        Refuse(),
        "training.early_stopping_patience and training.load_best_model look at eval losses, but the data leave no "
        "example to evaluate on.",
        "Set data.eval, or give more data.",
    ),
    Rule(
        "patience_too_long",
        lambda f: _exceeds_evaluations(f),
        Use(),
        "training.early_stopping_patience is {f.config.training.early_stopping_patience}, but the run has only "
        "{f.data.num_evaluations} evaluation(s) after a step, the last one at its end: it can't end early.",
        "Lower it, or evaluate more often (training.eval_every_steps).",
    ),
    Rule(
        "one_to_choose",
        lambda f: f.config.training.load_best_model and f.data.num_evaluations == 1,
        Use(),
        "training.load_best_model has nothing to choose from: the only evaluation after a step is at the end of the "
        "run.",
        "Evaluate more often (training.eval_every_steps).",
    ),
)

_TRAINING: tuple[Rule, ...] = (
    Rule(
        "more_processes_than_micro_batches",
        lambda f: f.num_processes > f.config.training.gradient_accumulation_steps,
        Refuse(),
        "There are {f.num_processes} processes, but only {f.config.training.gradient_accumulation_steps} micro-batches "
        "in a step to deal out.",
        "Raise training.gradient_accumulation_steps to {f.num_processes} or more, and lower training.batch_size to "
        "keep the effective batch; or start fewer processes.",
    ),
    Rule(
        "order_of_sums",
        lambda f: f.num_processes > 1 and f.config.distributed.sum_blocks == 1 and f.config.optimizer.type == "galore",
        Use(),
        "Each number of processes sums gradients in an order of its own, so that GaLore's losses may be up to 1 % from "
        "those of one process.",
        "distributed.sum_blocks=2, 4, ... gives so many processes and one the same bits, for some memory.",
    ),
    Rule(
        "more_blocks_than_micro_batches",
        lambda f: f.config.distributed.sum_blocks > f.config.training.gradient_accumulation_steps,
        Refuse(),
        "distributed.sum_blocks={f.config.distributed.sum_blocks} divides the micro-batches of a step, but there are "
        "only {f.config.training.gradient_accumulation_steps}.",
        "Lower it, or raise training.gradient_accumulation_steps and lower training.batch_size.",
    ),
    Rule(
        "blocks_of_several_processes",
        lambda f: f.config.distributed.sum_blocks > 1 and f.config.distributed.sum_blocks % f.num_processes != 0,
        Refuse(),
        "distributed.sum_blocks={f.config.distributed.sum_blocks} can't be dealt out to {f.num_processes} processes.",
        "Start as many processes, or a half or a quarter of that; or use distributed.sum_blocks=1, which gives each "
        "number of processes its own bits.",
    ),
    Rule(
        "frozen_layers",
        lambda f: f.freezes_layers and f.config.optimizer.type == "adamw",
        Use(),
        "bitsandbytes holds the layers' matrices in eight bits that can't be written to: they are frozen, AdamW trains "
        "the rest.",
        "quantization.backend=native trains all weights.",
    ),
    Rule(
        "frozen_for_the_optimizer",
        lambda f: f.freezes_layers and f.config.optimizer.type != "adamw",
        FallBack("optimizer", "adamw"),
        "The matrices that optimizer.type={f.config.optimizer.type} is for are held by bitsandbytes in eight bits that "
        "can't be written to: they are frozen, AdamW trains the rest.",
        "quantization.backend=native trains all weights.",
    ),
    Rule(
        "rounded_to_nearest",
        lambda f: f.has_native_int8 and f.config.quantization.rounding == "nearest",
        Use(),
        "quantization.rounding: nearest loses every step that is smaller than half of the distance of two codes.",
        "Use quantization.rounding=stochastic, unless that is what you want to see.",
    ),
    Rule(
        "nothing_projected",
        _never_projects,
        FallBack("projection", "adamw"),
        "No matrix {f.in_question}has both sides above the rank of optimizer.type={f.config.optimizer.type}: AdamW "
        "trains everything.",
        "Lower the rank.",
    ),
    Rule(
        "nothing_folded",
        lambda f: f.folds_late and f.routes is not None and not f.routes.num_folded,
        FallBack("fold", "step"),
        "No weight in eight bits has a projected gradient, so quantization.fold: refresh has nothing to keep: every "
        "step is written at once.",
        "Lower the rank, or leave out quantization.fold.",
    ),
    Rule(
        "nothing_fast",
        _never_fast,
        FallBack("fast_path", "full gradients"),
        "No matrix is large enough for optimizer.galore.fast_path at this rank: gradients are formed.",
    ),
    Rule(
        "clip_outsized",
        _asks_for_outsized_clipping,
        Refuse(),
        "training.clip_by: model would keep {f.routes.kept_share:.0%} of all gradients until their norm is known: too "
        "few of them are projected.",
        "Lower optimizer.galore.rank, or use training.clip_by=layer.",
    ),
    Rule(
        "clip_by_layer_as_asked",
        lambda f: f.clips and f.config.training.clip_by == "layer",
        Use("clip_by", "layer"),
        "Each layer's gradient is clipped to {f.config.training.max_grad_norm:g} by itself: the layers step before the "
        "norm over all of them is known.",
    ),
    Rule(
        "clip_by_layer",
        lambda f: f.clips and f.config.training.clip_by == "auto" and not f.may_clip_by_model,
        FallBack("clip_by", "layer"),
        "Each layer's gradient is clipped to {f.config.training.max_grad_norm:g} by itself: the layers step before the "
        "norm over all of them is known, and too few gradients are projected for keeping them until then.",
    ),
    Rule(
        "clip_by_model",
        lambda f: f.clips and f.config.training.clip_by != "layer" and f.may_clip_by_model,
        Use("clip_by", "model"),
        "The gradient over the whole model is clipped to {f.config.training.max_grad_norm:g}: projected gradients are "
        "kept until its norm is known, and full gradients are formed to know it exactly.",
    ),
)

_MEMORY: tuple[Rule, ...] = (
    Rule(
        "streams",
        lambda f: f.streamed != "",
        Use(),
        "{f.streamed}.",
    ),
    Rule(
        "host_too_small",
        lambda f: f.host_excess != "",
        Refuse(EnvironmentProblem),
        "What memory.placement: host keeps in host memory is {f.host_excess} more than memory.host_limit, or more than "
        "this machine has to spare.",
        "Raise memory.host_limit, store less (quantization.enabled=true, optimizer.state_bits=8), or use "
        "memory.placement=disk.",
    ),
    # SSDs of 250 GB to 1 TB are commonly rated for 150 to 600 TB.
    Rule(
        "wears_the_disk",
        lambda f: f.disk_writes != "",
        Use(),
        "Each step writes {f.disk_writes} to disk, which wears it: SSDs of 250 GB to 1 TB are commonly rated for 150 "
        "to 600 TB.",
        "A larger effective batch takes fewer steps; memory.placement=host writes nothing.",
    ),
    Rule(
        "full_gradients_apart",
        lambda f: f.forms_apart_by_itself,
        Use(),
        "The full gradients of a layer are not expected to fit together, so engine.full_gradients: auto forms them one "
        "matrix after the other: a layer goes backward several times where it makes new bases or takes the exact norm.",
    ),
    # Words of caution and no refusals: the probe step has the last word, since it measures.
    Rule(
        "does_not_fit",
        lambda f: f.excess_bytes > 0 and f.config.memory.on_oom == "stop",
        Use(),
        "This run is expected to need {f.needed} for tensors, {f.excess} more than there is, so that it would stop in "
        "the probe step.",
        "sophia-galore plan --fit finds settings that fit.",
    ),
    Rule(
        "does_not_fit_yet",
        lambda f: f.excess_bytes > 0 and f.config.memory.on_oom == "adapt",
        Use(),
        "This run is expected to need {f.needed} for tensors, {f.excess} more than there is: memory.on_oom: adapt will "
        "make micro-batches smaller, if that is enough.",
        "sophia-galore plan --fit finds settings that fit.",
    ),
)

RULES: tuple[Rule, ...] = (*_MACHINE, *_MODEL, *_DATA, *_TRAINING, *_MEMORY)
"""All of them, in the order in which they are shown."""
