"""A training run, from loading the weights to the final model."""

from __future__ import annotations

import contextlib
import math
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sophia_galore.config import RunConfig, dump_config
from sophia_galore.config.dump import flatten
from sophia_galore.data.portion import deal, to_evaluate
from sophia_galore.distributed.folder import on_each_machine
from sophia_galore.distributed.launch import joined, launcher, uses_gpus
from sophia_galore.distributed.processes import Processes
from sophia_galore.engine.determinism import repeatable
from sophia_galore.engine.step_results import StepResult
from sophia_galore.errors import NonFiniteError
from sophia_galore.memory.fitting import advice
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.model.card import Card, write_card
from sophia_galore.model.disk import writing
from sophia_galore.model.export import write_model
from sophia_galore.optim.schedule import schedule
from sophia_galore.plan.plan import evaluates_after
from sophia_galore.records import files
from sophia_galore.records.memory import MemoryReport
from sophia_galore.records.metrics import Evaluation, Exported, TrainStep, evaluations_of, exported_of
from sophia_galore.records.run import TrainerState
from sophia_galore.records.schema import write_json, write_jsonl, write_text
from sophia_galore.train import progress
from sophia_galore.train.agreement import equalise, refuse_differences
from sophia_galore.train.answers import When, ask
from sophia_galore.train.begin import Beginning, Start, begin
from sophia_galore.train.best_checkpoint import open_best
from sophia_galore.train.callback import Callback, Callbacks
from sophia_galore.train.card import run_card
from sophia_galore.train.checkpoint import checkpoints, find_checkpoint, remove_unfinished, save_checkpoint
from sophia_galore.train.earlier_run import open_run_folder, refuse_unsafe_folder
from sophia_galore.train.environment import environment
from sophia_galore.train.folder import locked, replace_model
from sophia_galore.train.load import load
from sophia_galore.train.metrics import MetricsLog
from sophia_galore.train.preflight import after_loading
from sophia_galore.train.prepare import prepare
from sophia_galore.train.prepared import Loaded
from sophia_galore.train.result import RunResult
from sophia_galore.train.resume import changed_noise, refuse_difference
from sophia_galore.train.signals import stop_on_signal
from sophia_galore.train.space import final_dtype, model_bytes
from sophia_galore.train.streamed_files import remove_left_by_finished
from sophia_galore.train.trackers import Trackers
from sophia_galore.weights.tensor_stream import TensorStream


def train(
    config: RunConfig,
    callback: Callback,
    *,
    resume: bool = False,
    resume_from: Path | None = None,
    command: str = "",
    config_file: Path | None = None,
) -> RunResult:
    """Train a model.

    Args:
        config: The run's configuration.
        callback: Called at each event of the run.
        resume: Continue from a checkpoint.
        resume_from: The checkpoint; None: the newest complete one in the run's folder.
        command: The command line, for the run's records.
        config_file: The file of the configuration, which must not be moved.

    Returns:
        The result of the run.

    Raises:
        UserError: The configuration, the data or the model can't be used.
        RunError: The run failed.
    """
    start = Start(resume, resume_from, command, config_file)
    gpus, minutes = uses_gpus(config.training.device), config.distributed.timeout_minutes
    with joined(uses_gpus=gpus, timeout_minutes=minutes) as processes:
        # What the first process finds counts, so that a date or an option of one machine is the same for all.
        begins = processes.by_first(lambda: begin(config, start))
        return _train(begins, start, callback if processes.is_first else Callback(), processes)


