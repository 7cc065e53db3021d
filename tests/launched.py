"""Several processes of one run, as `torchrun` starts them, but forked from this one."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from forked import Forked

_LIMIT_S = 120


def run_processes(count: int, function: Callable[[], int], log: Path) -> list[int]:
    """Call a function in several processes that can join each other; return their exit codes by rank.

    Args:
        count: Number of processes.
        function: What to call; its result is the exit code.
        log: Takes what the processes print.
    """
    with started(count, function, log) as children:
        return [wait(child) for child in children]


@contextmanager
def started(count: int, function: Callable[[], int], log: Path, *, restarts: int = 0) -> Iterator[list[Forked]]:
    """Start several processes; those that are left at the end are killed.

    Args:
        count: Number of processes.
        function: What to call; its result is the exit code.
        log: Takes what the processes print.
        restarts: How often the launcher has started them again.
    """
    port = _free_port()

    def child(rank: int) -> int:
        torch.set_num_threads(1)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        names["TORCHELASTIC_RESTART_COUNT"] = restarts
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        return function()

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        children = [Forked(lambda rank=rank: child(rank), file) for rank in range(count)]  # type: ignore[misc]
    try:
        yield children
    finally:
        for each in children:
            each.send_signal(signal.SIGKILL)
            each.wait()


def wait(child: Forked) -> int:
    """Wait for the end of a process, which must not hang; return its exit code."""
    end = time.monotonic() + _LIMIT_S
    while (code := child.poll()) is None:
        assert time.monotonic() < end, "a process hangs"
        time.sleep(0.02)
    return code


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
