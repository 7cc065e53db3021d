"""The disk space that a run needs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from sophia_galore.config import RunConfig
from sophia_galore.config.size import bytes_in_words
from sophia_galore.errors import EnvironmentProblem
from sophia_galore.plan.plan import RunPlan, evaluates_after
from sophia_galore.train.folder import nearest_folder
from sophia_galore.weights.plain import DTYPES

# Beside the tensors: the tokenizer (the largest are some 35 MB), the plan, the records.
_DOCUMENTS_BYTES = 40 * 2**20


@dataclass(frozen=True)
class Space:
    """The disk space that a run needs.

    Args:
        num_checkpoints: The largest number of new checkpoints on the disk at once.
        checkpoint_bytes: Bytes of one.
        model_bytes: Bytes of the final model.
        streamed_bytes: Bytes of the files in which layers live; each is written anew behind a checkpoint that keeps it.
    """

    num_checkpoints: int
    checkpoint_bytes: int
    model_bytes: int
    streamed_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The largest number of bytes at once."""
        return self.num_checkpoints * self.checkpoint_bytes + self.model_bytes + self.streamed_bytes


def space_needed(config: RunConfig, plan: RunPlan, *, done: int = 0, kept: int = 0, streamed_bytes: int = 0) -> Space:
    """Compute the disk space that a run needs.

    A checkpoint keeps files of weights that live on disk by hard links, but the next step writes new ones: so it costs
    as much as any other, and no more.

    One checkpoint more than are kept: a new one is complete before an old one goes. And one even where none was
    asked for: that of a run that is stopped. The best one stays beside those that are kept.

    Args:
        config: What was asked.
        plan: What will be done.
        done: Steps that are done already.
        kept: Checkpoints that lie in the run's folder already, and make room as new ones come.
        streamed_bytes: Bytes of weights and states that live on disk.
    """
    settings = config.checkpoint
    to_come = 0
    if settings.save_every_steps:
        to_come = plan.num_steps // settings.save_every_steps - done // settings.save_every_steps
    if settings.save_every_minutes:
        to_come = max(0, plan.num_steps - done)  # how many nobody knows; after each step at most
    most = settings.keep_last
    if config.training.load_best_model:
        steps = range(done + 1, plan.num_steps + 1)
        to_come += sum(evaluates_after(step, config, plan.steps_per_epoch, plan.num_steps) for step in steps)
        most += 1
    at_once = min(most, kept + to_come) - min(most, kept) + 1
    return Space(
        at_once,
        sum(plan.standing_bytes.values()) + _DOCUMENTS_BYTES,
        model_bytes(config, plan) + _DOCUMENTS_BYTES,
        streamed_bytes,
    )


def model_bytes(config: RunConfig, plan: RunPlan) -> int:
    """Bytes of the final model's weights."""
    dtype = final_dtype(config)
    return plan.num_parameters * dtype.itemsize if dtype else plan.standing_bytes["weights"]


def final_dtype(config: RunConfig) -> torch.dtype | None:
    """Precision of the final model; None: as its weights are stored."""
    if config.export.dtype != "auto":
        return DTYPES[config.export.dtype]
    return torch.bfloat16 if config.quantization.int8 else None


def refuse_full_disk(folder: Path, space: Space) -> None:
    """Refuse a run that would fill the disk.

    Args:
        folder: The run's folder; it need not exist. An earlier run in it stays, moved aside, and makes no room.
        space: What the run will write.

    Raises:
        EnvironmentProblem: There is less room than that.
    """
    place = nearest_folder(folder)
    free_bytes = shutil.disk_usage(place).free
    if free_bytes >= space.total_bytes:
        return
    checkpoints = f"{space.num_checkpoints} checkpoint" + ("s" if space.num_checkpoints > 1 else "")
    layers = f", and layers that live on disk of {bytes_in_words(space.streamed_bytes)}" if space.streamed_bytes else ""
    raise EnvironmentProblem(
        f"The run will write {bytes_in_words(space.total_bytes)}, but {place} has only {bytes_in_words(free_bytes)} "
        f"free: {checkpoints} at once of {bytes_in_words(space.checkpoint_bytes)}, and the final model of "
        f"{bytes_in_words(space.model_bytes)}{layers}.",
        "Free some space, lower checkpoint.keep_last, choose a training.output_dir on another disk, or store less: "
        "model.store=bf16, quantization.enabled=true, optimizer.state_bits=8.",
    )
