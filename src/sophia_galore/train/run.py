"""A training run, from loading the weights to the final model."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

from sophia_galore.config import RunConfig
from sophia_galore.data.portion import deal, to_evaluate
from sophia_galore.distributed.folder import on_each_machine
from sophia_galore.distributed.launch import joined, uses_gpus
from sophia_galore.distributed.processes import Processes
from sophia_galore.engine.determinism import repeatable
from sophia_galore.engine.step_results import StepResult
from sophia_galore.errors import NonFiniteError
from sophia_galore.memory.fitting import advice
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.model.disk import writing
from sophia_galore.optim.schedule import schedule
from sophia_galore.plan.plan import evaluates_after
from sophia_galore.records import files
from sophia_galore.records.metrics import TrainStep
from sophia_galore.train.agreement import refuse_differences
from sophia_galore.train.answers import When, ask
from sophia_galore.train.begin import Beginning, Start, begin
from sophia_galore.train.callback import Callback, Callbacks
from sophia_galore.train.checkpoint import find_checkpoint
from sophia_galore.train.earlier_run import refuse_unsafe_folder
from sophia_galore.train.folder import locked
from sophia_galore.train.load import load
from sophia_galore.train.output import RunOutput
from sophia_galore.train.preflight import after_loading
from sophia_galore.train.prepare import prepare
from sophia_galore.train.prepared import Loaded
from sophia_galore.train.result import RunResult
from sophia_galore.train.resume import changed_noise, refuse_difference
from sophia_galore.train.signals import stop_on_signal
from sophia_galore.train.streamed_files import remove_left_by_finished
from sophia_galore.train.trackers import Trackers


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
            for said in after_loading(loaded):
                callback.say(said)
            output = RunOutput(loaded, folder, callback, keep, start.command)
        failed = True
        try:
            with monitor.explaining(output.resume_hint), writing("What a run records", folder, output.resume_hint):
                result = _Run(loaded, callback, output).carry_out()
            failed = False
            return result
        finally:
            output.close(failed=failed)


class _Run:
    """The loaded parts of a run and its training loop."""

    def __init__(self, loaded: Loaded, callback: Callback, output: RunOutput) -> None:
        prepared = loaded.prepared
        self._loaded, self._prepared, self._config, self._plan = loaded, prepared, prepared.config, prepared.plan
        self._callback, self._output = callback, output
        self._processes = loaded.processes
        self._monitor, self._stop = loaded.monitor, loaded.stop
        self._last_saved_s = time.monotonic()
        training = self._config.training
        self._factor = schedule(
            training.lr_scheduler_type, warmup_steps=training.warmup_steps, num_steps=self._plan.num_steps
        )

    def carry_out(self) -> RunResult:
        """Take the remaining steps, until the end or until a stop is requested."""
        output, num_steps = self._output, self._plan.num_steps
        if output.last_step == 0:
            self._ask("before")
            self._evaluate(0)
        started_s, first = time.monotonic(), output.last_step
        for step in range(first + 1, num_steps + 1):
            if output.stops_early():
                break
            record = self._step(step)
            output.record(record)
            seconds_left = (time.monotonic() - started_s) / (step - first) * (num_steps - step)
            self._callback.stepped(record, num_steps=num_steps, seconds_left=seconds_left)
            if evaluates_after(step, self._config, self._plan.steps_per_epoch, num_steps):
                self._evaluate(step)
            stops, saves = self._agreed(step)
            if stops or saves:
                self._save(step)
            if stops and step < num_steps:
                return output.result(finished=False)
        output.finish()
        self._ask("after")
        return output.result(finished=True)

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
            raise self._output.with_resume_hint(error) from error
        seconds = time.perf_counter() - started_s
        self._output.last_step = step
        memory = self._monitor.end_step(step)
        return TrainStep(
            **self._output.at(step),
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
            raise self._output.with_resume_hint(NonFiniteError(cause, "Lower training.learning_rate."))
        self._output.evaluated(step, eval_loss)
        self._callback.evaluated(step, eval_loss)

    def _agreed(self, step: int) -> tuple[bool, bool]:
        """Return whether any process was asked to stop, and whether the first one is to save now."""
        saves = self._saves_after(step) or self._output.is_new_best(step)
        stops, saves_too = self._processes.sums([self._stop.requested, saves and self._processes.is_first])
        return stops > 0, saves_too > 0

    def _saves_after(self, step: int) -> bool:
        settings = self._config.checkpoint
        minutes = (time.monotonic() - self._last_saved_s) / 60
        by_steps = settings.save_every_steps > 0 and step % settings.save_every_steps == 0
        return by_steps or 0 < settings.save_every_minutes <= minutes

    def _save(self, step: int) -> None:
        self._last_saved_s = time.monotonic()
        self._output.save(step)
        self._last_saved_s = time.monotonic()  # from its end on

    def _ask(self, when: When) -> None:
        if self._processes.is_first and self._config.training.sample_questions:
            with self._monitor.phase("eval"):
                given = ask(self._prepared, self._loaded.store, self._output.folder, when)
            self._callback.answered(when, given)


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
