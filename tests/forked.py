"""A function in a process of its own that begins as a copy of this one, so that nothing has to be imported again."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import IO

from stopping import leave_sigterm


def run_forked(function: Callable[[], int], log: Path) -> int:
    """Call a function in a forked process and wait for its end.

    Args:
        function: What to call there; its result is the exit code.
        log: Takes what the process prints.

    Returns:
        The exit code, negative if a signal ended the process.
    """
    with log.open("a", encoding="utf-8") as file:
        child = Forked(function, file)
    return child.wait()


class Forked:
    """A function that is under way in a forked process, seen like a `subprocess.Popen`.

    Args:
        function: What to call there; its result is the exit code.
        log: Takes what the process prints.
    """

    def __init__(self, function: Callable[[], int], log: IO[str]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_the_child(function, log.fileno())
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative if a signal ended it; None while it runs."""
        return self._look(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end; gives the exit code."""
        code = self._look(0)
        assert code is not None
        return code

    def send_signal(self, sig: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, sig)

    def _look(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def forked_command(words: list[str], log: IO[str]) -> Forked:
    """`sophia-galore WORDS` as a comparison begins its runs, but for the new interpreter.

    Args:
        words: The command and its arguments.
        log: Takes what the process prints.
    """
    from sophia_galore.cli.main import main
    from sophia_galore.experiment.children import end_with_parent

    def child() -> int:
        os.setsid()
        end_with_parent()
        return main(words)

    return Forked(child, log)


def _be_the_child(function: Callable[[], int], log: int) -> None:
    code = 70
    try:
        leave_sigterm(taken=True)
        for stream in (1, 2):
            os.dup2(log, stream)
        # pytest's capture stands in place of these.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        code = function()
    except BaseException:  # whatever it is, the test's own process must not go on twice
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
