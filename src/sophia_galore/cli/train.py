"""`sophia-galore train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from sophia_galore.cli.arguments import (
    DEFAULT_CONFIG,
    ConfigOption,
    OptimizerOption,
    Overrides,
    expanded_text,
    read_config,
)
from sophia_galore.cli.bars import memory_bar
from sophia_galore.cli.show import Terminal
from sophia_galore.config.paths import has_date
from sophia_galore.config.size import bytes_in_words
from sophia_galore.distributed.launch import is_first_on_machine, is_first_process
from sophia_galore.errors import ConfigError, EnvironmentProblem, lacks_package, short
from sophia_galore.records.files import ANSWERS
from sophia_galore.records.memory import MemoryReport
from sophia_galore.records.run import Answers
from sophia_galore.report.plots import plot_experts, plot_loss, plot_memory
from sophia_galore.train import run
from sophia_galore.train.checkpoint import checkpoints

_FAR_OFF = 0.05
"""A warning is shown if the prediction is off by more than this share."""


def train(
    overrides: Overrides = None,
    config: ConfigOption = DEFAULT_CONFIG,
    optimizer: OptimizerOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            callback=expanded_text,
            help="Go on from the run's newest complete checkpoint, or from the one named.",
        ),
    ] = None,
) -> None:
    """Fine-tune all weights of a model."""
    try:
        asked = read_config(config, optimizer, overrides)
    except ConfigError:
        if is_first_on_machine():
            raise
        raise typer.Exit(2) from None  # all processes of a machine read the same words and files
    terminal = Terminal(asked.training.logging_steps)
    words = ["train", "--config", str(config), *(["--optimizer", optimizer] if optimizer else []), *(overrides or [])]
    try:
        result = run.train(
            asked,
            terminal,
            resume=resume is not None,
            resume_from=None if resume in (None, "latest") else Path(resume),
            command=shlex.join(["sophia-galore", *words]),
            config_file=config,
        )
    finally:
        terminal.clear_status()
    if not is_first_process():
        return
    if not result.finished:
        terminal.say(f"Stopped after step {result.step}; saved in {result.saved}.")
        # After going back to an older checkpoint, the newest one is not the one that was just made.
        # Nor is a folder with a date in its name the newest one, if another run was begun meanwhile.
        is_newest = checkpoints(result.folder)[-1:] == [result.saved] and not has_date(asked.training.output_dir)
        words.insert(3, "--resume" if is_newest else f"--resume={result.saved}")
        terminal.say(f"Go on with: sophia-galore {shlex.join(words)}")
        return
    pictures = _draw(terminal, result.folder)
    _compare_answers(terminal, result.folder)
    if evaluations := result.evaluations:
        first, after = evaluations[0], (result.exported or evaluations[-1]).loss
        start = f"after step {first.step}" if first.step else "before"
        terminal.console.print(
            f"Eval loss {first.loss:.4f} {start}, {after:.4f} after training: {after - first.loss:+.4f} nats a token.",
            style="bold green" if after < first.loss else "bold red",
        )
    memory = result.memory
    # Without tracked steps the categories of the peak are unknown.
    if any(memory.categories.values()):
        terminal.console.print(memory_bar(memory.categories, limit_bytes=memory.limit_bytes))
    limit = f" (memory.limit: {bytes_in_words(memory.limit_bytes)})" if memory.limit_bytes else ""
    terminal.say(
        f"Peak memory: {bytes_in_words(memory.peak_allocated_bytes or 0)} allocated{limit}, "
        f"{bytes_in_words(memory.peak_reserved_bytes or 0)} reserved, "
        f"{bytes_in_words(memory.peak_process_bytes or 0)} resident ({memory.measured_by})."
    )
    if predicted := prediction_line(memory):
        terminal.console.print(predicted)
    terminal.say(f"Model, records and reports: {result.folder}")
    terminal.say(f"Pictures: {pictures}")


def prediction_line(memory: MemoryReport) -> Text | None:
    """Compare the predicted peak memory with the measured one; warn if they are far apart.

    Args:
        memory: The run's memory report.

    Returns:
        A sentence; None if nothing was predicted.
    """
    predicted_bytes, ratio = memory.predicted_peak_bytes, memory.predicted_ratio
    if predicted_bytes is None:
        return None
    size = bytes_in_words(predicted_bytes)
    if memory.adaptations:
        return Text(f"Predicted: {size} for what was asked; memory ran out, so less was taken at once.")
    if ratio is None:
        return Text(f"Predicted: {size}.")
    said = f"Predicted: {size}, {ratio:.2f} of what was measured"
    if 1 - _FAR_OFF <= ratio <= 1 + _FAR_OFF:
        return Text(f"{said}.")
    wrong = "low, so do not rely on it near the limit" if ratio < 1 else "high, so a plan may refuse what would fit"
    return Text(f"{said}: more than {_FAR_OFF:.0%} too {wrong}.", style="bold yellow")


def _draw(terminal: Terminal, folder: Path) -> str:
    """Draw the pictures; a missing package, a full disk or little memory does not fail a finished run."""
    try:
        drawn = [plot_loss(folder), plot_memory(folder), plot_experts(folder)]
        return ", ".join(str(path) for path in drawn if path is not None)
    except (EnvironmentProblem, OSError, MemoryError) as error:
        return f"none. {short(error)}"
    except ModuleNotFoundError as error:
        problem = lacks_package(error)
        if problem is None:
            raise
        return f"none. {problem.cause} {problem.remedy}"


def _compare_answers(terminal: Terminal, folder: Path) -> None:
    if not (folder / ANSWERS).exists():
        return
    answers = Answers.read(folder / ANSWERS)
    for question, after in answers.after.items():
        terminal.console.print(question, style="bold cyan", markup=False)
        terminal.console.print(f"  before: {answers.before.get(question, '-')}", style="dim", markup=False)
        terminal.console.print(f"  after:  {after}", markup=False)
