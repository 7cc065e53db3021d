"""The sections of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median_low
from typing import Any

from sophia_galore.records import files
from sophia_galore.records.metrics import use_of_experts
from sophia_galore.records.report import GroupNumbers, RunNumbers, Spread
from sophia_galore.records.run import Machine
from sophia_galore.report.comparison import Comparison
from sophia_galore.report.document import Bullets, Code, Document, Paragraph, Part, Picture, Section, Table
from sophia_galore.report.run import Run
from sophia_galore.report.style import mebibytes
from sophia_galore.report.warnings import differing_keys

LOSSES = Picture(files.LOSSES_PICTURE, "Eval loss of each run against tokens and against time")
CATEGORIES = Picture(files.CATEGORIES_PICTURE, "What the peak memory of each run consists of")

_MISSING = "-"
_SMALLEST_SPREAD = 1e-3
"""The deviation of a size is not shown if it is a smaller share of the mean than this."""


def build_document(comparison: Comparison) -> Document:
    """Build the report of one or more runs.

    Args:
        comparison: The runs and their numbers.
    """
    groups, runs = comparison.groups, comparison.numbers
    names = [group.name for group in groups]
    title = f"Run: {names[0]}" if len(runs) == 1 else "Comparison: " + ", ".join(names)
    opening: list[Part] = [Paragraph(_summary(groups))]
    if comparison.warnings:
        opening.append(Bullets([warning.message for warning in comparison.warnings], warning=True))
    sections = [
        Section("Eval loss", [_losses(groups), LOSSES]),
        Section("Memory", [_memory(groups), CATEGORIES]),
        Section("Time", [_time(groups)]),
    ]
    if len(runs) > len(groups) or any(run.waiting_share is not None for run in runs):
        sections.append(Section("Run by run", [_per_run(runs)]))
    if len(groups) > 1:
        sections.append(Section("What differs in the settings", [_settings(comparison.runs)]))
    sections.append(Section("How it was made", _provenance(comparison)))
    return Document(title, opening, sections)


def _summary(groups: Sequence[GroupNumbers]) -> str:
    """Return the main result: which runs have the lowest eval loss and the lowest peak memory."""
    losses = {group.name: group.final_eval_loss for group in groups if group.final_eval_loss is not None}
    if not losses:
        return "No run is finished and evaluated yet."
    best, *others = sorted(losses, key=lambda name: losses[name].mean)
    text = f"Lowest eval loss at the end: {best}, {_number(losses[best])} nats a token"
    ratios = [f"{name} {losses[name].mean / losses[best].mean - 1:+.2%}" for name in others]
    text += f"; against it {', '.join(ratios)}." if ratios else "."
    peaks = {group.name: group.peak_allocated_bytes for group in groups if group.peak_allocated_bytes is not None}
    if len(groups) > 1 and peaks:
        least = min(peaks, key=lambda name: peaks[name].mean)
        text += f" Least memory: {least}, {_size(peaks[least])} allocated at the peak."
    return text


def _losses(groups: Sequence[GroupNumbers]) -> Table:
    num_epochs = max((len(group.eval_loss) for group in groups), default=0)
    columns = ["run", "optimizer", "seeds", *(f"epoch {number + 1}" for number in range(num_epochs))]
    if len(groups) > 1:
        columns.append("against the first")
    rows = []
    for group in groups:
        losses = [*group.eval_loss, *[None] * (num_epochs - len(group.eval_loss))]
        row = [group.name, group.optimizer, str(len(group.seeds)), *(_number(loss) for loss in losses)]
        if len(groups) > 1:
            row.append(_number(group.difference, signed=True))
        rows.append(row)
    return Table(columns, rows)


def _memory(groups: Sequence[GroupNumbers]) -> Table:
    columns = ["run", "peak allocated", "peak reserved", "peak process", "optimizer state", "parameters trained"]
    rows = [
        [
            group.name,
            _size(group.peak_allocated_bytes),
            _size(group.peak_reserved_bytes),
            _size(group.peak_process_bytes),
            mebibytes(group.state_bytes),
            _percent(group.trained_fraction),
        ]
        for group in groups
    ]
    return Table(columns, rows)


def _time(groups: Sequence[GroupNumbers]) -> Table:
    rows = [
        [group.name, _number(group.seconds_per_epoch, digits=1), _number(group.tokens_per_second, digits=1)]
        for group in groups
    ]
    return Table(["run", "seconds an epoch", "tokens a second"], rows)


def _per_run(runs: Sequence[RunNumbers]) -> Table:
    num_epochs = max(len(run.eval_loss) for run in runs)
    columns = ["run", "seed", "steps", "before", *(f"epoch {number + 1}" for number in range(num_epochs))]
    columns += ["peak allocated", "tokens a second"]
    streams = any(run.waiting_share is not None for run in runs)
    columns += ["waited for weights"] if streams else []
    rows = []
    for run in runs:
        losses = [f"{loss:.4f}" for loss in run.eval_loss]
        rows.append(
            [
                run.name,
                str(run.seed),
                f"{run.step} of {run.num_steps}" + (", ended early" if run.ended_early else ""),
                _MISSING if run.eval_loss_before is None else f"{run.eval_loss_before:.4f}",
                *losses,
                *[_MISSING] * (num_epochs - len(losses)),
                _MISSING if run.peak_allocated_bytes is None else mebibytes(run.peak_allocated_bytes),
                _MISSING if run.tokens_per_second is None else f"{run.tokens_per_second:.1f}",
                *([_MISSING if run.waiting_share is None else _percent(run.waiting_share)] if streams else []),
            ]
        )
    return Table(columns, rows)


def _settings(runs: Sequence[Run]) -> Part:
    first_of: dict[str, Run] = {}
    for run in runs:
        first_of.setdefault(run.name, run)
    several = list(first_of.values())
    # The runs of one name have different seeds, and all runs have different folders.
    keys = [key for key in differing_keys(several) if key not in ("training.output_dir", "training.seed")]
    if not keys:
        return Paragraph("Nothing.")
    rows = [[key, *(_value(run.config.get(key)) for run in several)] for key in keys]
    return Table(["key", *first_of], rows, text=True)


def _provenance(comparison: Comparison) -> list[Part]:
    plan = comparison.runs[0].plan
    lines = [
        f"Model: {plan.model_name} ({plan.num_parameters:,} parameters), {plan.compute_dtype} arithmetic on "
        f"{plan.device}.",
        f"Data: {plan.num_train_examples} training examples, {plan.num_eval_examples} evaluation examples; "
        f"fingerprint {comparison.data_fingerprint or 'not the same for all'}.",
        f"Steps: {plan.num_steps}, {plan.steps_per_epoch} an epoch.",
    ]
    lines += [f"{label}: {outcome}." for label, outcome in _endings(comparison)]
    machine, versions = comparison.environment.machine, comparison.environment.versions
    if machine.model_fields_set:
        lines.append(f"Machine: {_describe_machine(machine)}.")
    lines += [f"{run.label}: {_processes(run)}." for run in comparison.runs if run.environment.processes]
    lines += [f"{run.label}: {words}." for run in comparison.runs if (words := _experts(run))]
    if versions:
        lines.append("Versions: " + ", ".join(f"{name} {value}" for name, value in versions.items()) + ".")
    if comparison.date:
        lines.append(f"Begun: {comparison.date}.")
    lines += [
        "A number with ± is a mean over seeds and its sample standard deviation. A difference is taken within each "
        "seed, so its spread does not contain what the runs of a seed have in common.",
        "Time is that of optimizer steps, without evaluations; memory is the peak of the whole run"
        + _measured_by(comparison.runs)
        + ".",
    ]
    parts: list[Part] = [Bullets(lines)]
    commands = [comparison.command, *(run.environment.command for run in comparison.runs)]
    if typed := [command for command in commands if command]:
        parts.append(Code(typed))
    return parts


def _processes(run: Run) -> str:
    """Return the processes of a run as text: machines, what they sum in most steps, and their peaks of memory."""
    counts = Counter(run.environment.processes)
    words = ", ".join(f"{count} on {machine}" for machine, count in counts.items())
    sent = [line.summed_bytes for line in run.metrics.train if line.summed_bytes is not None]
    summed = f"; in most steps they sum {mebibytes(median_low(sent))} of gradients" if sent else ""
    peaks = [each.peak_allocated_bytes for each in run.memory.processes] if run.memory else []
    known = [mebibytes(peak) for peak in peaks if peak is not None]
    return f"{sum(counts.values())} processes, {words}{summed}" + (f"; peaks {', '.join(known)}" if known else "")


def _experts(run: Run) -> str:
    """Return how tokens were dealt to experts, as text; empty if there are none."""
    train = [line for line in run.metrics.train if line.tokens_per_expert]
    use = use_of_experts(train)
    if use is None:
        return ""
    largest, idle = use
    return (
        f"{len(train[-1].tokens_per_expert or ())} experts; one got {largest:.0%} of a layer's choices at most, "
        f"{idle:.1f} experts had no token in a step on average, and the routers' entropy went from "
        f"{train[0].router_entropy or 0.0:.2f} to {train[-1].router_entropy or 0.0:.2f} nats"
    )


def _endings(comparison: Comparison) -> list[tuple[str, str]]:
    """Return label and outcome of each run that ended early or whose final model is the best one."""
    found = []
    for run, numbers in zip(comparison.runs, comparison.numbers, strict=True):
        outcome = [f"ended early, after step {numbers.step} of {numbers.num_steps}"] if numbers.ended_early else []
        if numbers.exported_eval_loss is not None:
            outcome.append(
                f"the final model is the best one, after step {numbers.exported_step}, with an eval loss of "
                f"{numbers.exported_eval_loss:.4f}"
            )
        if outcome:
            found.append((run.label, "; ".join(outcome)))
    return found


def _measured_by(runs: Sequence[Run]) -> str:
    ways = dict.fromkeys(run.memory.measured_by for run in runs if run.memory and run.memory.measured_by)
    return f", by {next(iter(ways))}" if len(ways) == 1 else ""


def _describe_machine(machine: Machine) -> str:
    """Return a machine as text, such as `2 cores, AMD EPYC, threads: 2, 24,105 MiB, Linux-6.1`."""
    words = [
        machine.gpu or "",
        f"{machine.num_cores} cores, {machine.processor}, threads: {machine.num_threads}",
        mebibytes(machine.memory_bytes or 0),
        str(machine.system),
    ]
    return ", ".join(word for word in words if word)


def _number(value: Spread | None, *, digits: int = 4, signed: bool = False) -> str:
    if value is None:
        return _MISSING
    sign = "+" if signed else ""
    mean = f"{value.mean:{sign}.{digits}f}"
    return mean if value.deviation is None else f"{mean} ± {value.deviation:.{digits}f}"


def _size(value: Spread | None) -> str:
    if value is None:
        return _MISSING
    if value.deviation is None or value.deviation < _SMALLEST_SPREAD * value.mean:
        return mebibytes(value.mean)
    return f"{mebibytes(value.mean)} ± {mebibytes(value.deviation)}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
