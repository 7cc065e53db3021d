"""What a comparison says, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sophia_galore.records import files
from sophia_galore.records.report import GroupNumbers, RunNumbers, Spread
from sophia_galore.records.run import Machine
from sophia_galore.report.comparison import Comparison
from sophia_galore.report.document import Code, Document, Paragraph, Part, Picture, Points, Section, Table
from sophia_galore.report.run import Run
from sophia_galore.report.style import mebibytes
from sophia_galore.report.warnings import differing_keys

LOSSES = Picture(files.LOSSES_PICTURE, "Eval loss of each run against tokens and against time")
CATEGORIES = Picture(files.CATEGORIES_PICTURE, "What the peak memory of each run consists of")

_UNKNOWN = "-"
_NO_SPREAD = 1e-3
"""A spread of a size that is a smaller part of it than this is not written."""


def document_of(comparison: Comparison) -> Document:
    """The report of some runs.

    Args:
        comparison: What was read of them.
    """
    groups, runs = comparison.groups, comparison.numbers
    names = [group.name for group in groups]
    title = f"Run: {names[0]}" if len(runs) == 1 else "Comparison: " + ", ".join(names)
    opening: list[Part] = [Paragraph(_finding(groups))]
    if comparison.warnings:
        opening.append(Points([warning.message for warning in comparison.warnings], warns=True))
    sections = [
        Section("Eval loss", [_losses(groups), LOSSES]),
        Section("Memory", [_memory(groups), CATEGORIES]),
        Section("Time", [_time(groups)]),
    ]
    if len(runs) > len(groups):
        sections.append(Section("Run by run", [_each(runs)]))
    if len(groups) > 1:
        sections.append(Section("What differs in the settings", [_settings(comparison.runs)]))
    sections.append(Section("How it was made", _making(comparison)))
    return Document(title, opening, sections)


def _finding(groups: Sequence[GroupNumbers]) -> str:
    """What a reader wants to know first."""
    done = [group for group in groups if group.final_eval_loss is not None]
    if not done:
        return "No run is finished and evaluated yet."
    ordered = sorted(done, key=lambda group: group.final_eval_loss.mean if group.final_eval_loss else 0.0)
    best = ordered[0]
    assert best.final_eval_loss is not None
    lowest = best.final_eval_loss.mean
    said = f"Lowest eval loss at the end: {best.name}, {_number(best.final_eval_loss)} nats a token"
    others = [
        f"{group.name} {group.final_eval_loss.mean / lowest - 1:+.2%}"
        for group in ordered[1:]
        if group.final_eval_loss is not None
    ]
    said += f"; against it {', '.join(others)}." if others else "."
    measured = [group for group in groups if group.peak_allocated_bytes is not None]
    if len(groups) > 1 and measured:
        least = min(measured, key=lambda group: group.peak_allocated_bytes.mean if group.peak_allocated_bytes else 0.0)
        said += f" Least memory: {least.name}, {_size(least.peak_allocated_bytes)} allocated at the peak."
    return said


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


def _each(runs: Sequence[RunNumbers]) -> Table:
    num_epochs = max(len(run.eval_loss) for run in runs)
    columns = ["run", "seed", "steps", "before", *(f"epoch {number + 1}" for number in range(num_epochs))]
    columns += ["peak allocated", "tokens a second"]
    rows = []
    for run in runs:
        losses = [f"{loss:.4f}" for loss in run.eval_loss]
        rows.append(
            [
                run.name,
                str(run.seed),
                f"{run.step} of {run.num_steps}" + (", ended early" if run.ended_early else ""),
                _UNKNOWN if run.eval_loss_before is None else f"{run.eval_loss_before:.4f}",
                *losses,
                *[_UNKNOWN] * (num_epochs - len(losses)),
                _UNKNOWN if run.peak_allocated_bytes is None else mebibytes(run.peak_allocated_bytes),
                _UNKNOWN if run.tokens_per_second is None else f"{run.tokens_per_second:.1f}",
            ]
        )
    return Table(columns, rows)


def _settings(runs: Sequence[Run]) -> Part:
    first_of: dict[str, Run] = {}
    for run in runs:
        first_of.setdefault(run.name, run)
    several = list(first_of.values())
    # Seeds differ among the runs of one name, and folders always do.
    keys = [key for key in differing_keys(several) if key not in ("training.output_dir", "training.seed")]
    if not keys:
        return Paragraph("Nothing.")
    rows = [[key, *(_value(run.config.get(key)) for run in several)] for key in keys]
    return Table(["key", *first_of], rows, words=True)


def _making(comparison: Comparison) -> list[Part]:
    plan = comparison.runs[0].plan
    lines = [
        f"Model: {plan.model_name} ({plan.num_parameters:,} parameters), {plan.compute_dtype} arithmetic on "
        f"{plan.device}.",
        f"Data: {plan.num_train_examples} examples to train on, {plan.num_eval_examples} to measure on; "
        f"fingerprint {comparison.data_fingerprint or 'not the same for all'}.",
        f"Steps: {plan.num_steps}, {plan.steps_per_epoch} an epoch.",
    ]
    lines += [f"{run_label}: {said}." for run_label, said in _endings(comparison)]
    machine, versions = comparison.environment.machine, comparison.environment.versions
    if machine.model_fields_set:
        lines.append(f"Machine: {_in_words(machine)}.")
    if versions:
        lines.append("Versions: " + ", ".join(f"{name} {value}" for name, value in versions.items()) + ".")
    if comparison.date:
        lines.append(f"Begun: {comparison.date}.")
    lines += [
        "A number with ± is a mean over seeds and its sample standard deviation. A difference is taken within each "
        "seed, so that what seeds have in common is not in its spread.",
        "Time is that of optimizer steps, without evaluations; memory is the peak of the whole run"
        + _measured_by(comparison.runs)
        + ".",
    ]
    parts: list[Part] = [Points(lines)]
    commands = [comparison.command, *(run.environment.command for run in comparison.runs)]
    if typed := [command for command in commands if command]:
        parts.append(Code(typed))
    return parts


def _endings(comparison: Comparison) -> list[tuple[str, str]]:
    """For each run that did not simply go through all steps and end with the last model, what it did."""
    found = []
    for run, numbers in zip(comparison.runs, comparison.numbers, strict=True):
        said = [f"ended early, after step {numbers.step} of {numbers.num_steps}"] if numbers.ended_early else []
        if numbers.exported_eval_loss is not None:
            said.append(
                f"the final model is the best one, after step {numbers.exported_step}, with an eval loss of "
                f"{numbers.exported_eval_loss:.4f}"
            )
        if said:
            found.append((run.label, "; ".join(said)))
    return found


def _measured_by(runs: Sequence[Run]) -> str:
    ways = dict.fromkeys(run.memory.measured_by for run in runs if run.memory and run.memory.measured_by)
    return f", by {next(iter(ways))}" if len(ways) == 1 else ""


def _in_words(machine: Machine) -> str:
    """`2 cores, AMD EPYC, threads: 2, 24,105 MiB, Linux-6.1`"""
    words = [
        machine.gpu or "",
        f"{machine.num_cores} cores, {machine.processor}, threads: {machine.num_threads}",
        mebibytes(machine.memory_bytes or 0),
        str(machine.system),
    ]
    return ", ".join(word for word in words if word)


def _number(value: Spread | None, *, digits: int = 4, signed: bool = False) -> str:
    if value is None:
        return _UNKNOWN
    sign = "+" if signed else ""
    said = f"{value.mean:{sign}.{digits}f}"
    return said if value.deviation is None else f"{said} ± {value.deviation:.{digits}f}"


def _size(value: Spread | None) -> str:
    if value is None:
        return _UNKNOWN
    if value.deviation is None or value.deviation < _NO_SPREAD * value.mean:
        return mebibytes(value.mean)
    return f"{mebibytes(value.mean)} ± {mebibytes(value.deviation)}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) else f"{share:.1%}"


def _value(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
