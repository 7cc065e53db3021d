"""Write a folder that is complete or not there, and never replaces another one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sophia_galore.errors import EnvironmentProblem
from sophia_galore.model.disk import errno_of, reason


def refuse_output(output: Path) -> None:
    """Refuse an output folder that exists and is not empty, or can't be made.

    Args:
        output: The output folder.

    Raises:
        EnvironmentProblem: It can't be used.
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
    """Write a temporary folder and rename it when it is complete.

    Args:
        output: The absolute path of the folder, checked by `refuse_output`.
        write: Writes into the empty folder that it is given; returns the folder to move, that one or one inside it.
        needed_bytes: About how many bytes are written, for the error message; 0: unknown.

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
        # Deleted before the message reads the free space.
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
