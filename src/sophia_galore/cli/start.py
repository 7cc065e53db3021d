"""The entry point of the command line; it says which packages are missing, and that memory is too small to begin.

`pip install sophia-galore` installs only the optimizers, but the command as well.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sophia_galore.errors import lacks_memory, lacks_package, say_out_of_memory


def main(argv: Sequence[str]) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name.

    Returns:
        The exit code.
    """
    try:
        from sophia_galore.cli.main import main as run
    except Exception as error:
        return _explain(error)
    return run(argv)


def entry() -> None:
    """The installed command."""
    try:
        from sophia_galore.cli.main import entry as run
    except Exception as error:
        sys.exit(_explain(error))
    run()


def _explain(error: Exception) -> int:
    """Say why an import failed, and return the exit code; raise what is not known."""
    if lacks_memory(error):
        return say_out_of_memory()
    problem = lacks_package(error) if isinstance(error, ModuleNotFoundError) else None
    if problem is None:
        raise error
    print(f"Error: {problem.cause} {problem.remedy}", file=sys.stderr)
    return problem.exit_code
