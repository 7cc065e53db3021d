"""Runs `sophia-galore train ...` and kills its own process at a chosen moment.

    python crash_run.py MOMENT COUNT ARGUMENT...

The process dies by SIGKILL at the COUNT-th time that MOMENT is reached. With "beside: " before a moment, checkpoints of
any size are completed beside the steps.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from sophia_galore.cli.main import main
from sophia_galore.optim import optimizer
from sophia_galore.train import checkpoint, metrics

# Where each moment is: the module and the function whose call it is.
BESIDE = "beside: "
MOMENTS: dict[str, tuple[Any, str]] = {
    "after a step": (metrics.MetricsLog, "add"),
    "at a weight": (optimizer.ParamOptimizer, "apply"),
    "at a refresh": (optimizer, "refresh"),
    "at a curvature": (optimizer.ParamOptimizer, "observe_curvature"),
    "while saving": (checkpoint, "_hash_and_flush"),
    "before the rename": (checkpoint, "_make_room"),
    "after the rename": (checkpoint, "checkpoints"),
}


def crash_run(moment: str, count: int, arguments: list[str]) -> int:
    """The command line, in this process, until it ends or dies; returns its exit code."""
    torch.set_num_threads(1)
    if moment.startswith(BESIDE):
        checkpoint._AT_ONCE_BYTES = 0
    if moment != "never":
        kill_at(moment.removeprefix(BESIDE), count)
    return main(arguments)


def kill_at(moment: str, count: int) -> None:
    """Arrange the process's death."""
    owner, name = MOMENTS[moment]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, deadly)


if __name__ == "__main__":
    sys.exit(crash_run(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
