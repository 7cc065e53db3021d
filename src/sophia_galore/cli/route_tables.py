"""A plan on the terminal: a summary, and a row for each parameter."""

from __future__ import annotations

import math
from collections import Counter

from rich import box
from rich.table import Table
from rich.text import Text

from sophia_galore.config.size import bytes_in_words
from sophia_galore.plan.plan import RunPlan
from sophia_galore.plan.route import Route
from sophia_galore.plan.verdicts import Decided


def plan_table(plan: RunPlan) -> Table:
    """Return a table of the routes, grouped by rule and reason."""
    table = _table(
        f"{plan.model_name} ({plan.model_source}): what is trained by what",
        left=("rule", "because", "weights"),
        right=("tensors", "parameters", "state", "peak lr"),
    )
    groups: dict[tuple[str, str, str, str], Counter[str]] = {}
    for route in plan.routes:
        group = groups.setdefault((route.rule, route.reason, route.format, _rate(route)), Counter())
        group["tensors"] += 1
        group["parameters"] += route.num_elements
        group["bytes"] += route.state_bytes + route.projection_bytes
    for (rule, reason, form, rate), group in groups.items():
        count, parameters = str(group["tensors"]), _millions(group["parameters"])
        table.add_row(rule, reason, form, count, parameters, _bytes(group["bytes"]), rate)
    table.add_section()
    table.add_row("all", "", "", str(len(plan.routes)), _millions(plan.num_parameters), "", "")
    return table


def parameter_table(plan: RunPlan) -> Table:
    """Return a table of every route, in the model's order."""
    table = _table(
        f"{plan.model_name}: every parameter",
        left=("parameter", "shape", "weights", "rule", "projection", "trained", "because"),
        right=("state", "peak lr"),
    )
    for route in plan.routes:
        rank = route.spec.subspace.rank if route.spec and route.spec.subspace else 0
        table.add_row(
            route.name,
            " x ".join(map(str, route.shape)),
            route.format,
            route.rule,
            f"{route.side}, rank {rank}" if rank else "",
            "yes" if route.trained else Text("no", style="bold red"),
            route.why,
            _bytes(route.state_bytes + route.projection_bytes),
            _rate(route),
        )
    return table


def remarks(plan: RunPlan) -> str:
    """Return the remarks on parameters with the number of tensors of each; may be empty."""
    counts = Counter(remark for route in plan.routes for remark in route.remarks)
    return "; ".join(f"{remark} ({count} tensor{'s' * (count > 1)})" for remark, count in counts.items())


def trained_share(plan: RunPlan) -> Text:
    """Return which share of the model is trained; red if it is not all."""
    # Rounded down: what is not trained must not be rounded away.
    percent = math.floor(1000 * plan.trained_fraction) / 10
    share = f"{percent:g}%" if percent or not plan.num_trained_parameters else "less than 0.1%"
    return Text(f"{share} of the parameters are trained", style="" if percent == 100 else "bold red")


def arranged(plan: RunPlan) -> str:
    """Say how much padding packing or grouping saves; "" if examples are only shuffled."""
    if plan.arrangement == "packed":
        return (
            f"Packed {plan.num_train_examples} examples into {plan.num_rows} rows: micro-batches are {plan.fill:.0%} "
            f"full, {plan.fill_shuffled:.0%} with one example a row. A step has some "
            f"{plan.num_train_examples / plan.steps_per_epoch:.0f} examples."
        )
    if plan.arrangement == "grouped":
        return (
            f"Examples of similar length share a micro-batch: micro-batches are {plan.fill:.0%} full, "
            f"{plan.fill_shuffled:.0%} if only shuffled."
        )
    return ""


def verdict_line(verdict: Decided) -> Text:
    """Return a verdict and its reason; a fallback is bold."""
    style = "yellow" if verdict.verdict == "use" else "bold yellow"
    return Text(f"{verdict.verdict}: {verdict.sentence()}", style=style)


def _table(title: str, *, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for column in (*left, *right):
        # Reasons may take a second line; a name or a number that does is hard to read.
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column != "because")
    return table


def _rate(route: Route) -> str:
    return f"{route.spec.learning_rate:.2e}" if route.spec else ""


def _bytes(count: int) -> str:
    return bytes_in_words(count) if count else ""


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
