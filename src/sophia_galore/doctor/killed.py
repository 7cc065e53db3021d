"""A run that kills its own process after a step, without any warning, as a power cut does.

python -m sophia_galore.doctor.killed STEP THREADS KEY=VALUE...
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch

from sophia_galore.config import load_config
from sophia_galore.train.callback import Callback
from sophia_galore.train.run import train

KILL = int(getattr(signal, "SIGKILL", signal.SIGTERM))
"""What ends a process at once: on Windows, which has no SIGKILL, Python ends it in that way at a SIGTERM."""


class Killed(Callback):
    """Kills the process after a step.

    Args:
        step: The step's number.
    """

    def __init__(self, step: int) -> None:
        self._step = step

    def stepped(self, record: dict[str, Any], *, num_steps: int, seconds_left: float) -> None:
        """See `Callback`."""
        if record["step"] == self._step:
            os.kill(os.getpid(), KILL)


def main(argv: Sequence[str]) -> int:
    """Train until the process is killed.

    Args:
        argv: The step, the number of threads, and the settings of the run.

    Returns:
        The exit code, if it lives until the end of the run.
    """
    step, threads, *words = argv
    torch.set_num_threads(int(threads))  # bits of sums may depend on it
    train(load_config(None, words), Killed(int(step)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
