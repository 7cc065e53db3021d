"""Commands of this program in forked processes, which begin with everything imported.

An import of torch and transformers takes longer than a whole tiny run. So one process imports them and is copied for
each run; it must not have started a thread before.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

LIMIT_S = 180.0
"""A run that takes longer hangs."""
ESCAPED = 70
"""Exit code of a process that an exception ended which the command line let through."""


class Hangs(Exception):
    """A process did not end in time."""


class Child:
    """A function that is under way in a process of its own.

    Args:
        function: What to call there; its result is the exit code.
        log: A file that takes what it prints.
    """

    def __init__(self, function: Callable[[], int], log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _be(function, log)

    def poll(self) -> int | None:
        """Return its exit code, negative if a signal ended it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Wait for its end and return its exit code.

        Args:
            limit_s: How long to wait.

        Raises:
            Hangs: It did not end in time; it was killed.
        """
        end = time.monotonic() + limit_s
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise Hangs(f"the process did not end within {limit_s:.0f} s")
            time.sleep(0.005)
        return code

    def send(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> int:
        """Kill it, if it still runs; return its exit code."""
        self.send(signal.SIGKILL)
        while (code := self.poll()) is None:
            time.sleep(0.001)
        return code


def start(function: Callable[[], int], log: Path, num_processes: int = 1) -> list[Child]:
    """Start a function in one process, or in several as `torchrun` starts them.

    Args:
        function: What to call in each.
        log: Takes what they print.
        num_processes: Number of processes.
    """
    if num_processes == 1:
        return [Child(function, log)]
    port = _free_port()

    def ranked(rank: int) -> Callable[[], int]:
        def child() -> int:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
            return function()

        return child

    return [Child(ranked(rank), log) for rank in range(num_processes)]


def command(words: Sequence[str]) -> Callable[[], int]:
    """Return a function that carries out `sophia-galore WORDS` and returns its exit code."""
    from sophia_galore.cli.main import main

    return lambda: main(list(words))


def without_pictures() -> None:
    """Leave out the pictures at the end of runs, which take as long as the runs do, in this process and its copies."""
    from sophia_galore.cli import main  # which imports the command

    for name in ("plot_loss", "plot_memory", "plot_experts"):
        setattr(sys.modules[main.__name__.replace("main", "train")], name, lambda _: None)


def _be(function: Callable[[], int], log: Path) -> None:
    code = ESCAPED
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        code = function()
    except BaseException:  # whatever it is, the campaign must not go on twice
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
