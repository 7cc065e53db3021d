"""Runs `sophia-galore train ...` in this process, and kills it in the midst of what files of layers go through.

Writers are slow and write a little at a time, so that a death by the clock finds half a layer written.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sophia_galore.cli.main import main
from sophia_galore.optim import optimizer
from sophia_galore.streaming import checked_file
from sophia_galore.train import checkpoint

MOMENTS = ("a layer is half written", "a new file takes its place", "a file is linked", "a checkpoint is hashed")
"""Moments that are counted; and there is the clock."""
CLOCK = "a time is over"
_CHUNK_BYTES = 8192


def crash_run(moment: str, at: float, arguments: list[str], counts: Path | None = None) -> int:
    """The command line until it ends or dies.

    Args:
        moment: One of `MOMENTS`, `CLOCK`, or "never".
        at: Which time that the moment is reached is the last; or after how many seconds of training it is.
        arguments: Those of the command line.
        counts: A file that takes how often each moment was reached, and the seconds of training.

    Returns:
        The exit code.
    """
    torch.set_num_threads(1)
    found: Counter[str] = Counter()

    def reached(name: str) -> None:
        found[name] += 1
        if name == moment and found[name] == at:
            os.kill(os.getpid(), signal.SIGKILL)

    _watch(reached)
    began: list[float] = []
    apply = optimizer.ParamOptimizer.apply

    def first_apply(self: Any, *given: Any, **more: Any) -> None:
        if not began:
            began.append(time.monotonic())
            if moment == CLOCK:
                timer = threading.Timer(at, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()
        apply(self, *given, **more)

    optimizer.ParamOptimizer.apply = first_apply  # type: ignore[method-assign]
    code = main(arguments)
    if counts is not None:
        counts.write_text(json.dumps({**found, CLOCK: time.monotonic() - began[0]}))
    return code


def _watch(reached: Callable[[str], None]) -> None:
    write_all, keep_as, replace = checked_file.write_all, checked_file.CheckedFile.keep_as, os.replace
    hash_and_flush = checkpoint._hash_and_flush

    def slow_write(file: Any, content: memoryview, place: int) -> None:
        for start in range(0, len(content), _CHUNK_BYTES):
            write_all(file, content[start : start + _CHUNK_BYTES // 2], place + start)
            time.sleep(0.0001)
            if start == 0:
                reached("a layer is half written")
            rest = start + _CHUNK_BYTES // 2
            write_all(file, content[rest : start + _CHUNK_BYTES], place + rest)

    def linked(self: Any, path: Path) -> None:
        reached("a file is linked")
        keep_as(self, path)

    def replaced(old: Any, new: Any) -> None:
        if str(old).endswith(".new"):
            reached("a new file takes its place")
        replace(old, new)

    def hashed(path: Path) -> str:
        reached("a checkpoint is hashed")
        return hash_and_flush(path)

    checked_file.write_all = slow_write
    checked_file.CheckedFile.keep_as = linked  # type: ignore[method-assign]
    os.replace = replaced
    checkpoint._hash_and_flush = hashed
