"""Whether a run may go on from a checkpoint: not if that would change its numbers."""

from __future__ import annotations

import json
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.config.dump import flatten
from sophia_galore.errors import CheckpointError
from sophia_galore.plan.plan import RunPlan
from sophia_galore.train.checkpoint import Checkpoint

# Keys that may differ: they change no number, or the plan that results from them is compared itself.
_FREE = (
    "model.source",
    "model.fallback",
    "model.cache_dir",
    "model.trust_remote_code",
    "data.",
    "training.output_dir",
    "training.epochs",
    "training.max_steps",
    "training.learning_rate",
    "training.device",
    "training.compute_dtype",
    "training.eval_every_steps",
    "training.logging_steps",
    "training.clip_by",
    "training.probe_step",
    "training.sample_",
    "optimizer.",
    "checkpoint.",
    "export.",
    "memory.track_steps",
)
# Those of them that a plan is made from.
_DECISIVE = (
    "data.",
    "training.epochs",
    "training.max_steps",
    "training.learning_rate",
    "training.device",
    "training.compute_dtype",
    "training.clip_by",
    "optimizer.",
)
# A schedule that does not look at the end of the run lets the end be moved.
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")


def refuse_difference(checkpoint: Checkpoint, config: RunConfig, plan: RunPlan) -> None:
    """Compare what is planned now with what the checkpoint's run had planned.

    Args:
        checkpoint: Where the run would go on from.
        config: What was asked now.
        plan: What would be done now.

    Raises:
        CheckpointError: They differ in something that changes numbers, or the checkpoint is past the end.
    """
    if "clip_by" not in checkpoint.plan:
        raise CheckpointError(
            f"{checkpoint.folder} was made by version 0.1, whose optimizers kept another state.",
            f"Start anew from its weights: model.name={checkpoint.folder}.",
        )
    now: dict[str, Any] = {key: value for key, value in flatten(config).items() if not key.startswith(_FREE)}
    saved = {key: checkpoint.config.get(key) for key in now}
    # The bytes follow from the routes, which say more.
    skip = {"notes", "bytes"} | ({"num_steps"} if config.training.lr_scheduler_type in _ENDLESS else set())
    now |= {f"plan.{key}": value for key, value in plan.to_json().items() if key not in skip}
    saved |= {f"plan.{key}": value for key, value in checkpoint.plan.items() if key not in skip}
    # Through JSON, as the saved side went: tuples became lists.
    now = json.loads(json.dumps(now))
    different = [key for key in now if now[key] != saved.get(key)]
    if different:
        key = different[0]
        change = "" if key == "plan.routes" else f": {saved.get(key)} then, {now[key]} now"
        more = f" (and {len(different) - 1} more)" if len(different) > 1 else ""
        causes = [] if not key.startswith("plan.") else _changed_settings(checkpoint, config)
        more += f" (changed: {', '.join(causes)})" if causes else ""
        raise CheckpointError(
            f"{checkpoint.folder} was made with another {_in_words(key)}{change}{more}; going on would change numbers.",
            "Resume with the configuration the run was started with (run_config.yaml in its folder), or start anew.",
        )
    if checkpoint.step > plan.num_steps:
        raise CheckpointError(
            f"{checkpoint.folder} is at step {checkpoint.step}, the run would end at {plan.num_steps}.",
            "Raise training.max_steps or training.epochs.",
        )


def _changed_settings(checkpoint: Checkpoint, config: RunConfig) -> list[str]:
    """The keys that may differ and do, of those that a plan is made from."""
    now = json.loads(json.dumps(flatten(config)))
    return [key for key in now if key.startswith(_DECISIVE) and now[key] != checkpoint.config.get(key)]


def _in_words(key: str) -> str:
    return {
        "plan.data_fingerprint": "content of the training or evaluation data",
        "plan.routes": "routing of parameters (optimizer settings)",
    }.get(key, key.removeprefix("plan."))
