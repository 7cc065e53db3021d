"""The tree of errors that a user can meet.

    SophiaGaloreError
    ├── UserError                exit code 2: something in what the user gave
    │   ├── ConfigError          a key, a value, a contradiction in the configuration
    │   ├── DataError            a file, a line or a field of the data
    │   ├── ModelError           a model that can't be found, read or understood
    │   ├── CheckpointError      a checkpoint that is missing, damaged or of another run
    │   ├── ArgumentError        an argument of a call in Python; a ValueError as well
    │   ├── StepError            a call that can't be done now; a RuntimeError as well
    │   └── EnvironmentProblem   disk, permissions, a device or a package that is not there
    └── RunError                 exit code 1: the run itself failed
        ├── NonFiniteError       a loss or a gradient that is NaN or infinite
        └── OutOfMemory          a tensor that does not fit into memory, or into its limit

Every error carries two sentences: `cause` (what is wrong, where) and `remedy` (what to do
about it). The command line prints both and nothing else.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import ClassVar


class SophiaGaloreError(Exception):
    """Base of all errors that are shown to the user without a traceback.

    Args:
        cause: What is wrong and where, in one sentence.
        remedy: What the user can do, in one sentence; empty if `cause` says it already.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(cause, remedy)
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.cause}\n{self.remedy}" if self.remedy else self.cause


class UserError(SophiaGaloreError):
    """Something in what the user gave is wrong; nothing was changed."""

    exit_code = 2


class ConfigError(UserError):
    """A key, a value or a contradiction in the configuration."""


class DataError(UserError):
    """A data file, a line or a field that can't be used."""


class ModelError(UserError):
    """A model that can't be found, read or understood."""


class NotPredictable(ModelError):
    """A model whose memory can't be predicted; it may well be trained."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or belongs to another run."""


class ArgumentError(UserError, ValueError):
    """An argument of a call in Python that can't be used; a `ValueError`, since that is what callers expect."""


class StepError(UserError, RuntimeError):
    """An optimizer was called at a moment, or met a parameter or gradient, at which it can't do its work."""


class EnvironmentProblem(UserError):
    """The machine lacks what the run needs: disk, permission, a device, a package."""


class RunError(SophiaGaloreError):
    """The run failed although everything that the user gave was acceptable."""


class NonFiniteError(RunError):
    """A loss or a gradient became NaN or infinite; no weight was changed by it."""


class OutOfMemory(RunError):
    """A tensor does not fit into memory, or into `memory.limit`."""


_LACKS_MEMORY = (
    "out of memory",
    "can't allocate memory",  # torch on a CPU, in a plain RuntimeError
    "cannot allocate memory",  # the system
    "bad_alloc",  # C++
    "failed to map segment",  # the loader, while a library is imported
    "can't start new thread",  # Python, which needs memory for its stack
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, ours or somebody else's, says that memory ran out, or came up while such a one was handled."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | OutOfMemory) or any(said in str(seen).lower() for said in _LACKS_MEMORY):
            return True
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return False


_SCARCE = b"""Error: Out of memory: this process got no more of the host's memory.
End other programs, raise its limit (ulimit -v), or take a smaller model. Checkpoints are not affected: --resume.
"""


def say_out_of_memory() -> int:
    """Say on standard error that memory ran out, where too little is left to say where; return the exit code."""
    with suppress(OSError):
        os.write(2, _SCARCE)
    return OutOfMemory.exit_code


# Packages that are imported where they are needed, by the extra that brings them.
_EXTRAS = {
    **dict.fromkeys(("accelerate", "datasets", "filelock", "gguf", "huggingface_hub", "matplotlib", "psutil"), "train"),
    **dict.fromkeys(("pyarrow", "pydantic", "rich", "ruamel", "transformers", "typer", "yaml"), "train"),
    "bitsandbytes": "bitsandbytes",
    "modelscope": "modelscope",
    "requests": "modelscope",
}


def lacks_package(error: ModuleNotFoundError) -> EnvironmentProblem | None:
    """What to say of a package that is not installed.

    Args:
        error: From an import.

    Returns:
        An error that names the package and what to install; None: it is none of the packages that are optional.
    """
    package = (error.name or "").partition(".")[0]
    if package not in _EXTRAS:
        return None
    return EnvironmentProblem(
        f"The package {package} is not installed.", f'Install it with: pip install "sophia-galore[{_EXTRAS[package]}]".'
    )


def short(error: BaseException) -> str:
    """The first line of somebody else's error, cut to a length that fits into a sentence of ours."""
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[0].rstrip(".")
    return line if len(line) <= 200 else line[:197] + "..."
