"""Each run of a comparison in a process of its own, so that none inherits another one's memory."""

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
"""A process that was told to stop finishes its step and saves; that long it is waited for."""


class Stopped(Exception):
    """The user stopped the comparison; the run that was under way has saved, or was stopped for the second time."""


class Child(Protocol):
    """A process that carries out a run."""

    def poll(self) -> int | None:
        """Its exit code, negative if a signal ended it; None while it runs."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal."""


def new_interpreter(words: list[str], written: IO[str]) -> Child:
    """`sophia-galore WORDS` in a new interpreter.

    Args:
        words: The command and its arguments.
        written: Takes what it prints.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "sophia_galore", *words],
        stdin=subprocess.DEVNULL,
        stdout=written,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"},
        # Signals reach it through us alone: once for each time that the user sends one.
        start_new_session=True,
        preexec_fn=end_with_parent if sys.platform == "linux" else None,
    )


def carry_out(
    trial: Trial, say: Callable[[str], None], begin: Callable[[list[str], IO[str]], Child] = new_interpreter
) -> str:
    """Carry out a run, or what is left of it.

    Args:
        trial: The run.
        say: Takes the lines that the run prints, as they come.
        begin: Begins a process from a command's words and the file that takes what it prints.

    Returns:
        "" if it is finished; else why it failed, in a line.

    Raises:
        CheckpointError: What lies in its folder is a run of other settings.
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
            code: int | None = None
            running = True
            while running:
                code = process.poll()
                running = code is None
                while line := lines.readline():
                    said.append(line.rstrip("\n"))
                    say(said[-1])
                time.sleep(_LOOK_EVERY_S if running else 0)
    if stopped or (code == 0 and not finished_result(trial.folder, trial.config)):
        raise Stopped
    return "" if not code else _reason(said, code)


def _reason(said: list[str], code: int) -> str:
    """Why a run failed: its error, or its last words."""
    errors = [line.removeprefix("Error: ") for line in said if line.startswith("Error: ")]
    if errors:
        return errors[-1]
    if code == -signal.SIGKILL:
        return "killed, as the system does when the machine is out of memory"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return said[-1] if said else f"exit code {code}"


def _wait_for_others(folder: Path, say: Callable[[str], None]) -> None:
    """A run that was left behind by a comparison that is gone has to save before it can go on here."""
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
    """Inside the context, signals to stop go on to the process; gives those that came."""
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
    """Asks Linux to tell this process to stop when its parent is gone, even by a kill."""
    import ctypes

    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
