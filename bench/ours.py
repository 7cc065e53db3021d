"""Our run, step by step: what `sophia-galore train` carries out, without its output on the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from measured import Measured
from sophia_galore.config import RunConfig
from sophia_galore.memory.report import peak_process_bytes
from sophia_galore.train.callback import Callback
from sophia_galore.train.run import train


class _Times(Callback):
    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []
        self.peak_process_bytes = 0

    def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
        self.steps.append((record["tokens"], record["tokens"] / record["tokens_per_second"]))
        self.peak_process_bytes = peak_process_bytes()


def run_ours(config: RunConfig, *, resume_from: Path | None = None) -> Measured:
    """Train as the command does.

    Args:
        config: What is asked; `memory.track_steps` decides whether storages are tracked.
        resume_from: The checkpoint to go on from.

    Returns:
        What was measured. The tracked peak is that of the whole run, loading included.

    Raises:
        KeyboardInterrupt: The run was stopped, by a signal. It has saved a checkpoint.
    """
    times = _Times()
    result = train(config, times, resume=resume_from is not None, resume_from=resume_from)
    if not result.finished:
        raise KeyboardInterrupt(f"stopped at step {result.step}")
    tracked = result.memory.peak_allocated_bytes if config.memory.track_steps else None
    return Measured(times.steps, times.peak_process_bytes, tracked)