def _train(begins: Beginning, start: Start, callback: Callback, processes: Processes) -> RunResult:
    """Train in each of the processes."""
    config, folder = begins.config, Path(begins.config.run_folder)
    if begins.finished:
        remove_left_by_finished(folder, processes)
        callback.say(f"The run in {folder} is finished: {begins.finished.how_it_ended}.")
        return begins.finished
    if config.training.report_to and processes.is_first:
        callback = Callbacks(callback, Trackers(config, callback.say))
    with contextlib.ExitStack() as at_end:
        checkpoint = begins.checkpoint
        if checkpoint:
            given = at_end.enter_context(on_each_machine(processes, checkpoint.folder, files.MANIFEST))
            # The first process verified it already.
            found = processes.together(lambda: None if processes.is_first else find_checkpoint(folder, given))
            checkpoint = found or checkpoint
        keep: list[Path] = []
        if processes.is_first:
            # Checked before anything is downloaded, and again right before an earlier run is moved.
            keep = refuse_unsafe_folder(config, start.config_file, checkpoint)
        prepared = processes.together(lambda: prepare(config, callback, checkpoint, processes.count), in_turns=True)
        if checkpoint:
            refuse_difference(checkpoint, config, prepared.plan)
            callback.say(f"Going on after step {checkpoint.step}, from {checkpoint.folder}.")
            if said := changed_noise(checkpoint, prepared.plan):
                callback.say(said)
        at_end.enter_context(locked(folder) if processes.is_first else contextlib.nullcontext())
        at_end.enter_context(repeatable(prepared.device))
        stop = at_end.enter_context(stop_on_signal(once_more_ends=processes.is_alone, says=processes.is_first))
        monitor = at_end.enter_context(MemoryMonitor(prepared.device, config.memory))
        monitor.earlier = checkpoint.memory_report() if checkpoint else {}
        if prepared.estimate is not None:
            forecast = prepared.estimate.forecast
            monitor.predicted_bytes, monitor.expected_step = forecast.peak_bytes, forecast.step
            monitor.advice = lambda: advice(prepared.planner, config)
        with monitor.explaining():
            loaded = load(prepared, monitor, callback, stop, at_end, processes)
            refuse_differences(processes, prepared.plan, loaded.store)
            run = _Run(loaded, folder, callback, keep, start.command)
        failed = True
        try:
            with monitor.explaining(run.resume_hint), writing("What a run records", folder, run.resume_hint):
                result = run.carry_out()
            failed = False
            return result
        finally:
            run.close(failed=failed)


_PEAKS = ("peak_allocated_bytes", "peak_process_bytes")


