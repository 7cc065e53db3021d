"""Refuse to resume from a checkpoint if that would change the run's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.config.dump import flatten
from sophia_galore.config.schema import holds_int8
from sophia_galore.errors import CheckpointError
from sophia_galore.numerics.noise import NOISE
from sophia_galore.plan.plan import RunPlan
from sophia_galore.train.checkpoint import Checkpoint

# Keys from which the plan is made.
_DECISIVE = (
    "data.",
    "training.epochs",
    "training.max_steps",
    "training.learning_rate",
    "training.device",
    "training.compute_dtype",
    "training.clip_by",
    "training.trainable",
    "optimizer.",
)
# Keys that may differ after a resume: they change no number, or the plan made from them is compared.
_FREE = (
    *_DECISIVE,
    "model.source",
    "model.fallback",
    "model.cache_dir",
    "model.trust_remote_code",
    "training.output_dir",
    "training.early_stopping_",
    "training.eval_every_steps",
    "training.load_best_model",
    "training.logging_steps",
    "training.gradient_checkpointing",
    "training.probe_step",
    "training.report_to",
    "training.sample_",
    "checkpoint.",
    "distributed.overlap",
    "distributed.shard_state",
    "distributed.timeout_minutes",
    "export.",
    "engine.full_gradients",
    "engine.keep_layers",
    "memory.activations",
    "memory.host_limit",
    "memory.limit",
    "memory.on_oom",
    "memory.placement",
    "memory.predict",
    "memory.prefetch",
    "memory.reserve",
    "memory.resident_layers",
    "memory.track_steps",
)
_INT8_KEYS = ("quantization.enabled", "quantization.load_in_8bit")
# Schedules that do not depend on the number of steps, so that it may change.
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")


def refuse_difference(checkpoint: Checkpoint, config: RunConfig, plan: RunPlan) -> None:
    """Compare the configuration and plan with those of the checkpoint.

    Args:
        checkpoint: The checkpoint to resume from.
        config: The configuration now.
        plan: The plan now.

    Raises:
        CheckpointError: A difference would change numbers, or the checkpoint is past the last step.
    """
    if "clip_by" not in checkpoint.plan:
        raise CheckpointError(
            f"{checkpoint.folder} was made by version 0.1, whose optimizers kept another state.",
            f"Start anew from its weights: model.name={checkpoint.folder}.",
        )
    # Without int8 weights now, the other keys of the section have no effect; the routes show whether there were any.
    free = (*_FREE, *(_INT8_KEYS if config.quantization.int8 else ["quantization."]))
    now: dict[str, Any] = {key: value for key, value in flatten(config).items() if not key.startswith(free)}
    saved: dict[str, Any] = {key: checkpoint.config.get(key) for key in now}
    # Two keys with one combined meaning.
    now["quantization.int8"] = config.quantization.int8
    saved["quantization.int8"] = holds_int8(*(checkpoint.config.get(key) for key in _INT8_KEYS))
    for side in (now, saved):
        side["training.neftune_alpha"] = side.get("training.neftune_alpha") or None  # 0 is none as well
    # Sentences, and values that follow from the routes, which are compared.
    skip = {"notes", "verdicts", "bytes", "num_trained_parameters", "trained_fraction"}
    # They change no number.
    skip |= {"keep_layers", "full_gradients", "placements"}
    # Other rounding noise is reported, not refused: expectations stay the same.
    skip.add("noise")
    # How conversations are written was taken from the checkpoint, or shows in the fingerprint.
    skip |= {"chat_format", "num_shared", "num_bad", "repetition_loss", "repetition_share", "fill", "fill_shuffled"}
    if config.training.lr_scheduler_type in _ENDLESS:
        skip.add("num_steps")
    now |= {f"plan.{key}": value for key, value in plan.to_json().items() if key not in skip}
    saved |= {f"plan.{key}": value for key, value in checkpoint.plan.items() if key not in skip}
    # Checkpoints of version 0.5 lack these; it knew no other arrangement.
    saved = {"plan.arrangement": "shuffled", "plan.num_rows": checkpoint.plan["num_train_examples"]} | saved
    # The saved side came from JSON, where tuples are lists.
    now = json.loads(json.dumps(now))
    for side in (now, saved):
        side["plan.routes"] = [_without_words(route) for route in side["plan.routes"]]
    different = [key for key in now if now[key] != saved.get(key)]
    if different:
        key = different[0]
        change = f": {saved.get(key)} then, {now[key]} now"
        if key == "plan.routes":
            change = _first_change(saved[key], now[key])
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        causes = [] if not key.startswith("plan.") else _changed_settings(checkpoint, config)
        more += f" (changed: {', '.join(causes)})" if causes else ""
        raise CheckpointError(
            f"{checkpoint.folder} was made with another {_in_words(key)}{change}{more}; going on would change numbers.",
            "Resume with the configuration the run was started with (run_config.yaml in its folder), or start anew."
            + _way_to_convert(checkpoint, config, now, saved),
        )
    if checkpoint.step > plan.num_steps:
        raise CheckpointError(
            f"{checkpoint.folder} is at step {checkpoint.step}, the run would end at {plan.num_steps}.",
            "Raise training.max_steps or training.epochs.",
        )


def changed_noise(checkpoint: Checkpoint, plan: RunPlan) -> str | None:
    """Return a note if an older version started the run with other rounding noise; None if not.

    Args:
        checkpoint: The checkpoint to resume from.
        plan: The plan now.
    """
    if not plan.rounds or checkpoint.plan.get("noise") == NOISE:
        return None
    return (
        "This run was begun by an earlier version, which drew the noise of rounding in another way: it goes on with "
        "the same expectations, but not with the bits that it would have had."
    )


def _without_words(route: Mapping[str, Any]) -> dict[str, Any]:
    """Return a route without its explanations, whose wording may change; fill in keys that version 0.2 lacked."""
    done = {key: value for key, value in route.items() if key not in ("why", "because", "weight_bytes")}
    if done.get("subspace"):
        done["subspace"] = {"folds_late": False} | done["subspace"]
    return done


def _first_change(then: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """Describe the first difference between two lists of routes."""
    for old, new in zip(then, now, strict=False):
        if old["name"] != new["name"]:
            return f": {old['name']} then, {new['name']} now"
        for key in new:
            if old.get(key) == new[key]:
                continue
            # A section such as `subspace` by the entry that differs.
            if isinstance(old.get(key), dict) and isinstance(new[key], dict):
                inner = next(entry for entry in {**new[key], **old[key]} if old[key].get(entry) != new[key].get(entry))
                return f": {old['name']}, {key}.{inner}: {old[key].get(inner)} then, {new[key].get(inner)} now"
            return f": {old['name']}, {key}: {old.get(key)} then, {new[key]} now"
    return f": {len(then)} parameters then, {len(now)} now"


def _way_to_convert(checkpoint: Checkpoint, config: RunConfig, now: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """Say how to convert the checkpoint if only the format of the weights differs; "" if it can't be converted."""
    quantization = config.quantization
    then, wanted = ([route["format"] for route in side["plan.routes"]] for side in (saved, now))
    same = all(now[key] == saved.get(key) for key in ("quantization.block_size", "quantization.fold") if key in now)
    if then == wanted and same:
        return ""
    native = quantization.int8 and quantization.backend == "native"
    form = f"int8 --block-size {quantization.block_size}" if native else config.model.store
    command = f"sophia-galore export {checkpoint.folder} --to {form} --output FOLDER"
    if "bnb8" in then or "bnb8" in wanted:
        # What bitsandbytes holds is read from a folder of plain weights, and has no state to take along.
        return f" To train on in the other format, from step 0: {command}, then train with model.name=FOLDER."
    if native and (quantization.skip or quantization.fold != "step" or quantization.rounding != "stochastic"):
        return ""  # that is not what `export` writes
    return f" To go on in the other format: {command}, then with --resume=FOLDER and the settings that it prints."


def _changed_settings(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """Return the keys that changed, among those from which the plan is made."""
    now = json.loads(json.dumps(flatten(config)))
    return [key for key in now if key.startswith(_DECISIVE) and now[key] != checkpoint.config.get(key)]


def _in_words(key: str) -> str:
    return {
        "plan.data_fingerprint": "content of the training or evaluation data",
        "plan.routes": "routing of parameters (optimizer settings)",
        "plan.arrangement": "arrangement of the examples (data.packing, data.group_by_length)",
    }.get(key, key.removeprefix("plan."))
