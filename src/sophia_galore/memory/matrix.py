"""A table of the settings with which models fit into GPUs of several sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from sophia_galore.config import RunConfig
from sophia_galore.config.dump import changed
from sophia_galore.config.size import bytes_in_words
from sophia_galore.memory.fitting import Fit, find_settings
from sophia_galore.memory.planner import Planner, find_planner

LIMITS: tuple[int, ...] = tuple(size * 2**30 for size in (4, 6, 8, 12, 16, 24))
"""Memory of common GPUs, in bytes."""


@dataclass(frozen=True)
class Row:
    """One model.

    Args:
        model: Its name.
        cells: For each limit, the settings that fit, as text; None if none do.
    """

    model: str
    cells: tuple[str | None, ...]


def matrix(config: RunConfig, models: Sequence[str], limits: Sequence[int]) -> Iterator[Row]:
    """Yield for each model the settings that fit into each limit; no data are read.

    Args:
        config: The configuration, apart from the model and the limit.
        models: Their names.
        limits: Memory of each GPU, in bytes.
    """
    for model in models:
        asked = changed(config, {"model.name": model})
        planner = find_planner(asked, lambda text: None, reads_data=False)  # the table shows no messages
        yield Row(model, tuple(_cell(planner, asked, limit) for limit in limits))


def markdown(rows: Iterable[Row], limits: Sequence[int]) -> str:
    """Return the table as Markdown.

    Args:
        rows: One for each model.
        limits: The columns.
    """
    lines = [
        "| model | " + " | ".join(bytes_in_words(limit) for limit in limits) + " |",
        "|---|" + "---|" * len(limits),
    ]
    lines += [f"| {row.model} | " + " | ".join(cell or "-" for cell in row.cells) + " |" for row in rows]
    return "\n".join(lines)


def read_rows(table: str) -> dict[str, Row]:
    """Return the rows of a table that `markdown` wrote, by the model's name; what is no such row is left out.

    Args:
        table: The table.
    """
    rows: dict[str, Row] = {}
    for line in table.splitlines()[2:]:
        model, *cells = (cell.strip() for cell in line.strip().strip("|").split("|"))
        if model and cells:
            rows[model] = Row(model, tuple(None if cell == "-" else cell for cell in cells))
    return rows


def _cell(planner: Planner, config: RunConfig, limit: int) -> str | None:
    asked = changed(config, {"memory.limit": limit})
    budget = planner.budget(asked)
    assert budget is not None  # a limit was given
    return _settings_in_words(find_settings(planner, asked, budget), planner.num_layers)


def _settings_in_words(found: Fit, num_layers: int) -> str | None:
    """Return settings in short form, such as "int8, 8-bit state, rank 64, host 9.5 GiB"; None if none fit."""
    config = found.config
    if config is None:
        return None
    optimizer = config.optimizer
    words: list[str] = ["int8" if config.quantization.int8 else config.model.store]
    words += [f"{optimizer.state_bits}-bit state"] if optimizer.state_bits < 32 else []
    if optimizer.type == "galore":
        words += ["4-bit bases"] if optimizer.galore.projection_bits == 4 else []
        words += [f"rank {optimizer.galore.rank}"] if "optimizer.galore.rank" in found.changes else []
    words += [
        f"{placement} {bytes_in_words(size)}"
        for placement in ("host", "disk")
        if (size := found.estimate.streamed.bytes_in(placement))
    ]
    words += [f"{config.training.max_length} tokens"] if "training.max_length" in found.changes else []
    kept = config.engine.keep_layers
    if isinstance(kept, int) and kept:
        words += ["keeps all graphs"] if kept >= num_layers else [f"keeps {kept} of {num_layers}"]
    return ", ".join(words)
