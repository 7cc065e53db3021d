"""Runs in one process that take their steps in turns, so that whatever else the machine does meets all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from sophia_galore.config import RunConfig
from sophia_galore.data.portion import whole
from sophia_galore.engine.determinism import repeatable
from sophia_galore.memory.monitor import MemoryMonitor
from sophia_galore.train.callback import Callback
from sophia_galore.train.load import load
from sophia_galore.train.prepare import prepare
from sophia_galore.train.prepared import Loaded
from sophia_galore.train.signals import StopRequest


@dataclass
class Side:
    """A loaded run, and what was measured of it.

    Args:
        loaded: The run.
        clock: Returns seconds.
        seconds: Of each step.
        losses: Of each step.
        waited: Share of each step's time in which it waited for weights; empty if none live elsewhere.
    """

    loaded: Loaded
    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)

    def take(self, step: int) -> int:
        """Take a step; return the number of its tokens."""
        batches = self.loaded.feed.step(step)
        if streams := self.loaded.streams:
            streams.take_waited_s()
        begun = self.clock()
        result, _ = self.loaded.stepper.take(whole(batches), step=step, factor=1.0)
        if self.loaded.prepared.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(self.clock() - begun)
        self.losses.append(result.loss)
        if streams:
            self.waited.append(streams.take_waited_s() / self.seconds[-1])
        return result.num_tokens


def open_side(config: RunConfig, stack: ExitStack, clock: Callable[[], float] = time.perf_counter) -> Side:
    """Load a run; its monitor stays entered until the stack is closed.

    Args:
        config: What is asked.
        stack: Ends the run.
        clock: Returns seconds.
    """
    prepared = prepare(config, Callback(), None)
    monitor = stack.enter_context(MemoryMonitor(prepared.device, config.memory))
    return Side(load(prepared, monitor, Callback(), StopRequest(), stack), clock)


def compare(sides: Mapping[str, Side], num_steps: int, stack: ExitStack) -> dict[str, Any]:
    """Take steps in turns; compare each side with the first one, by steps of the same number without the first step.

    Args:
        sides: The runs by name; all have the same examples.
        num_steps: Number of steps.
        stack: Ends the runs.

    Returns:
        As plain data: medians of tokens a second, and of the ratios to the first side, with the lowest and highest.
    """
    stack.enter_context(repeatable(next(iter(sides.values())).loaded.prepared.device))
    tokens: list[int] = []
    for step in range(1, num_steps + 1):
        taken = {side.take(step) for side in sides.values()}
        assert len(taken) == 1, "all have the same examples"
        tokens.extend(taken)
    speeds = {name: [n / s for n, s in zip(tokens, side.seconds, strict=True)][1:] for name, side in sides.items()}
    base = next(iter(speeds.values()))
    ratios = {name: [one / other for one, other in zip(found, base, strict=True)] for name, found in speeds.items()}
    return {
        "threads": torch.get_num_threads(),
        "tokens a step": tokens,
        "tokens a second": {name: round(statistics.median(found), 1) for name, found in speeds.items()},
        "ratio": {name: round(statistics.median(found), 3) for name, found in ratios.items()},
        "from, to": {name: [round(min(found), 3), round(max(found), 3)] for name, found in ratios.items()},
        "waited": {name: round(statistics.median(side.waited[1:]), 4) for name, side in sides.items() if side.waited},
        "losses": {name: side.losses for name, side in sides.items()},
    }
