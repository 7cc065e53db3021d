"""`sophia-galore plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from sophia_galore.cli.arguments import DEFAULT_CONFIG, OptimizerOption, Overrides, expanded, given_overrides, there
from sophia_galore.cli.plan_tables import plan_of, show_estimate, show_fit
from sophia_galore.cli.write_back import refuse_other_than_png, replace_between_marks, text_between_marks, write_config
from sophia_galore.config import RunConfig, load_config
from sophia_galore.config.size import bytes_in_words, parse_size
from sophia_galore.errors import ArgumentError, ModelError, UserError
from sophia_galore.memory.fitting import as_overrides, find_settings
from sophia_galore.memory.matrix import LIMITS, markdown, matrix, read_rows
from sophia_galore.memory.planner import MemoryEstimate, Planner, find_planner
from sophia_galore.memory.timeline import points_of
from sophia_galore.model.specifications import SPECIFICATIONS
from sophia_galore.records.memory import Timeline
from sophia_galore.report.plots import plot_timeline

_FITTED = Path("fitted.yaml")
_MARKS = "plan --matrix"


def plan(
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", callback=expanded, help=f"The run's YAML file; without --model {DEFAULT_CONFIG} is taken."
        ),
    ] = None,
    optimizer: OptimizerOption = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Short for model.name=...; needs no file.")] = None,
    memory: Annotated[str | None, typer.Option(help="The card's memory, such as 4GiB; short for memory.limit.")] = None,
    host_memory: Annotated[
        str | None,
        typer.Option(help="Host memory for weights and states, such as 16GiB; short for memory.host_limit."),
    ] = None,
    device: Annotated[
        Literal["cuda", "cpu"] | None,
        typer.Option(help="Plan for a CUDA card, which need not be here, or for this CPU; short for training.device."),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="Processes that share the effective batch, as `torchrun` starts them.")
    ] = 1,
    fit: Annotated[bool, typer.Option("--fit", help="Find settings that fit, and write them to a file.")] = False,
    shorter: Annotated[
        bool, typer.Option("--allow-shorter", help="With --fit: max_length may be lowered, if nothing else is enough.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            callback=expanded, help=f"With --fit: the file to write ({_FITTED}); with --matrix: a text with its marks."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    picture: Annotated[
        Path | None, typer.Option(callback=expanded, help="Draw the course of memory over a step to this PNG.")
    ] = None,
    all_models: Annotated[
        bool,
        typer.Option(
            "--matrix", help="A table of built-in models: what fits into which card, and how; of all, or --model A,B."
        ),
    ] = False,
) -> None:
    """Tell what a run will need, by phase and category, without weights and without a GPU; nothing is downloaded."""
    short = {
        "optimizer.type": optimizer,
        "model.name": None if all_models else model,
        "memory.limit": memory,
        "training.device": device,
    }
    words = given_overrides({**short, "memory.host_limit": host_memory}, overrides)
    for name, size in (("--memory", memory), ("--host-memory", host_memory)):
        if size is not None:
            parse_size(size, name=name, zero=name == "--host-memory")
    asked = load_config(None if config is None and (model or all_models) else there(config or DEFAULT_CONFIG), words)
    if all_models:
        _show_matrix(asked, [] if model is None else model.split(","), output)
        return
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        if not as_json:
            console.print(text, markup=False)

    planner = find_planner(asked, say, reads_data=config is not None or model is None, num_processes=processes)
    if fit:
        _fit(planner, asked, output, console, as_json=as_json, may_shorten=shorter)
        return
    estimate = planner.estimate(asked)
    if estimate is None:
        raise ModelError(
            "What layers that bitsandbytes holds take while they compute is its own affair, and not predicted.",
            "Use quantization.backend=native, or let the probe step of `train` find out.",
        )
    if as_json:
        print(json.dumps(plan_of(planner, asked, estimate), indent=2))
    else:
        show_estimate(console, planner, asked, estimate)
    if picture is not None:
        say(f"Picture: {_draw(picture, asked, estimate)}")


def _fit(
    planner: Planner, asked: RunConfig, output: Path | None, console: Console, *, as_json: bool, may_shorten: bool
) -> None:
    budget = planner.budget(asked)
    if budget is None:
        raise ArgumentError("--fit needs a limit to fit into.", "Say how much there is: --memory 4GiB.")
    found = find_settings(planner, asked, budget, may_shorten=may_shorten)
    estimate = found.estimate
    if as_json:
        print(json.dumps(plan_of(planner, found.config or asked, estimate, found), indent=2))
    else:
        show_fit(console, found, budget)
    if found.config is None:
        needed = found.forecast.peak_bytes + budget.reserve_bytes
        hint = "" if may_shorten else "Let examples be shorter (--allow-shorter), "
        raise UserError(
            f"No settings fit into {bytes_in_words(budget.limit_bytes)}: the least found needs "
            f"{bytes_in_words(needed)}, {bytes_in_words(budget.reserve_bytes)} in reserve included.",
            f"{hint or 'Take '}{'take ' if hint else ''}a smaller model or a larger card.",
        )
    path = write_config(found.config, output or _FITTED)
    if not as_json:
        if found.changes:
            console.print(f"As words for the command line: {as_overrides(found.changes)}", markup=False)
        console.print(f"Written: {path}. Train with: sophia-galore train --config {path}", markup=False)
        show_estimate(console, planner, found.config, estimate)


def _show_matrix(asked: RunConfig, models: Sequence[str], output: Path | None) -> None:
    """Print the table, or replace rows of the one in a file; without names, those of all models."""
    rows = {} if output is None else read_rows(text_between_marks(output, _MARKS))
    for row in matrix(asked, models or [*(rows or (known.name for known in SPECIFICATIONS))], LIMITS):
        rows[row.model] = row
        if output is not None:
            print(f"{row.model}: {', '.join(cell or '-' for cell in row.cells)}", flush=True)
            replace_between_marks(output, _MARKS, markdown(rows.values(), LIMITS))
    if output is None:
        print(markdown(rows.values(), LIMITS))


def _draw(picture: Path, asked: RunConfig, estimate: MemoryEstimate) -> Path:
    refuse_other_than_png(picture)
    return plot_timeline(
        Timeline(step=estimate.forecast.step, points=points_of(estimate.forecast.segments)),
        picture,
        title=f"{asked.model.name}: memory over one step, as planned",
        limit_bytes=estimate.budget.tensor_bytes if estimate.budget else None,
        predicted_peak_bytes=estimate.forecast.peak_bytes,
    )
