"""A folder that appears whole or not at all, and never in place of another one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.model.disk import errno_of, reason


def refuse_output(output: Path) -> None:
    """Refuse a place at which something is, or at which nothing can be.

    Args:
        output: The folder to be.

    Raises:
        EnvironmentProblem: It is taken.
    """
    try:
        taken = output.exists() and (not output.is_dir() or any(output.iterdir()) or output == Path.cwd())
    except OSError as error:
        raise EnvironmentProblem(
            f"{output} can't be written: {error.strerror or error}.", "Name another folder."
        ) from error
    if taken:
        raise EnvironmentProblem(f"{output} exists already.", "Name a folder that does not.")


def write_atomically(output: Path, write: Callable[[Path], Path], *, needed_bytes: int = 0) -> None:
    """Write a folder beside its place and move it there when it is whole.

    Args:
        output: Its place, absolute, which `refuse_output` let pass.
        write: Writes into the empty folder that it is given; returns what is to be moved, that folder or one in it.
        needed_bytes: About how much is written, for the message if there is no room; 0: that is not known.

    Raises:
        EnvironmentProblem: The disk is full, or can't be written.
    """
    from safetensors import SafetensorError

    beside = output.with_name(f".{output.name}.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        made = write(beside)
        if output.exists():
            output.rmdir()
        made.rename(output)
    except Exception as error:
        # First of all: what is free then is what there was.
        shutil.rmtree(beside, ignore_errors=True)
        cause = error.__cause__ if isinstance(error, EnvironmentProblem) and error.__cause__ else error
        if errno_of(cause) is None and not isinstance(cause, OSError | SafetensorError):
            raise
        raise EnvironmentProblem(
            f"{output} could not be written: {reason(cause, output, needed_bytes)}.",
            "Free some space, or name another folder.",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