class _Run:
    """The loaded parts of a run and its training loop."""

    def __init__(self, loaded: Loaded, folder: Path, callback: Callback, keep: Sequence[Path], command: str) -> None:
        prepared = loaded.prepared
        config, plan, checkpoint = prepared.config, prepared.plan, prepared.checkpoint
        self._loaded, self._prepared, self._config, self._plan = loaded, prepared, config, plan
        self._folder, self._callback = folder, callback
        self._processes, self._writes = loaded.processes, loaded.processes.is_first
        self._monitor, self._stop = loaded.monitor, loaded.stop
        self._last_step = checkpoint.step if checkpoint else 0
        self._last_saved_s = time.monotonic()
        self._saved: Path | None = None
        self._wrote_model = False  # the final one
        self._factor = schedule(
            config.training.lr_scheduler_type, warmup_steps=config.training.warmup_steps, num_steps=plan.num_steps
        )
        for said in after_loading(loaded):
            callback.say(said)
        machines = self._processes.gather(socket.gethostname())
        # Not earlier: an error before this line must leave the folder unchanged.
        if self._writes:
            self._open_folder(keep, machines, command)
        metrics = folder / files.METRICS if self._writes else None
        self._log = MetricsLog(metrics, checkpoint.step if checkpoint else None, callback.say)
        self._evaluations = checkpoint.evaluations() if checkpoint else []
        self._limits = progress.stopping_limits(config)
        self._best = open_best(config, checkpoint if self._writes else None, self._evaluations, folder, callback.say)
        if self._writes:
            write_json(folder / files.TRAINER_STATE, self._trainer_state().to_json())
        callback.opened(folder, after_step=self._last_step, records=tuple(self._log.records))

    def _open_folder(self, keep: Sequence[Path], machines: Sequence[str], command: str) -> None:
        """Make the run's folder, and write what is known before the first step."""
        folder, prepared = self._folder, self._prepared
        moved = open_run_folder(folder, going_on=prepared.checkpoint, keep=[*keep, prepared.folder])
        if moved:
            self._callback.say(f"The earlier run in {folder} was moved to {moved}.")
        remove_unfinished(folder)  # a killed run left them, and this one may save no more
        write_json(folder / files.PLAN, self._plan.to_json())
        write_text(folder / files.CONFIG, dump_config(self._config))
        write_json(folder / files.ENVIRONMENT, environment(prepared.device, command, machines, launcher()))
        if bad := prepared.dataset.bad:
            write_jsonl(folder / files.BAD_RECORDS, (each.to_json() for each in bad))

    def carry_out(self) -> RunResult:
        """Take the remaining steps, until the end or until a stop is requested."""
        if self._last_step == 0:
            self._ask("before")
            self._evaluate(0)
        started_s, first = time.monotonic(), self._last_step
        for step in range(self._last_step + 1, self._plan.num_steps + 1):
            if progress.stops_early(self._evaluations, self._limits):
                break
            record = self._step(step)
            self._record(record)
            seconds_left = (time.monotonic() - started_s) / (step - first) * (self._plan.num_steps - step)
            self._callback.stepped(record, num_steps=self._plan.num_steps, seconds_left=seconds_left)
            if evaluates_after(step, self._config, self._plan.steps_per_epoch, self._plan.num_steps):
                self._evaluate(step)
            stops, saves = self._agreed(step)
            if stops or saves:
                self._save(step)
            if stops and step < self._plan.num_steps:
                return self._result(finished=False)
        if self._limits and self._last_step < self._plan.num_steps:
            why = progress.early_stop_reason(self._evaluations, self._limits, self._plan.num_steps)
            self._callback.say(f"Ended early: {why}.")
        if self._writes:
            self._restore_best()
            self._write_final_model()
        self._ask("after")
        return self._result(finished=True)

    def close(self, *, failed: bool) -> None:
        """Write the last records and close them, whether the run succeeded or failed."""
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
                write_json(self._folder / name, document)
        self._callback.closed(failed=failed)

    def _step(self, step: int) -> dict[str, Any]:
        """Take one optimizer step and return its record."""
        plan = self._plan
        streams = self._loaded.streams
        if streams:
            streams.take_waited_s()  # what evaluations and checkpoints waited
        summed_bytes = self._processes.summed_bytes
        started_s = time.perf_counter()
        portion = deal(
            self._loaded.feed.step(step),
            self._processes.rank,
            self._processes.count,
            sum_blocks=self._loaded.prepared.config.distributed.sum_blocks,
        )
        factor = self._factor(step)
        try:
            result, norm = self._loaded.stepper.take(portion, step=step, factor=factor)
        except NonFiniteError as error:
            raise self._with_resume_hint(error) from error
        seconds = time.perf_counter() - started_s
        self._last_step = step
        memory = self._monitor.end_step(step)
        return TrainStep(
            **self._at(step),
            loss=result.loss,
            learning_rate=plan.learning_rate * factor,
            grad_norm=norm,
            tokens=result.num_tokens,
            tokens_per_second=round(result.num_tokens / seconds, 2),
            waiting_share=round(streams.take_waited_s() / seconds, 4) if streams else None,
            **({} if self._processes.is_alone else {"summed_bytes": self._processes.summed_bytes - summed_bytes}),
            **_routing(result),
            **memory,
        ).to_json()

    def _evaluate(self, step: int) -> None:
        batches = self._loaded.eval_feed.longest_first()
        if not batches:
            return
        # As many micro-batches at a time as in a training step, so evaluation needs no more memory than training.
        rank, count = self._processes.rank, self._processes.count
        together = -(-self._config.training.gradient_accumulation_steps // count)
        # Neighbours are of almost the same length, so each process has as much to do.
        own = batches[rank::count]
        blocks = self._config.distributed.sum_blocks
        parts = [
            self._loaded.engine.evaluate(to_evaluate(own[start : start + together], blocks))
            for start in range(0, len(own), together)
        ]
        loss, num_counted = self._processes.sums([sum(column) for column in zip(*parts, strict=True)] or [0.0, 0.0])
        eval_loss = loss / num_counted
        if not math.isfinite(eval_loss):
            cause = f"The evaluation loss is {eval_loss} after step {step}."
            raise self._with_resume_hint(NonFiniteError(cause, "Lower training.learning_rate."))
        self._evaluations.append(Evaluation(**self._at(step), loss=eval_loss))
        self._record(progress.last_evaluation(self._evaluations, self._limits).to_json())
        self._callback.evaluated(step, eval_loss)

    def _at(self, step: int) -> dict[str, Any]:
        return {"step": step, "epoch": round(step / self._plan.steps_per_epoch, 6)}

    def _record(self, record: dict[str, Any]) -> None:
        self._log.add(record)
        self._callback.recorded(record)

    def _agreed(self, step: int) -> tuple[bool, bool]:
        """Return whether any process was asked to stop, and whether the first one is to save now."""
        saves = self._saves_after(step) or self._best.is_new(step, self._evaluations)
        stops, saves_too = self._processes.sums([self._stop.requested, saves and self._writes])
        return stops > 0, saves_too > 0

    def _saves_after(self, step: int) -> bool:
        settings = self._config.checkpoint
        minutes = (time.monotonic() - self._last_saved_s) / 60
        by_steps = settings.save_every_steps > 0 and step % settings.save_every_steps == 0
        return by_steps or 0 < settings.save_every_minutes <= minutes

    def _save(self, step: int) -> None:
        if not self._config.distributed.shard_state:  # an owner sends each weight as it is
            equalise(self._processes, self._loaded.store, self._loaded.optimizer.states, self._callback.say)
        self._refuse_broken_weights()
        self._last_saved_s = time.monotonic()
        if not self._writes:
            for _ in self._loaded.optimizer.states.each():
                pass  # each state that this process owns is lent to the first one
            return
        self._best.saving(step, self._evaluations)
        self._log.settle()
        self._saved = save_checkpoint(
            self._folder,
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
        )
        self._last_saved_s = time.monotonic()  # from its end on

    def _state_stream(self) -> TensorStream:
        stream, streams = self._loaded.optimizer.states.stream(), self._loaded.streams
        return replace(stream, finished=streams.finished("state")) if streams else stream

    def _ask(self, when: When) -> None:
        if self._writes and self._config.training.sample_questions:
            with self._monitor.phase("eval"):
                given = ask(self._prepared, self._loaded.store, self._folder, when)
            self._callback.answered(when, given)

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

    def _card(self) -> Card:
        best = exported_of(self._log.records)
        step = best.exported_step if best else self._last_step
        return run_card(
            self._folder.absolute().name,
            plan=self._plan.to_json(),
            config=flatten(self._config),
            step=step,
            evaluations=[each for each in evaluations_of(self._log.records) if each.step <= step],
            origin=self._prepared.source.origin,
        )

    def _write_final_model(self) -> None:
        self._refuse_broken_weights()
        dtype = final_dtype(self._config)
        size = model_bytes(self._config, self._plan)
        with writing("The final model", self._folder, self.resume_hint, needed_bytes=size):
            write_card(self._folder, self._card())
            replace_model(self._folder, lambda beside: self._write_model(beside, dtype))
        self._wrote_model = True

    def _restore_best(self) -> None:
        """Load the weights of the lowest eval loss if training.load_best_model is set."""
        with self._monitor.apart():
            best = self._best.restore(
                self._loaded.store,
                self._loaded.optimizer,
                self._evaluations,
                last_step=self._last_step,
                architecture=self._prepared.architecture,
            )
        if best:
            exported = Exported(**self._at(self._last_step), exported_step=best.step, loss=best.loss)
            self._record(exported.to_json())

    def _trainer_state(self) -> TrainerState:
        return progress.trainer_state(
            self._log.records,
            self._evaluations,
            self._limits,
            self._best.path,
            step=self._last_step,
            num_steps=self._plan.num_steps,
            steps_per_epoch=self._plan.steps_per_epoch,
        )

    def _result(self, *, finished: bool) -> RunResult:
        peaks = self._monitor.report()
        own = {"machine": socket.gethostname(), **{key: peaks[key] for key in _PEAKS}}
        self._monitor.processes = [] if self._processes.is_alone else self._processes.gather(own)
        memory = MemoryReport.of(self._monitor.report(), files.MEMORY_REPORT)
        return RunResult(self._folder, self._trainer_state(), memory, None if finished else self._saved)

    def _refuse_broken_weights(self) -> None:
        """Refuse to write weights that are not finite; the loss would show them only in the next step."""
        broken = self._loaded.store.first_non_finite()
        if broken is not None:
            cause = f"{broken} holds values that are not finite after step {self._last_step}."
            raise self._with_resume_hint(NonFiniteError(cause, "Lower training.learning_rate."))

    def resume_hint(self) -> str:
        """Say from which checkpoint a failed run can resume."""
        saved = checkpoints(self._folder)
        return f"The last checkpoint is {saved[-1]}. Go on with --resume." if saved else "There is no checkpoint yet."

    def _with_resume_hint(self, error: NonFiniteError) -> NonFiniteError:
        return NonFiniteError(error.cause, f"{error.remedy} {self.resume_hint()}")


def _routing(result: StepResult) -> dict[str, Any]:
    """Return what a step's record says of experts."""
    routing = result.routing
    if routing is None:
        return {}
    return {
        "aux_loss": routing.aux_loss,
        "router_entropy": round(routing.entropy, 6),
        "largest_expert_share": round(routing.largest_share, 6),
        "idle_experts": routing.num_idle,
        "tokens_per_expert": routing.tokens_per_expert,
    }
