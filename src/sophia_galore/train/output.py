"""What a run writes: its folder and records, checkpoints, and the final model. Only the first process writes."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sophia_galore.config import dump_config
from sophia_galore.config.dump import flatten
from sophia_galore.distributed.launch import launcher
from sophia_galore.errors import NonFiniteError, UserError
from sophia_galore.model.card import Card, write_card
from sophia_galore.model.disk import writing
from sophia_galore.model.export import write_model
from sophia_galore.records import files
from sophia_galore.records.memory import MemoryReport
from sophia_galore.records.metrics import Evaluation, Exported, evaluations_of, exported_of
from sophia_galore.records.run import TrainerState
from sophia_galore.records.schema import write_json, write_jsonl, write_text
from sophia_galore.train import progress
from sophia_galore.train.agreement import equalise
from sophia_galore.train.background import Background
from sophia_galore.train.best_checkpoint import open_best
from sophia_galore.train.callback import Callback
from sophia_galore.train.card import run_card
from sophia_galore.train.checkpoint import checkpoints, remove_unfinished, save_checkpoint
from sophia_galore.train.earlier_run import open_run_folder
from sophia_galore.train.environment import environment
from sophia_galore.train.folder import replace_model
from sophia_galore.train.metrics import MetricsLog
from sophia_galore.train.prepared import Loaded
from sophia_galore.train.result import RunResult
from sophia_galore.train.space import final_dtype, model_bytes
from sophia_galore.weights.tensor_stream import TensorStream

_PEAKS = ("peak_allocated_bytes", "peak_process_bytes")


class RunOutput:
    """The folder of a run, and how far the run is.

    Args:
        loaded: The loaded parts of the run.
        folder: The run's folder. Up to here it is unchanged, so that an error before leaves it as it was.
        callback: Called at each event of the run.
        keep: Files and folders that are not moved with an earlier run.
        command: The command line, for the run's records.
    """

    def __init__(self, loaded: Loaded, folder: Path, callback: Callback, keep: Sequence[Path], command: str) -> None:
        prepared = loaded.prepared
        config, plan, checkpoint = prepared.config, prepared.plan, prepared.checkpoint
        self._loaded, self._prepared, self._config, self._plan = loaded, prepared, config, plan
        self.folder, self._callback = folder, callback
        self._processes, self._writes = loaded.processes, loaded.processes.is_first
        self._monitor = loaded.monitor
        self.last_step = checkpoint.step if checkpoint else 0
        self._saved: Path | None = None
        self._background = Background()  # completes checkpoints
        self._wrote_model = False  # the final one
        machines = self._processes.gather(socket.gethostname())
        if self._writes:
            self._open_folder(keep, machines, command)
        metrics = folder / files.METRICS if self._writes else None
        self._log = MetricsLog(metrics, checkpoint.step if checkpoint else None, callback.say)
        self._evaluations = checkpoint.evaluations() if checkpoint else []
        self._limits = progress.stopping_limits(config)
        self._best = open_best(config, checkpoint if self._writes else None, self._evaluations, folder, callback.say)
        if self._writes:
            write_json(folder / files.TRAINER_STATE, self._trainer_state().to_json())
        callback.opened(folder, after_step=self.last_step, records=tuple(self._log.records))

    def _open_folder(self, keep: Sequence[Path], machines: Sequence[str], command: str) -> None:
        """Make the run's folder, and write what is known before the first step."""
        folder, prepared = self.folder, self._prepared
        moved = open_run_folder(folder, going_on=prepared.checkpoint, keep=[*keep, prepared.folder])
        if moved:
            self._callback.say(f"The earlier run in {folder} was moved to {moved}.")
        remove_unfinished(folder)  # a killed run left them, and this one may save no more
        write_json(folder / files.PLAN, self._plan.to_json())
        write_text(folder / files.CONFIG, dump_config(self._config))
        write_json(folder / files.ENVIRONMENT, environment(prepared.device, command, machines, launcher()))
        if bad := prepared.dataset.bad:
            write_jsonl(folder / files.BAD_RECORDS, (each.to_json() for each in bad))

    def at(self, step: int) -> dict[str, Any]:
        """Return what records say of where a step is."""
        return {"step": step, "epoch": round(step / self._plan.steps_per_epoch, 6)}

    def record(self, record: dict[str, Any]) -> None:
        """Add a line to the metrics.

        Raises:
            EnvironmentProblem: The checkpoint that is completed meanwhile could not be saved.
        """
        self._background.check()
        self._log.add(record)
        self._callback.recorded(record)

    def evaluated(self, step: int, loss: float) -> None:
        """Record an evaluation."""
        self._evaluations.append(Evaluation(**self.at(step), loss=loss))
        self.record(progress.last_evaluation(self._evaluations, self._limits).to_json())

    def stops_early(self) -> bool:
        """Return whether the evaluations so far end the run."""
        return progress.stops_early(self._evaluations, self._limits)

    def is_new_best(self, step: int) -> bool:
        """Return whether this step has the lowest eval loss, and is to be kept."""
        return self._best.is_new(step, self._evaluations)

    def save(self, step: int) -> None:
        """Write a checkpoint. All processes take part: each sends what it owns."""
        if not self._config.distributed.shard_state:  # an owner sends each weight as it is
            equalise(self._processes, self._loaded.store, self._loaded.optimizer.states, self._callback.say)
        self._refuse_broken_weights()
        if not self._writes:
            for _ in self._loaded.optimizer.states.each():
                pass  # each state that this process owns is lent to the first one
            return
        self._background.wait()
        self._best.saving(step, self._evaluations)
        self._log.settle()
        self._saved = save_checkpoint(
            self.folder,
            step,
            optimizer_state=self._state_stream(),
            write_model=self._write_checkpoint_model,
            documents={
                files.PLAN: self._plan.to_json(),
                files.FLAT_CONFIG: flatten(self._config),
                files.TRAINER_STATE: self._trainer_state().to_json(),
                files.MEMORY_REPORT: self._monitor.report(),
            },
            keep_last=self._config.checkpoint.keep_last,
            keep_steps=self._best.steps,
            needed_bytes=sum(self._plan.standing_bytes.values()),
            beside=self._background.start,
        )

    def finish(self) -> None:
        """Say why the run ended early, if it did, and write the final model."""
        if self._limits and self.last_step < self._plan.num_steps:
            why = progress.early_stop_reason(self._evaluations, self._limits, self._plan.num_steps)
            self._callback.say(f"Ended early: {why}.")
        self._background.wait()
        if self._writes:
            self._restore_best()
            self._write_final_model()

    def result(self, *, finished: bool) -> RunResult:
        """Return the result of the run, when its last checkpoint is complete; all processes take part."""
        self._background.wait()
        peaks = self._monitor.report()
        own = {"machine": socket.gethostname(), **{key: peaks[key] for key in _PEAKS}}
        self._monitor.processes = [] if self._processes.is_alone else self._processes.gather(own)
        memory = MemoryReport.of(self._monitor.report(), files.MEMORY_REPORT)
        return RunResult(self.folder, self._trainer_state(), memory, None if finished else self._saved)

    def close(self, *, failed: bool) -> None:
        """Write the last records and close them, whether the run succeeded or failed."""
        self._background.close()
        if not self._writes:
            return
        # A full disk was already reported where it was first met; write what still fits.
        with contextlib.suppress(OSError):
            self._log.close()
        state = self._trainer_state()
        if failed and not self._wrote_model and (state.ended_early or not state.has_steps_left):
            state = state.unfinished()
        for name, document in (
            (files.TRAINER_STATE, state.to_json()),
            (files.MEMORY_REPORT, self._monitor.report()),
        ):
            with contextlib.suppress(OSError):
                write_json(self.folder / name, document)
        self._callback.closed(failed=failed)

    def resume_hint(self) -> str:
        """Say from which checkpoint a failed run can resume."""
        with contextlib.suppress(UserError):  # it is reported where it is waited for
            self._background.wait()
        saved = checkpoints(self.folder)
        return f"The last checkpoint is {saved[-1]}. Go on with --resume." if saved else "There is no checkpoint yet."

    def with_resume_hint(self, error: NonFiniteError) -> NonFiniteError:
        """Return an error that also says from where to go on."""
        return NonFiniteError(error.cause, f"{error.remedy} {self.resume_hint()}")

    def _state_stream(self) -> TensorStream:
        stream, streams = self._loaded.optimizer.states.stream(), self._loaded.streams
        return replace(stream, finished=streams.finished("state")) if streams else stream

    def _write_model(self, folder: Path, dtype: torch.dtype | None, *, as_source: bool = True) -> None:
        with self._monitor.apart():
            write_model(
                folder,
                store=self._loaded.store,
                dtype=dtype,
                source=self._prepared.source,
                layout=self._prepared.layout,
                # The checkpoint that a run resumed from may be deleted once there is a later one.
                beside=self._saved or self._prepared.folder,
                as_source=as_source,
                chat_template=self._plan.chat_format.template,
                eos_token_ids=self._prepared.stop_ids,
            )

    def _write_checkpoint_model(self, folder: Path) -> None:
        self._write_model(folder, None, as_source=False)
        # The card keeps the model's origin and licence for a run that resumes from this checkpoint.
        write_card(folder, self._card())

    def _write_final_model(self) -> None:
        self._refuse_broken_weights()
        dtype = final_dtype(self._config)
        size = model_bytes(self._config, self._plan)
        with writing("The final model", self.folder, self.resume_hint, needed_bytes=size):
            write_card(self.folder, self._card())
            replace_model(self.folder, lambda beside: self._write_model(beside, dtype))
        self._wrote_model = True

    def _restore_best(self) -> None:
        """Load the weights of the lowest eval loss if training.load_best_model is set."""
        with self._monitor.apart():
            best = self._best.restore(
                self._loaded.store,
                self._loaded.optimizer,
                self._evaluations,
                last_step=self.last_step,
                architecture=self._prepared.architecture,
            )
        if best:
            exported = Exported(**self.at(self.last_step), exported_step=best.step, loss=best.loss)
            self.record(exported.to_json())

    def _card(self) -> Card:
        best = exported_of(self._log.records)
        step = best.exported_step if best else self.last_step
        return run_card(
            self.folder.absolute().name,
            plan=self._plan.to_json(),
            config=flatten(self._config),
            step=step,
            evaluations=[each for each in evaluations_of(self._log.records) if each.step <= step],
            origin=self._prepared.source.origin,
        )

    def _trainer_state(self) -> TrainerState:
        return progress.trainer_state(
            self._log.records,
            self._evaluations,
            self._limits,
            self._best.path,
            step=self.last_step,
            num_steps=self._plan.num_steps,
            steps_per_epoch=self._plan.steps_per_epoch,
        )

    def _refuse_broken_weights(self) -> None:
        """Refuse to write weights that are not finite; the loss would show them only in the next step."""
        broken = self._loaded.store.first_non_finite()
        if broken is not None:
            cause = f"{broken} holds values that are not finite after step {self.last_step}."
            raise self.with_resume_hint(NonFiniteError(cause, "Lower training.learning_rate."))
