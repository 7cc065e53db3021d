"""The smaller files of a run: its plan, its machine, its state, its checkpoints' manifests, its answers."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import Field

from sophia_galore.records.metrics import Evaluation, Exported, evaluations_of, exported_of
from sophia_galore.records.schema import Number, Record, Whole


class Machine(Record):
    """A machine; None for what the system does not report.

    Args:
        system: The operating system.
        processor: The processor's name.
        num_cores: Logical cores.
        num_threads: Threads of torch.
        memory_bytes: Memory of the host.
        gpu: The GPU's name; None if the run used the CPU.
        gpu_memory_bytes: Memory of the GPU.
    """

    system: str | None = None
    processor: str | None = None
    num_cores: int | None = None
    num_threads: int | None = None
    memory_bytes: int | None = None
    gpu: str | None = None
    gpu_memory_bytes: int | None = None


class Environment(Record):
    """`environment.json`: machine, versions and command of a run.

    Args:
        machine: The machine.
        versions: Versions of packages, by name.
        command: The command that started the run; "" if there is none.
        started: Start of the run in UTC, as ISO 8601.
        processes: The machine of each process, by rank.
        launcher: The program that started the processes, as a machine and a number; "" for a single process.
    """

    machine: Machine = Machine()
    versions: dict[str, str] = Field(default_factory=dict)
    command: str = ""
    started: str = ""
    processes: tuple[str, ...] = ()
    launcher: str = ""


class PlannedRoute(Record):
    """Of `plan.json`: what trains a parameter, as far as reports show it."""

    rule: str
    trained: bool = True


class PlannedVerdict(Record):
    """Of `plan.json`: what a rule decided."""

    verdict: str
    reason: str = ""


class PlanRecord(Record):
    """`plan.json`, as far as reports show it. What resuming compares is the whole file.

    Args:
        optimizer: What trains the run, which is not always what was asked for.
        num_steps: Optimizer steps of the run.
        steps_per_epoch: Of them.
        trained_fraction: Share of the parameters that are trained, from 0 to 1.
        standing_bytes: What stays in memory for the whole run, by category.
        data_fingerprint: SHA-256 of all tokens and of which of them count.
        routes: One a parameter.
        verdicts: The rules that apply.
        num_shared: Training records that are in the evaluation data too.
        repetition_share: Share of the counted tokens that counting token sequences predicts; None if not computed.
        repetition_loss: The loss that such a count reaches.
    """

    optimizer: str
    num_steps: Whole
    steps_per_epoch: Whole
    trained_fraction: Number
    standing_bytes: dict[str, Whole] = Field(alias="bytes")
    data_fingerprint: str
    routes: tuple[PlannedRoute, ...]
    verdicts: tuple[PlannedVerdict, ...] = ()
    num_shared: Whole = 0
    repetition_share: Number | None = None
    repetition_loss: Number | None = None
    model_name: str | None = None
    num_parameters: Whole = 0
    compute_dtype: str | None = None
    device: str | None = None
    num_train_examples: Whole | None = None
    num_eval_examples: Whole | None = None


class StoppingLimits(Record):
    """When a run ends early: the arguments of Hugging Face's EarlyStoppingCallback."""

    early_stopping_patience: Whole
    early_stopping_threshold: Number = 0.0


class StoppingCount(Record):
    """Evaluations in a row without an improvement."""

    early_stopping_patience_counter: Whole


class EarlyStopping(Record):
    """State of early stopping, in the layout of Hugging Face's EarlyStoppingCallback."""

    args: StoppingLimits
    attributes: StoppingCount


class StatefulCallbacks(Record):
    """The callbacks that have a state."""

    early_stopping: EarlyStopping | None = Field(default=None, alias="EarlyStoppingCallback")


HISTORY_KEYS = (
    "step",
    "epoch",
    "loss",
    "learning_rate",
    "grad_norm",
    "eval_loss",
    "exported_step",
    "exported_eval_loss",
)
"""What the history in `trainer_state.json` has of a line of `metrics.jsonl`."""


class TrainerState(Record):
    """`trainer_state.json` in Hugging Face's layout, which other tools plot.

    Args:
        global_step: The last step that was done.
        epoch: Passes over the data so far.
        max_steps: Steps that were planned.
        num_train_epochs: Passes over the data that were planned.
        log_history: Lines of `metrics.jsonl`.
        best_metric: The lowest eval loss after a step; None if there is none yet.
        best_global_step: The step of that evaluation.
        best_model_checkpoint: Where that model is; None if it was not kept.
        stateful_callbacks: State of early stopping, if it is enabled.
    """

    global_step: Whole
    epoch: Number | None = None
    max_steps: Whole
    num_train_epochs: Number | None = None
    log_history: list[dict[str, Any]] = Field(default_factory=list)
    best_metric: Number | None = None
    best_global_step: Whole | None = None
    best_model_checkpoint: str | None = None
    stateful_callbacks: StatefulCallbacks | None = None

    @property
    def evaluations(self) -> list[Evaluation]:
        """Those of the run so far."""
        return evaluations_of(self.log_history)

    @property
    def exported(self) -> Exported | None:
        """The final model, where it was chosen by its eval loss."""
        return exported_of(self.log_history)

    @property
    def has_steps_left(self) -> bool:
        """Whether not all planned steps are done."""
        return self.global_step < self.max_steps

    @property
    def ended_early(self) -> bool:
        """Whether early stopping ended the run."""
        found = self.stateful_callbacks.early_stopping if self.stateful_callbacks else None
        if found is None:
            return False
        return found.attributes.early_stopping_patience_counter >= found.args.early_stopping_patience

    def unfinished(self) -> TrainerState:
        """Return the state of a run that took its last step, but could not write its final model.

        The folder may hold the final model of a shorter run, which must not be taken for that of this one.
        """
        step = min(self.global_step, self.max_steps - 1)
        return self.model_copy(update={"global_step": step, "stateful_callbacks": None})


class CheckpointManifest(Record):
    """`manifest.json` of a checkpoint.

    Args:
        step: The step after which it was made.
        sha256: Digest of the step and the files; "": an earlier version wrote it.
        files: SHA-256 of each of its files.
    """

    step: Whole
    sha256: str = ""
    files: dict[str, str]

    @classmethod
    def made(cls, step: int, files: dict[str, str]) -> CheckpointManifest:
        """Return the manifest of a checkpoint, with its digest."""
        bare = cls(step=step, files=files)
        return cls(step=step, sha256=bare.digest, files=files)

    @property
    def digest(self) -> str:
        """SHA-256 of the step and the files."""
        return hashlib.sha256(json.dumps([self.step, self.files], sort_keys=True).encode()).hexdigest()


class Answers(Record):
    """`answers.json`: the answers to the sample questions, by question."""

    before: dict[str, str] = Field(default_factory=dict)
    after: dict[str, str] = Field(default_factory=dict)


class BadRecord(Record):
    """A line of `bad_records.jsonl`: a record of the data that can't be used.

    Args:
        where: Its place: the file and the number of the line or record.
        reason: What is wrong with it, without its place.
        remedy: What can be done about it.
    """

    where: str
    reason: str
    remedy: str
