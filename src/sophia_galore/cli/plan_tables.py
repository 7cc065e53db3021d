"""A memory plan on the terminal, and as JSON."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sophia_galore.cli.bars import memory_bar, print_wide
from sophia_galore.config import RunConfig
from sophia_galore.config.dump import flatten
from sophia_galore.config.size import bytes_in_words
from sophia_galore.memory.budget import Budget
from sophia_galore.memory.fitting import Fit, as_overrides
from sophia_galore.memory.planner import MemoryEstimate, Planner
from sophia_galore.memory.transfers import USUAL, measure, transfers_of
from sophia_galore.plan.placements import Streamed, device_bytes
from sophia_galore.plan.route import Route
from sophia_galore.plan.rules import compute_dtype
from sophia_galore.plan.traffic import Traffic, traffic_of

# Bytes a second of a network of 1 Gbit/s.
_ETHERNET = 1.25e8

# The keys that memory depends on.
_SETTINGS = (
    "model.name",
    "model.store",
    "training.device",
    "training.max_length",
    "training.batch_size",
    "training.gradient_accumulation_steps",
    "training.gradient_checkpointing",
    "training.max_grad_norm",
    "optimizer.type",
    "optimizer.state_bits",
    "optimizer.galore.rank",
    "optimizer.galore.projection_bits",
    "quantization.enabled",
    "quantization.load_in_8bit",
    "quantization.backend",
    "memory.limit",
    "memory.reserve",
    "memory.logits_chunk_mib",
    "memory.placement",
    "memory.resident_layers",
    "memory.host_limit",
    "memory.activations",
    "distributed.shard_state",
)


def plan_of(planner: Planner, config: RunConfig, estimate: MemoryEstimate, found: Fit | None = None) -> dict[str, Any]:
    """Return the plan as plain data.

    Args:
        planner: The planner of this model and data.
        config: The settings.
        estimate: The memory that they need, and the budget.
        found: The search that found them, with --fit.
    """
    decided, forecast, budget = planner.decide(config), estimate.forecast, estimate.budget
    streamed = estimate.streamed
    values = flatten(config)
    plan: dict[str, Any] = {
        "model": config.model.name,
        "source": planner.source,
        "num_parameters": sum(route.num_elements for route in decided.routes),
        "device": planner.facts.device.place,
        "compute_dtype": str(decided.compute_dtype).removeprefix("torch."),
        "planned_for": planner.workload(config).source,
        "predicted_peak_bytes": forecast.peak_bytes,
        "phases": dict(forecast.phases),
        "categories": dict(forecast.categories),
        "standing_bytes": device_bytes(decided.routes, streamed),
        "limit_bytes": budget.limit_bytes if budget else None,
        "reserve_bytes": budget.reserve_bytes if budget else None,
        "left_bytes": budget.tensor_bytes - forecast.peak_bytes if budget else None,
        "fits": estimate.fits,
        "host_bytes": estimate.host_bytes,
        "host_limit_bytes": estimate.host_limit_bytes,
        "disk_bytes": streamed.bytes_in("disk"),
        "resident_layers": streamed.num_resident_layers,
        "buffer_bytes": streamed.buffer_bytes,
        "num_processes": planner.facts.num_processes,
        "traffic": vars(traffic_of(decided.routes)) if planner.facts.num_processes > 1 else None,
        "transfers": _transfers(planner, config, decided.routes, streamed) if streamed.units else None,
        "settings": {key: values[key] for key in _SETTINGS}
        | {"engine.keep_layers": forecast.keep_layers, "engine.full_gradients": planner.full_gradients(config)},
        "notes": [verdict.sentence() for verdict in decided.verdicts],
    }
    if found is not None:
        plan["changes"] = dict(found.changes)
        plan["tried"] = [
            {
                "changed": tried.name,
                "changes": dict(tried.changes),
                "predicted_peak_bytes": tried.need.peak_bytes,
                "at_least": not tried.need.is_known,
                "host_bytes": tried.need.host_bytes,
                "fits": tried.fits,
                "slowdown": round(tried.slowdown, 3),
            }
            for tried in found.tries
        ]
    return plan


def _transfers(planner: Planner, config: RunConfig, routes: Sequence[Route], streamed: Streamed) -> dict[str, Any]:
    """Return what moves in a step, and from how many tokens that hides behind computation."""
    device = planner.facts.device
    is_here = device.is_cpu or device.total_bytes is not None
    machine = (
        measure(torch.device(device.place), compute_dtype(planner.facts), Path(tempfile.gettempdir()))
        if is_here
        else USUAL
    )
    num_tokens = sum(batch.num_tokens for batch in planner.workload(config).train)
    return {
        "machine": vars(machine),
        "tokens": num_tokens,
        **vars(transfers_of(streamed, routes, num_tokens, machine)),
    }


def _transfer_words(found: dict[str, Any]) -> list[str]:
    machine = found["machine"]
    usual = "assumed: 10 TFLOP/s, 10 GB/s to the device, 2 GB/s from disk and 1 GB/s to it"
    known = "measured here" if machine["measured"] else usual
    words = [
        f"A step of {found['tokens']} tokens moves {found['read_bytes'] / 1e9:.1f} GB in and "
        f"{found['written_bytes'] / 1e9:.1f} GB out: about {found['move_s']:.1f} s, against {found['compute_s']:.1f} s "
        f"of computation ({known}).",
    ]
    if found["hidden_from_tokens"] > found["tokens"]:
        words.append(
            f"From about {found['hidden_from_tokens']} tokens a step the transfers hide behind the computation: raise "
            "training.gradient_accumulation_steps."
        )
    return words


def _traffic_words(traffic: Traffic, num_processes: int) -> str:
    seconds = 2 * (num_processes - 1) / num_processes * traffic.usual_bytes / _ETHERNET
    return (
        f"That is for each of {num_processes} processes. In a step they sum {bytes_in_words(traffic.usual_bytes)} of "
        f"gradients, {traffic.share:.0%} of the whole ones ({bytes_in_words(traffic.whole_bytes)}), which are summed "
        f"only for new bases: {seconds:.1f} s over 1 Gbit/s, beside the computation."
    )


def show_estimate(console: Console, planner: Planner, config: RunConfig, estimate: MemoryEstimate) -> None:
    """Print the memory that a configuration needs, by phase and category, and whether it fits."""
    plan, forecast, budget = plan_of(planner, config, estimate), estimate.forecast, estimate.budget
    console.print(
        f"{plan['model']} ({plan['source']}): {plan['num_parameters'] / 1e6:.1f} M parameters, "
        f"{planner.num_layers} layers; {config.optimizer.type}, {plan['device']}, {plan['compute_dtype']} arithmetic.",
        markup=False,
    )
    console.print(f"Planned for {plan['planned_for']}.", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("phase", "most at once"):
        table.add_column(name, justify="right" if name != "phase" else "left")
    for phase, size in forecast.phases.items():
        style = "bold" if size == forecast.peak_bytes else ""
        if size:
            table.add_row(Text(phase, style), Text(bytes_in_words(size), style))
    console.print(table)
    stays = ", ".join(f"{name} {bytes_in_words(size)}" for name, size in plan["standing_bytes"].items() if size)
    console.print(f"Stays all the time, exactly: {stays}. What comes and goes is simulated. At the peak:", markup=False)
    limit = budget.tensor_bytes if budget else None
    console.print(memory_bar(plan["categories"], limit_bytes=limit))
    console.print(verdict(estimate))
    if config.training.device == "auto" and planner.facts.device.is_cpu:
        console.print("That is for this machine, which has no GPU; for a CUDA card: --device cuda.")
    if estimate.streamed.units:
        console.print(f"{estimate.streamed.sentence()}.", markup=False)
        for line in _transfer_words(plan["transfers"]):
            console.print(line, markup=False)
    if plan["traffic"]:
        console.print(_traffic_words(Traffic(**plan["traffic"]), plan["num_processes"]), markup=False)
    for note in plan["notes"]:
        console.print(Text(note, style="yellow"))


def verdict(estimate: MemoryEstimate) -> Text:
    """Say whether the run fits into memory, and by how much."""
    budget, needed = estimate.budget, estimate.forecast.peak_bytes
    words = f"Tensors need {bytes_in_words(needed)} at most"
    if budget is None:
        return Text(f"{words}. Whether that fits, --memory 4GiB tells.", style="bold")
    left = budget.tensor_bytes - needed
    if left >= 0:
        return Text(f"{words}: fits into {_limit(budget)}, {bytes_in_words(left)} are left.", style="bold green")
    remedy = "--fit finds settings that fit."
    return Text(f"{words}: does not fit into {_limit(budget)}, {bytes_in_words(-left)} too much. {remedy}", "bold red")


def show_fit(console: Console, found: Fit, budget: Budget) -> None:
    """Print the settings that were tried, with memory and time of each."""
    console.print(f"Fitting into {_limit(budget)}:", markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("changed", "to", "need", "host", "fits", "time"):
        table.add_column(name, justify="left" if name in ("changed", "to") else "right", no_wrap=True)
    for tried in found.tries:
        table.add_row(
            tried.name,
            as_overrides(tried.changes).replace(" ", "\n"),
            ("" if tried.need.is_known else "> ") + bytes_in_words(tried.need.peak_bytes),
            bytes_in_words(tried.need.host_bytes) if tried.need.host_bytes else "",
            Text("yes", "green") if tried.fits else Text("no", "red"),
            f"x {tried.slowdown:.2f}",
        )
    print_wide(console, table)
    console.print("need: most bytes of tensors; time: of a token, as expected, against that of what was asked.")


def _limit(budget: Budget) -> str:
    limit = bytes_in_words(budget.limit_bytes)
    if not budget.reserve_bytes:
        return limit
    gaps = f" and {budget.fragmentation:.0%} for gaps" if budget.fragmentation else ""
    return f"{limit} (less {bytes_in_words(budget.outside_bytes)} for context and other programs{gaps})"
