"""Run each run of a comparison in a separate process, so that none inherits memory from another."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from sophia_galore.errors import CheckpointError, EnvironmentProblem
from sophia_galore.experiment.design import Trial
from sophia_galore.train.checkpoint import checkpoints
from sophia_galore.train.folder import locked
from sophia_galore.train.result import find_config, finished_result
from sophia_galore.train.signals import hangup_signals

_LOOK_EVERY_S = 0.1
_WAIT_S = 120.0
"""How long to wait for a stopping process, which finishes its step and saves."""


class Stopped(Exception):
    """The user stopped the comparison; the current run has saved, or was stopped twice."""


class Child(Protocol):
    """A process that executes a run."""

    def poll(self) -> int | None:
        """Its exit code, negative if a signal ended it; None while it runs."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""


def new_interpreter(words: list[str], written: IO[str]) -> Child:
    """Start `sophia-galore WORDS` in a new interpreter.

    Args:
        words: The command and its arguments.
        written: The file for its output.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "sophia_galore", *words],
        stdin=subprocess.DEVNULL,
        stdout=written,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
        # Only this process forwards signals, so the child gets each of them once.
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )


def carry_out(
    trial: Trial, say: Callable[[str], None], begin: Callable[[list[str], IO[str]], Child] = new_interpreter
) -> str:
    """Execute a run, or resume it.

    Args:
        trial: The run.
        say: Takes each line that the run prints.
        begin: Starts a process from a command's words and the file for its output.

    Returns:
        "" if the run finished; else the reason why it failed.

    Raises:
        CheckpointError: Its folder holds a run with other settings.
        Stopped: The user stopped it.
    """
    if finished_result(trial.folder, trial.config):
        return ""
    asked = find_config(trial.folder)
    if asked is not None and asked != trial.config:
        raise CheckpointError(
            f"{trial.folder} holds a run of other settings than are asked for now.",
            "Choose another --output, or remove that folder.",
        )
    _wait_for_others(trial.folder, say)
    resume = ["--resume"] if checkpoints(trial.folder) else []
    log = trial.log
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as written, log.open(encoding="utf-8", errors="replace") as lines:
        lines.seek(0, os.SEEK_END)
        process = begin([*trial.words, *resume], written)
        said: list[str] = []
        with _forwarded(process) as stopped:
            while True:
                code = process.poll()
                # Read after polling, so that the last lines of a process that ended are not lost.
                while line := lines.readline():
                    said.append(line.rstrip("\n"))
                    say(said[-1])
                if code is not None:
                    break
                time.sleep(_LOOK_EVERY_S)
    if stopped or (code == 0 and not finished_result(trial.folder, trial.config)):
        raise Stopped
    return "" if not code else _reason(said, code)


def _reason(said: list[str], code: int) -> str:
    """Return why a run failed: its error message, or its last line."""
    errors = [line.removeprefix("Error: ") for line in said if line.startswith("Error: ")]
    if errors:
        return errors[-1]
    if code == -signal.SIGKILL:
        return "killed, as the system does when the machine is out of memory"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return said[-1] if said else f"exit code {code}"


def _wait_for_others(folder: Path, say: Callable[[str], None]) -> None:
    """Wait for the process of an earlier comparison, which saves before the run can be resumed here."""
    until_s, told = time.monotonic() + _WAIT_S, False
    while True:
        try:
            with locked(folder):
                return
        except EnvironmentProblem:
            if time.monotonic() > until_s:
                raise
        if not told:
            say(f"Waiting for another process that is still at work in {folder}.")
        told = True
        time.sleep(_LOOK_EVERY_S)


@contextmanager
def _forwarded(process: Child) -> Iterator[list[int]]:
    """Forward stop signals to the process inside the context; yield the list of those received."""
    came: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        came.append(number)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, *hangup_signals())}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Ask Linux to stop this process when its parent ends, even if the parent is killed."""
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
