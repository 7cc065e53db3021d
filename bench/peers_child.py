"""One task of `peers.py`, in a process of its own: reads what to do from a JSON file and writes what came of it.

    python bench/peers_child.py TASK.json RESULT.json

A side that fails is a result too: {"failed": what it said}.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

from measured import Measured, reason, weights_sha256
from peers_sides import SIDES, Work, run_config

# Until here the first refreshes of all bases are over, AdamW has its state, and so do all others.
TRACKED_STEPS = 3
RESUMED_STEPS = 4


def run(task: dict[str, Any], work: Work, **more: Any) -> Measured:
    """Train one side as the task says."""
    side, output = SIDES[task["side"]], Path(task["output"])
    resume_from = Path(task["resume_from"]) if task.get("resume_from") else None
    config = run_config(
        side, work, rate=task["rate"], output=output, one_micro_batch=task.get("one_micro_batch", False), **more
    )
    if side.is_ours:
        from ours import run_ours

        return run_ours(config, resume_from=resume_from)
    from hf_trainer import run_trainer

    options, tracked = side.trainer_options, config.memory.track_steps > 0
    return run_trainer(config, options, resume_from=resume_from, tracked=tracked)


def timing(task: dict[str, Any], work: Work) -> dict[str, Any]:
    """All steps, timed; the model stays in the folder."""
    return run(task, work).to_json()


def memory(task: dict[str, Any], work: Work) -> dict[str, Any]:
    """The first steps, followed by the storage tracker."""
    measured = run(task, work, steps=TRACKED_STEPS, track_steps=TRACKED_STEPS)
    return {"peak_tracked_bytes": measured.peak_tracked_bytes}


def saving(task: dict[str, Any], work: Work) -> dict[str, Any]:
    """A few steps with checkpoints half-way and at the end, from the start or from a checkpoint."""
    run(task, work, steps=RESUMED_STEPS, save_every=RESUMED_STEPS // 2)
    return {"sha256": weights_sha256(Path(task["output"]) / f"checkpoint-{RESUMED_STEPS}")}


def evaluation(task: dict[str, Any], work: Work) -> dict[str, Any]:
    """The loss of a model folder on the held-out examples."""
    from held_out import eval_loss, held_out_batches

    # Any side: they have their data in common.
    config = run_config(SIDES[task["side"]], work, rate=1.0, output=Path(task["output"]))
    data = config.data.model_copy(update={"max_eval_examples": work.eval_examples})
    batches = held_out_batches(config.model_copy(update={"data": data}))
    return {"eval_loss": eval_loss(Path(task["output"]), batches)}


TASKS = {"timing": timing, "memory": memory, "saving": saving, "evaluation": evaluation}


def carry_out(task: dict[str, Any]) -> dict[str, Any]:
    """Do what the task says; an error becomes a result."""
    try:
        result = TASKS[task["task"]](task, Work(**task["work"]))
    except Exception as error:
        traceback.print_exc()
        result = {"failed": reason(error)}
    import torch

    return {**result, "threads": torch.get_num_threads()}


def main() -> None:
    """Carry out the task of a file."""
    task = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(json.dumps(carry_out(task)), encoding="utf-8")


if __name__ == "__main__":
    main()
