"""Pre-flight checks: find errors in the first seconds of a run.

There are two tables. Checks in the first need no weights and write nothing; `sophia-galore check` runs them too. Checks
in the second see the loaded weights and state, before the run's folder is touched. A check raises an error if the run
must not start; else it returns a note for the user, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from sophia_galore.config.size import bytes_in_words
from sophia_galore.data.portion import deal
from sophia_galore.engine.probe import describe_probe, take_probe
from sophia_galore.errors import CheckpointError, ModelError
from sophia_galore.plan.route import Route
from sophia_galore.train.checkpoint import checkpoints
from sophia_galore.train.prepared import Loaded, Prepared
from sophia_galore.train.space import refuse_full_disk, space_needed
from sophia_galore.train.special_tokens import end_of_turn_note, stop_warning
from sophia_galore.weights.manifest import repair_hint
from sophia_galore.weights.weight import Weight


def _disk_has_room(run: Prepared) -> None:
    folder, going_on = Path(run.config.run_folder), run.checkpoint
    # Checkpoints of an earlier run are moved aside with it and not deleted.
    here = going_on is not None and going_on.folder.parent.resolve() == folder.resolve()
    space = space_needed(
        run.config,
        run.plan,
        done=going_on.step if going_on else 0,
        kept=len(checkpoints(folder)) if here else 0,
        streamed_bytes=run.streamed.bytes_in("disk"),
    )
    refuse_full_disk(folder, space)


def _learns_to_stop(run: Prepared) -> str | None:
    return stop_warning(
        run.dataset.train,
        model_config=run.model_config,
        tokenizer=run.tokenizer,
        generation_config=run.generation_config,
    )


def _stops_at_turns(run: Prepared) -> str | None:
    return end_of_turn_note(run.plan.chat_format.end_ids, run.tokenizer)


def _weights_are_sound(run: Loaded) -> None:
    routes = {route.name: route for route in run.prepared.plan.routes}
    for name, weight in run.store.each():
        route = routes[name]
        with run.monitor.phase("load"):
            problem = _weight_problem(weight, route)
        if problem:
            raise ModelError(
                f"{route.name} {problem}.",
                "Go on from an earlier checkpoint (--resume=PATH)."
                if run.prepared.checkpoint
                else repair_hint(Path(run.prepared.plan.model_folder)),
            )


def _weight_problem(weight: Weight, route: Route) -> str | None:
    """Describe what is wrong with a stored weight, after its name; None if nothing is."""
    if tuple(weight.shape) != route.shape:
        return f"has shape {tuple(weight.shape)} instead of {route.shape}"
    if weight.format != route.format:
        return f"is in {weight.format}, but should be in {route.format}"
    return weight.problem()


def _state_is_finite(run: Loaded) -> None:
    if run.prepared.checkpoint is None:
        return  # all zeros
    # Those of parameters that another process owns are looked at there.
    for name, state in run.optimizer.states.each():
        for key, tensor in state.items():
            # Integer codes are always finite; their scales are separate tensors.
            if tensor.is_floating_point() and not tensor.is_meta and not _is_finite(tensor):
                raise CheckpointError(
                    f"{run.prepared.checkpoint.folder}: the optimizer's state {name}/{key} holds values that are not "
                    "finite.",
                    "Go on from an earlier checkpoint (--resume=PATH), or start without --resume.",
                )


def _is_finite(tensor: Tensor) -> bool:
    # The extremes are NaN if any entry is, and need no temporary of the tensor's size.
    return all(math.isfinite(extreme) for extreme in torch.aminmax(tensor))


def _probe_step_fits(run: Loaded) -> str | None:
    training, plan, checkpoint = run.prepared.config.training, run.prepared.plan, run.prepared.checkpoint
    step = (checkpoint.step if checkpoint else 0) + 1
    if not training.probe_step or step > plan.num_steps:
        return None
    blocks = run.prepared.config.distributed.sum_blocks
    portion = deal(run.feed.largest_window(), run.processes.rank, run.processes.count, sum_blocks=blocks)
    specs = [route.spec for route in plan.routes if route.spec]
    take_probe(
        run.engine,
        portion,
        step=step,
        optimizer=run.optimizer,
        # An expert without tokens has no gradient, and takes no step then.
        trained=[spec.name for spec in specs if not spec.rests],
        held_shapes={spec.name: spec.held_shape for spec in specs} if plan.clip_by == "model" else {},
        max_length=training.max_length,
        stopped=lambda: run.stop.requested,
        explain=run.monitor.explain,
    )
    peak = run.monitor.end_probe()
    if torch.device(plan.device).type == "cuda":
        torch.cuda.empty_cache()  # what the allocator keeps shall be what the steps themselves need
    return f"Probe step: {describe_probe(portion.batches)} fit" + (f", peak {bytes_in_words(peak)}." if peak else ".")


BEFORE_LOADING: tuple[Callable[[Prepared], str | None], ...] = (_disk_has_room, _learns_to_stop, _stops_at_turns)
AFTER_LOADING: tuple[Callable[[Loaded], str | None], ...] = (_weights_are_sound, _state_is_finite, _probe_step_fits)


def before_loading(run: Prepared) -> list[str]:
    """Run the checks that need no weights.

    Args:
        run: The run.

    Returns:
        What the user should know, in sentences.

    Raises:
        UserError: The run must not begin.
    """
    return [said for check in BEFORE_LOADING if (said := check(run))]


def after_loading(run: Loaded) -> list[str]:
    """Run the checks of weights and state, which they do not change.

    Args:
        run: The run.

    Returns:
        What the user should know, in sentences.

    Raises:
        UserError: Weights or state are broken.
        RunError: The probe step failed.
        KeyboardInterrupt: The user asked the run to stop in the probe step.
    """
    return [said for check in AFTER_LOADING if (said := check(run))]
