"""A function in a process of its own that begins as a copy of this one, so that nothing has to be imported again."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_forked(function: Callable[[], int], log: Path) -> int:
    """Call a function in a forked process and wait for its end.

    Args:
        function: What to call there; its result is the exit code.
        log: Takes what the process prints.

    Returns:
        The exit code, negative if a signal ended the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_the_child(function, log)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _be_the_child(function: Callable[[], int], log: Path) -> None:
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        # pytest's capture stands in place of these.
        sys.stdout, sys.stderr = (os.fdopen(stream, "w", closefd=False) for stream in (1, 2))
        code = function()
    except BaseException:  # whatever it is, the test's own process must not go on twice
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
